"""Completions: what the model would go on with, without the prompt, the same each time."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from espalier.infer.sample import complete
from espalier.model.build import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec

EOS = 0


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Byte-level: id 0 ends a text, the others are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": EOS} | {byte: number for number, byte in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture
def model():
    spec = ModelSpec(vocab_size=257, hidden_size=32, head_dim=16, num_hidden_layers=1, initializer_range=0.3)
    return build(spec, Parametrization(kind="standard"), seed=0, eos_token_id=EOS)


@pytest.fixture
def always(model, tokenizer):
    """Make the model write one token, whatever it reads."""

    def always(number: int) -> None:
        with torch.no_grad():
            model.base_model.norm.weight.zero_()
            model.base_model.norm.weight[0] = 1
            model.base_model.embed_tokens.weight[:, 0] = 9.0
            for layer in model.base_model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.lm_head.weight.zero_()
            model.lm_head.weight[number, 0] = 5.0

    return always


def test_a_prompt_is_continued_by_the_most_likely_token_and_left_out(model, tokenizer, always):
    always(tokenizer.token_to_id("x"))
    assert complete(model, tokenizer, ["ab", "é"], max_new_tokens=3) == ["xxx", "xxx"]


def test_a_model_that_ends_its_text_writes_nothing(model, tokenizer, always):
    always(EOS)
    assert complete(model, tokenizer, ["ab"], max_new_tokens=3) == [""]


@pytest.mark.parametrize("count", [1, 5])
def test_completions_have_the_length_asked_for_and_no_chance_in_them(model, tokenizer, count):
    torch.manual_seed(1)
    first = complete(model, tokenizer, ["one", "other"], max_new_tokens=count)
    torch.manual_seed(2)
    assert complete(model, tokenizer, ["one", "other"], max_new_tokens=count) == first
    assert all(len(tokenizer.encode(text).ids) <= 3 * count for text in first)  # a byte alone may decode to U+FFFD


def test_prompts_do_not_touch_each_other(model, tokenizer):
    together = complete(model, tokenizer, ["one", "a much longer prompt"], max_new_tokens=4)
    assert together == [complete(model, tokenizer, [p], max_new_tokens=4)[0] for p in ("one", "a much longer prompt")]


def test_no_prompts_give_no_completions(model, tokenizer):
    assert complete(model, tokenizer, [], max_new_tokens=4) == []
