"""Pack: shards hold the documents in order, an interrupted job goes on, and damage is found."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import files, records
from espalier.data import pack as module
from espalier.data.pack import Tokens, tokenize
from espalier.data.prepare import DataRecipe, prepare
from espalier.data.tokenizer import END_OF_TEXT, load, train
from espalier.dataset import Dataset
from espalier.errors import DataError, ResourceError


class Killed(Exception):
    """Stands for a kill in the middle of the work."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    home = tmp_path_factory.mktemp("home")
    rows = [f"{END_OF_TEXT} says document {n} of é {n * n}\n" for n in range(120)]
    (home / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe = DataRecipe.model_validate({"sources": str(home / "rows.jsonl"), "held_out": 0.1})
    return prepare(recipe, home=home, tell=lambda line: None)


@pytest.fixture(scope="module")
def tokenizer_path(dataset) -> Path:
    return train(dataset, 280, home=dataset.path.parent.parent, tell=lambda line: None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_TOKENS", 400)
    monkeypatch.setattr(module, "BATCH_BYTES", 150)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def make(dataset, tokenizer_path, tmp_path, told):
    return lambda split="train": tokenize(dataset, split, tokenizer_path, home=tmp_path, tell=told.append)


@pytest.fixture(scope="module")
def whole(dataset, tokenizer_path, tmp_path_factory) -> Tokens:
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "SHARD_TOKENS", 400)
    patch.setattr(module, "BATCH_BYTES", 150)
    home = tmp_path_factory.mktemp("home")
    yield tokenize(dataset, "train", tokenizer_path, home=home, tell=lambda line: None)
    patch.undo()


def content(tokens: Tokens) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tokens.path.iterdir()}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_tokens_are_the_documents_in_order_each_with_one_end(make, dataset, tokenizer_path, split):
    tokens = make(split)
    tokenizer = load(tokenizer_path)
    ids = tokens.read(0, len(tokens))
    ends = np.flatnonzero(ids == tokens.eos_id)
    starts = [0, *(ends[:-1] + 1)]
    texts = [tokenizer.decode(ids[start:end].tolist()) for start, end in zip(starts, ends, strict=True)]
    assert texts == list(dataset.texts(split))
    assert ends[-1] == len(tokens) - 1
    assert (tokens.documents, tokens.bytes) == (dataset.rows[split], dataset.bytes[split])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_piece_is_that_piece_of_the_whole(whole, data):
    start = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - start))
    every = np.concatenate([np.fromfile(whole.path / shard.name, whole.dtype) for shard in whole.shards])
    assert len(whole.shards) > 3
    assert np.array_equal(whole.read(start, count), every[start : start + count])
    assert whole.read(start, count).dtype == np.dtype("<u2")


def test_shards_are_opened_only_when_read(whole):
    tokens = Tokens.open(whole.path)
    tokens.read(len(tokens) - 1, 1)
    assert list(tokens._descriptors) == [len(tokens.shards) - 1]


def test_a_shard_that_was_cut_after_it_was_checked_is_refused_where_it_ends(whole, tmp_path):
    copied = Tokens.open(Path(shutil.copytree(whole.path, tmp_path / "copied")))
    last = copied.path / copied.shards[-1].name
    os.truncate(last, last.stat().st_size - 2)
    assert np.array_equal(copied.read(0, len(copied) - 1), whole.read(0, len(whole) - 1))
    with pytest.raises(DataError, match=last.name):
        copied.read(len(copied) - 1, 1)


def test_what_was_written_opens_equal_and_a_second_call_computes_nothing(make, told, monkeypatch):
    tokens = make()
    assert Tokens.open(tokens.path) == tokens
    assert all(map(tokens.is_whole, tokens.shards))
    told.clear()
    monkeypatch.delattr(module, "_encode")
    assert make() == tokens
    assert told == []


