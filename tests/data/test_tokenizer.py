"""Tokenizer: every text comes back, every id stands for bytes, and the same data gives the same tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from espalier import files
from espalier.data import tokenizer as module
from espalier.data.prepare import DataRecipe, prepare
from espalier.data.tokenizer import END_OF_TEXT, byte_lengths, check, choose, eos_id, fingerprint, load, train
from espalier.dataset import Dataset
from espalier.errors import DataError

WORDS = "def return self import while for in range print value list dict none true false yield".split()  # noqa: SIM905
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*WORDS, " ", "\n", "\t", "é", "\U0001f333", "\x00", END_OF_TEXT])
).map("".join)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def dataset(home) -> Dataset:
    lines = [f"{WORDS[n % 16]} {WORDS[n * 7 % 13]} {WORDS[n * 5 % 11]} {n}" for n in range(400)]
    path = home / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    recipe = DataRecipe.model_validate({"sources": str(path), "held_out": 0.1})
    return prepare(recipe, home=home, tell=lambda line: None)


@pytest.fixture(scope="module")
def path(home, dataset) -> Path:
    return train(dataset, 320, home=home, tell=lambda line: None)


@pytest.fixture(scope="module")
def tokenizer(path) -> Tokenizer:
    return load(path)


@settings(deadline=None, max_examples=40)
@given(TEXT)
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(deadline=None, max_examples=40)
@given(TEXT)
def test_the_byte_lengths_of_a_texts_tokens_add_up_to_its_bytes(tokenizer, text):
    text = text.replace(END_OF_TEXT, "")
    encoding = tokenizer.encode(text)
    assert byte_lengths(tokenizer)[encoding.ids].sum() == len(text.encode())


def test_the_byte_lengths_add_up_on_the_text_that_made_the_merges(dataset, tokenizer):
    lengths, used = byte_lengths(tokenizer), set()
    for text in dataset.texts("train"):
        ids = tokenizer.encode(text).ids
        assert lengths[ids].sum() == len(text.encode())
        used.update(ids)
    assert len(used) > 40


def test_ids_are_the_special_token_then_the_bytes_then_the_merges(tokenizer):
    lengths = byte_lengths(tokenizer)
    assert len(lengths) == tokenizer.get_vocab_size() == 320
    assert tokenizer.id_to_token(0) == END_OF_TEXT
    assert lengths[0] == 0
    assert np.all(lengths[1:257] == 1)
    assert np.all(lengths[257:] > 1)


def test_transformers_opens_the_folder_and_agrees(path, tokenizer):
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(path)
    text = f"def value , return!{END_OF_TEXT}\n  é"
    assert opened(text).input_ids == tokenizer.encode(text).ids
    assert opened.decode(opened(text).input_ids) == text
    assert (opened.eos_token_id, opened.bos_token_id, opened.pad_token_id) == (0, 0, None)
    assert len(opened) == 320


def test_the_same_dataset_gives_the_same_tokenizer_in_another_process_and_home(tmp_path, dataset, path):
    code = (
        "import sys; from pathlib import Path\n"
        "from espalier.dataset import Dataset; from espalier.data import tokenizer\n"
        "dataset, home = Dataset.open(sys.argv[1]), Path(sys.argv[2])\n"
        "print(tokenizer.fingerprint(tokenizer.train(dataset, 320, home=home, tell=lambda line: None)))"
    )
    command = [sys.executable, "-c", code, str(dataset.path), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == fingerprint(path)


def test_a_second_call_trains_nothing_and_another_size_is_another_tokenizer(home, dataset, path, monkeypatch):
    other = train(dataset, 300, home=home, tell=lambda line: None)
    assert other != path
    monkeypatch.delattr(module, "trainers")
    assert train(dataset, 320, home=home, tell=pytest.fail) == path


def test_a_damaged_tokenizer_is_trained_again_and_says_so(tmp_path, dataset):
    told: list[str] = []
    made = train(dataset, 300, home=tmp_path, tell=told.append)
    before = fingerprint(made)
    (made / "tokenizer.json").write_text("{}")
    told.clear()
    assert fingerprint(train(dataset, 300, home=tmp_path, tell=told.append)) == before
    assert "damaged" in told[0]


def test_text_with_too_few_merges_gives_a_smaller_tokenizer_and_says_so(tmp_path, dataset):
    told: list[str] = []
    made = train(dataset, 50_000, home=tmp_path, tell=told.append)
    assert 320 < load(made).get_vocab_size() < 50_000
    assert f"only {load(made).get_vocab_size()} of 50000" in told[-1]


def test_the_sample_is_spread_evenly_and_as_large_as_asked_for(dataset, monkeypatch):
    every = list(dataset.texts("train"))
    total = sum(len(text) for text in every)
    monkeypatch.setattr(module, "SAMPLE_BYTES", total // 4)
    sample = list(module._sample(dataset))
    halves = [
        sum(len(text) for text in sample if text in part)
        for part in (every[: len(every) // 2], every[len(every) // 2 :])
    ]
    assert 0.95 * total / 4 < sum(halves) <= total / 4
    assert abs(halves[0] - halves[1]) < 0.1 * sum(halves)
    monkeypatch.setattr(module, "SAMPLE_BYTES", total)
    assert list(module._sample(dataset)) == every


def test_a_given_tokenizer_is_used_as_it_is(home, dataset, path):
    assert choose(str(path), dataset, 999, home=home, tell=pytest.fail) == path


def saved(folder: Path, tokenizer: Tokenizer, eos: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files.write_json(folder / "tokenizer_config.json", {"eos_token": eos})
    return folder


def test_an_end_of_sequence_token_may_be_written_as_transformers_once_did(tmp_path, tokenizer):
    folder = saved(tmp_path, tokenizer, {"content": END_OF_TEXT, "special": True})
    check(folder)
    assert eos_id(folder) == 0


@pytest.mark.parametrize("eos", [None, "</s>", {}, 3])
def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(tmp_path, tokenizer, eos):
    with pytest.raises(DataError, match="eos_token"):
        check(saved(tmp_path, tokenizer, eos))


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path, tokenizer):
    split = Tokenizer.from_str(tokenizer.to_str())
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="no byte-level BPE"):
        check(saved(tmp_path, split, END_OF_TEXT))
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["a b c"], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    with pytest.raises(DataError, match="no byte-level BPE"):
        check(saved(tmp_path, words, "</s>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    with pytest.raises(DataError, match="253 bytes without a token"):
        check(saved(tmp_path, words, "</s>"))


def test_a_given_tokenizer_is_checked(home, dataset, tmp_path, tokenizer):
    words = Tokenizer.from_str(tokenizer.to_str())
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="no byte-level BPE"):
        choose(str(saved(tmp_path, words, END_OF_TEXT)), dataset, 999, home=home, tell=pytest.fail)


def test_an_id_that_arrays_would_have_to_count_to_is_refused(tmp_path, tokenizer, monkeypatch):
    folder = saved(tmp_path, tokenizer, END_OF_TEXT)
    monkeypatch.setattr(module, "MAX_IDS", module.id_count(tokenizer))
    load(folder)
    monkeypatch.setattr(module, "MAX_IDS", module.id_count(tokenizer) - 1)
    with pytest.raises(DataError, match=f"an id of {module.id_count(tokenizer) - 1}"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff", b"{"])
def test_missing_or_broken_files_are_refused_by_name(tmp_path, tokenizer, name, content):
    folder = saved(tmp_path, tokenizer, END_OF_TEXT)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        check(folder)


def test_a_tokenizer_that_was_saved_with_a_limit_cuts_nothing(tmp_path, tokenizer):
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(3)
    limited.enable_padding(length=100)
    text = "def value return " * 9
    assert load(saved(tmp_path, limited, END_OF_TEXT)).encode(text).ids == tokenizer.encode(text).ids


def test_added_tokens_count_their_own_bytes_and_special_ones_none(tokenizer):
    grown = Tokenizer.from_str(tokenizer.to_str())
    grown.add_tokens(["Ünit"])
    grown.add_special_tokens(["<pad>"])
    assert byte_lengths(grown)[-2:].tolist() == [5, 0]
