"""Datasets: read back as written, refused when damaged, and their kind told by their columns."""

import itertools
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from espalier import files
from espalier.dataset import CARD, KINDS, Dataset, kind_of
from espalier.errors import DataError

TEXTS = {"train": ["a", "", "ü\n\n", "d" * 99] * 3, "validation": ["z"]}


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    path = tmp_path / "data"
    made = Dataset(
        path,
        "text",
        rows={split: len(texts) for split, texts in TEXTS.items()},
        bytes={split: sum(map(len, texts)) for split, texts in TEXTS.items()},
        dropped={"duplicate": 3},
        licence="PSF-2.0",
        parents=("a", "b"),
    )
    with files.whole_folder(path) as folder:
        for split, texts in TEXTS.items():
            parquet.write_table(pa.table({"text": texts}), folder / made.split_file(split).name, row_group_size=5)
        made.save_card(folder)
    return made


def test_a_dataset_opens_as_it_was_made(dataset):
    assert Dataset.open(str(dataset.path)) == dataset


@pytest.mark.parametrize("batch_rows", [1, 4, 1000])
def test_texts_come_in_order_whatever_the_batch(dataset, batch_rows):
    for split, texts in TEXTS.items():
        assert list(dataset.texts(split, batch_rows)) == texts


def test_the_datasets_library_opens_the_same_files(dataset, tmp_path):
    splits = {split: str(dataset.split_file(split)) for split in TEXTS}
    loaded = load_dataset("parquet", data_files=splits, cache_dir=str(tmp_path / "cache"))
    assert {split: rows["text"][:] for split, rows in loaded.items()} == TEXTS


def test_damage_is_refused_by_the_file(dataset):
    path = dataset.split_file("train")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError) as refused:
        Dataset.open(dataset.path)
    assert refused.value.where == str(dataset.path) and "train.parquet" in refused.value.found


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match="manifest"):
        Dataset.open(tmp_path / "missing")
    with files.whole_folder(tmp_path / "other") as folder:
        (folder / "config.json").write_text("{}")
    with pytest.raises(DataError, match=f"no {CARD}"):
        Dataset.open(tmp_path / "other")


def test_a_fingerprint_is_of_the_rows_and_not_of_what_is_said_of_them(dataset):
    first = dataset.fingerprint()
    replace(dataset, licence="MIT").save_card(dataset.path)
    files.write_manifest(dataset.path)
    assert Dataset.open(dataset.path).fingerprint() == first
    parquet.write_table(pa.table({"text": ["other"]}), dataset.split_file("train"))
    files.write_manifest(dataset.path)
    assert dataset.fingerprint() != first


@given(st.sets(st.sampled_from(["text", "messages", "prompt", "completion", "chosen", "rejected", "id"])))
def test_the_kind_is_one_whose_columns_are_all_there(columns):
    possible = [kind for kind, needed in KINDS.items() if set(needed) <= columns]
    assert kind_of(columns) in (possible or [None])
    for order in itertools.islice(itertools.permutations(columns), 6):
        assert kind_of(order) == kind_of(columns)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_by_its_own_columns_and_by_no_fewer(kind):
    assert kind_of(KINDS[kind]) == kind
    for column in KINDS[kind]:
        assert kind_of(set(KINDS[kind]) - {column}) != kind