@pytest.mark.parametrize("kill_at", range(11))
def test_a_job_killed_at_any_write_goes_on_to_the_same_files(make, whole, monkeypatch, kill_at):
    writes = iter(range(1000))
    write = files.write_bytes

    def killing(path: Path, data: bytes) -> None:
        if next(writes) == kill_at:
            path.with_name(".partial").write_bytes(data[: len(data) // 2])
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(files, "write_bytes", killing)
        make()
    finished = kill_at // 2
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", lambda path, data: (seen.append(path.name), write(path, data)))
        tokens = make()
    (tokens.path / ".partial").unlink()
    assert content(tokens) == content(whole)
    assert [name for name in seen if name != module.CARD] == [shard.name for shard in whole.shards[finished:]]


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_changed_shard_is_named_and_computed_again_from_there(make, whole, told, harm):
    tokens = make()
    shard = tokens.path / tokens.shards[2].name
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    if harm == "delete":
        shard.unlink()
    else:
        shard.write_bytes(data if harm == "flip" else data[:-2])
    assert [tokens.is_whole(shard) for shard in tokens.shards].index(False) == 2
    told.clear()
    assert content(make()) == content(whole)
    assert "shard-00002.bin isn't as it was written" in told[0]


@pytest.mark.parametrize("card", ["", "{", "[]", "{}", '{"shards": [{}]}'])
def test_an_unreadable_list_of_shards_starts_the_job_again(make, whole, told, card):
    tokens = make()
    (tokens.path / module.CARD).write_text(card)
    with pytest.raises(DataError, match="no readable"):
        Tokens.open(tokens.path)
    told.clear()
    assert content(make()) == content(whole)
    assert "can't be read" in told[0]


def test_unfinished_tokens_are_not_opened(make):
    tokens = make()
    card = records.read(tokens.path / module.CARD, None)
    records.write(tokens.path / module.CARD, card | {"complete": False})
    with pytest.raises(DataError, match="never finished"):
        Tokens.open(tokens.path)


def test_each_split_and_tokenizer_has_tokens_of_its_own(make, dataset, tokenizer_path, tmp_path):
    other = train(dataset, 270, home=tmp_path, tell=lambda line: None)
    paths = {
        make("train").path,
        make("validation").path,
        tokenize(dataset, "train", other, home=tmp_path, tell=str).path,
    }
    assert len(paths) == 3


def test_ids_above_65535_take_four_bytes(make, dataset, tokenizer_path, tmp_path):
    grown = load(tokenizer_path)
    grown.add_tokens([f"<{number}>" for number in range(70_000)])
    grown.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text((tokenizer_path / "tokenizer_config.json").read_text())
    wide = tokenize(dataset, "train", tmp_path, home=tmp_path, tell=str)
    assert wide.dtype == "<u4"
    assert np.array_equal(wide.read(0, len(wide)), make().read(0, len(wide)))


def test_a_folder_that_cannot_be_made_is_refused(make, tmp_path):
    (tmp_path / "tokens").write_text("in the way")
    with pytest.raises(ResourceError, match="tokens"):
        make()


def test_no_flipped_bit_of_the_list_of_shards_goes_unnoticed(make):
    tokens = make()
    card = tokens.path / module.CARD
    content = card.read_bytes()
    for place in range(len(content)):  # one bit of each byte; all eight were tried once
        card.write_bytes(content[:place] + bytes([content[place] ^ 1 << place * 3 % 8]) + content[place + 1 :])
        with pytest.raises(DataError):
            Tokens.open(tokens.path)


@pytest.mark.parametrize("changed", [{"eos_id": 7}, {"dtype": ">u2"}, {"dtype": "<u4"}, {"tokens": 0}, {"more": 1}])
def test_a_list_of_shards_that_says_something_else_than_the_shards_is_no_list_of_them(make, changed):
    tokens = make()
    card = json.loads((tokens.path / module.CARD).read_text())
    files.write_json(tokens.path / module.CARD, card | changed)
    with pytest.raises(DataError):
        Tokens.open(tokens.path)
