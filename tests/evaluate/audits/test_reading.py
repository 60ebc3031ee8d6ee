"""The tokens that stand for options are found in the whole prompt, and one that stands for more is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from espalier.errors import DataError
from espalier.evaluate.audits.reading import letter_ids, shares
from espalier.evaluate.questions import LETTERED, Question, render

ASKED = Question("Which?", ("red rose", "snow"), 1, context="é")
BARE = "{options}{question}"


def byte_level(*merges: tuple[str, str]) -> Tokenizer:
    """Bytes, and these merges; a newline is written Ċ."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: number for number, byte in enumerate(alphabet)}
    for one, two in merges:
        vocabulary[one + two] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def shown(tokenizer: Tokenizer, token: str, question: Question = ASKED) -> list[list[str]]:
    """The pieces of the prompt that stand for each option."""
    prompt = render(question, LETTERED)
    encoding = tokenizer.encode(prompt.text)
    share = shares(prompt, encoding, tokenizer, token)
    assert share.shape == (len(question.options), len(encoding.ids))
    np.testing.assert_allclose(share.sum(1), 1, rtol=1e-6)
    return [[prompt.text[slice(*encoding.offsets[place])] for place in row.nonzero()[0]] for row in share]


def test_an_option_is_its_lines_end_its_last_token_its_letter_or_all_its_text():
    tokenizer = byte_level(("o", "w"), ("s", "e"))
    assert shown(tokenizer, "eol") == [["\n"], ["\n"]]
    assert shown(tokenizer, "content") == [["se"], ["ow"]]
    assert shown(tokenizer, "label") == [["A"], ["B"]]
    assert shown(tokenizer, "mean") == [[*"red ro", "se"], [*"sn", "ow"]]


def test_a_full_stop_merged_with_the_newline_is_still_the_lines_end():
    tokenizer = byte_level((".", "Ċ"))
    question = Question("Which?", ("A rose.", "Snow."), 1)
    assert shown(tokenizer, "eol", question) == shown(tokenizer, "content", question) == [[".\n"], [".\n"]]


def test_a_character_of_several_tokens_is_its_last_one():
    question = Question("Which?", ("café", "thé"), 1)
    prompt = render(question, LETTERED)
    tokenizer = byte_level()
    encoding = tokenizer.encode(prompt.text)
    share = shares(prompt, encoding, tokenizer, "content")
    assert [tokenizer.decode(encoding.ids[place - 1 : place + 1]) for place in share.argmax(1)] == ["é", "é"]


@pytest.mark.parametrize("token", ["eol", "label"])
def test_a_newline_merged_with_the_next_letter_is_refused(token):
    with pytest.raises(DataError, match=r"option [AB] in"):
        shown(byte_level(("Ċ", "B")), token)
    assert shown(byte_level(("Ċ", "B")), "content") == [["e"], ["w"]]


def test_a_tokenizer_without_newlines_is_refused(words):
    words = Tokenizer.from_str(words.to_str())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="no token for it"):
        shown(words, "eol")
    assert shown(words, "label") == [["A"], ["B"]]


def test_a_newline_that_decodes_to_something_else_is_refused():
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\.|\n"), behavior="removed", invert=True)
    with pytest.raises(DataError, match="ends with a newline"):
        shown(words, "eol")


def test_letters_are_the_tokens_that_would_follow_the_prompt():
    spaced = byte_level(("Ġ", "A"), ("Ġ", "B"))
    assert letter_ids(spaced, "Answer:", 2) == [spaced.token_to_id("ĠA"), spaced.token_to_id("ĠB")]
    plain = byte_level()
    assert letter_ids(plain, "Answer:", 2) == [plain.token_to_id("A"), plain.token_to_id("B")]
    with pytest.raises(DataError, match="letter"):
        letter_ids(byte_level((":", "A")), "Answer:", 2)


def test_a_planted_head_selects_the_option_and_the_letters_follow(reader):
    seen, letters, tokens = reader().read(Question("needle", ("apple", "needle", "river"), 1))
    assert tokens == 13 and seen.qk_LHO.shape == (2, 5, 3)
    assert seen.qk_LHO[1, 3].argmax() == 1 and seen.attention_LHO[1, 3, 1] > 0.9
    assert seen.next_V[letters].argmax() == 1


def test_options_are_as_probable_as_their_tokens(reader, planted):
    found, tokens = reader().option_logprobs(Question("needle", ("apple needle", "river"), 0))
    ids = [
        [reader().tokenizer.token_to_id(word) for word in text.split()]
        for text in ("needle apple needle", "needle river")
    ]
    with torch.no_grad():
        for logprob, each in zip(found, ids, strict=True):
            logits = planted(torch.tensor([each])).logits[0].log_softmax(-1)
            assert logprob == pytest.approx(sum(float(logits[k, each[k + 1]]) for k in range(len(each) - 1)), rel=1e-5)
    assert tokens == 5


def test_a_prompt_beyond_the_context_is_refused(reader):
    with pytest.raises(DataError, match="at most 48"):
        reader().read(Question("apple " * 41, ("apple", "needle"), 1))
