"""Prepare: which documents end up in which split, and when a dataset is made anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import recipe
from espalier.data import prepare as module
from espalier.data.prepare import DataRecipe, prepare, prepare_data, split_of
from espalier.dataset import Dataset
from espalier.errors import DataError, RecipeError
from espalier.run import Run


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(f"document {number} " * 20)
    return folder


@pytest.fixture
def told() -> list[str]:
    return []


def make(corpus: Path, told: list[str], **changed) -> Dataset:
    recipe = DataRecipe.model_validate({"sources": str(corpus), "held_out": 0.2, "bad_rows": 0.1, **changed})
    return prepare(recipe, home=corpus.parent / "home", tell=told.append)


def test_a_recipe_takes_one_source_or_many_and_sizes_as_people_write_them():
    many = recipe.parse(DataRecipe, "", ["sources=[stdlib, docs]", "max_bytes=12MB"], where="test")
    assert [source.path for source in many.sources] == ["stdlib", "docs"]
    assert many.max_bytes == 12_000_000
    assert recipe.parse(DataRecipe, recipe.dump(many), [], where="test") == many
    assert recipe.parse(DataRecipe, "sources: docs", [], where="test").sources[0].path == "docs"
    assert recipe.parse(DataRecipe, "", [], where="test").sources[0].path == "stdlib"


@pytest.mark.parametrize(
    "wrong", ["sources=[]", "held_out=0", "held_out=1", "max_bytes=many", "vocab_size=256", "attend=all"]
)
def test_an_impossible_recipe_is_refused(wrong):
    with pytest.raises(RecipeError):
        recipe.parse(DataRecipe, "", [wrong], where="test")


def test_every_distinct_document_is_in_one_split_and_the_rest_is_counted(corpus, told):
    (corpus / "copy.txt").write_text((corpus / "00.txt").read_text())
    (corpus / "blank.txt").write_text(" \n")
    (corpus / "broken.txt").write_bytes(b"\xff")
    dataset = make(corpus, told)
    splits = {split: list(dataset.texts(split)) for split in ("train", "validation")}
    distinct = {(corpus / f"{number:02d}.txt").read_text() for number in range(60)}
    assert sorted(splits["train"] + splits["validation"]) == sorted(distinct)
    assert dataset.dropped == {"duplicate": 1, "empty": 1, "not UTF-8": 1}
    for split, texts in splits.items():
        assert dataset.rows[split] == len(texts)
        assert dataset.bytes[split] == sum(len(text.encode()) for text in texts)
        assert all(split_of(text, 0.2) == split for text in texts)
    lines = (dataset.path / module.QUARANTINE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"origin": "corpus/broken.txt byte 0", "reason": "not UTF-8"}]


def test_the_dataset_opens_as_a_dataset_and_is_a_source_itself(corpus, told):
    (corpus / "broken.txt").write_bytes(b"\xff")  # so that there is a quarantine, which is no part of the rows
    dataset = make(corpus, told)
    assert Dataset.open(dataset.path) == dataset
    for split in ("train", "validation"):
        again = [
            document.text
            for document in module.read(module.Source(path=str(dataset.path), split=split), module.Quarantine())
        ]
        assert again == list(dataset.texts(split))


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_held_out_only_adds_documents(text, one, other):
    small, large = sorted((one, other))
    assert split_of(text, small) == "train" or split_of(text, large) == "validation"


def test_the_share_held_out_is_about_what_was_asked_for():
    held = sum(split_of(f"document {number}", 0.1) == "validation" for number in range(5000))
    assert 400 < held < 600


@pytest.mark.parametrize("write_bytes", [1, 1000, module.WRITE_BYTES])
def test_the_rows_do_not_depend_on_how_often_they_are_flushed(corpus, told, monkeypatch, write_bytes):
    monkeypatch.setattr(module, "WRITE_BYTES", write_bytes)
    dataset = make(corpus, told)
    expected = [path.read_text() for path in sorted(corpus.iterdir())]
    assert list(dataset.texts("train")) == [text for text in expected if split_of(text, 0.2) == "train"]


def test_max_bytes_is_never_exceeded_and_all_but_reached(corpus, told):
    dataset = make(corpus, told, max_bytes=5000)
    total = sum(dataset.bytes.values())
    assert 5000 - 13 * 20 < total <= 5000


def test_a_second_call_reads_nothing(corpus, told, monkeypatch):
    dataset = make(corpus, told)
    monkeypatch.delattr(module, "read")
    told.clear()
    assert make(corpus, told, vocab_size=999, sequence_length=9) == dataset
    assert told == []


def test_a_changed_source_or_setting_gives_another_dataset(corpus, told):
    first = make(corpus, told)
    assert make(corpus, told, held_out=0.3).path != first.path
    (corpus / "00.txt").write_text("changed")
    changed = make(corpus, told)
    assert changed.path != first.path
    assert changed.fingerprint() != first.fingerprint()


def test_a_source_that_was_only_touched_gives_the_same_content(corpus, told):
    first = make(corpus, told)
    os.utime(corpus / "00.txt", ns=(1, 1))
    touched = make(corpus, told)
    assert touched.path != first.path
    assert touched.fingerprint() == first.fingerprint()


def test_a_damaged_cache_is_made_again_and_says_so(corpus, told):
    dataset = make(corpus, told)
    fingerprint, rows = dataset.fingerprint(), list(dataset.texts("train"))
    content = bytearray(dataset.split_file("train").read_bytes())
    content[len(content) // 2] ^= 1
    dataset.split_file("train").write_bytes(content)
    told.clear()
    again = make(corpus, told)
    assert "damaged" in told[0] and "train.parquet" in told[0]
    assert again.fingerprint() == fingerprint
    assert list(again.texts("train")) == rows


@pytest.mark.parametrize(
    ("changed", "mend"),
    [
        ({"held_out": 1e-9}, "raise held_out"),
        ({"held_out": 1 - 1e-9}, "lower held_out"),
        ({"max_bytes": 3}, "raise max_bytes"),
    ],
)
def test_a_split_without_documents_is_refused_and_leaves_nothing(corpus, told, changed, mend):
    with pytest.raises(DataError, match=mend):
        make(corpus, told, **changed)
    assert list((corpus.parent / "home" / "data").iterdir()) == []


def test_a_corpus_of_nothing_but_rubbish_is_refused_with_the_reasons(tmp_path, told):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="1 not UTF-8"):
        make(tmp_path / "a.txt", told)


def test_the_method_leaves_dataset_tokenizer_and_tokens_in_the_cache(corpus, told, monkeypatch):
    home = corpus.parent / "home"
    monkeypatch.setenv("ESPALIER_HOME", str(home))
    resolved = DataRecipe.model_validate({"sources": str(corpus), "held_out": 0.2, "vocab_size": 300})
    run = Run(corpus.parent / "run", resolved, tell=told.append)
    assert prepare_data(resolved, run).rows["train"] > 0
    assert {entry.name: len(list(entry.iterdir())) for entry in home.iterdir()} == {
        "data": 1,
        "tokenizers": 1,
        "tokens": 2,
    }
    told.clear()
    prepare_data(resolved, run)
    assert told == []


def test_recipes_load_without_heavy_libraries():
    heavy = "numpy pyarrow datasets tokenizers torch transformers"
    code = f"import sys, espalier.data.prepare; print(set('{heavy}'.split()) & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_more_bad_rows_than_allowed_are_refused_with_the_first_of_them(corpus, told):
    lines = [json.dumps({"text": f"row {number}"}) for number in range(60)]
    lines[7] = lines[9] = "no JSON"
    (corpus / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="2 of 120 rows") as refused:
        make(corpus, told, bad_rows=0.016)
    assert refused.value.where == "corpus/rows.jsonl:8" and "rows.jsonl:10" in refused.value.found
    assert "bad_rows=0.0167" in refused.value.mend
    dataset = make(corpus, told, bad_rows=0.0167)
    assert sum(dataset.rows.values()) == 118
    assert (
        f"corpus/rows.jsonl:8: malformed JSON; 2 of 120 rows quarantined in {dataset.path / module.QUARANTINE}." in told
    )
    with pytest.raises(DataError, match="2 of 120 rows"):
        make(corpus, told, bad_rows=0)


def test_an_archive_among_the_texts_is_named_with_the_way_to_unpack_it(corpus, told):
    (corpus / "more.tar.gz").write_bytes(b"no matter")
    with pytest.raises(DataError, match=r"1 archive, not unpacked.*tar -xf"):
        make(corpus, told, bad_rows=0.01)
