"""A run goes on with the data it began with, or says that it doesn't."""

import json
import os
import shutil
from pathlib import Path

import pytest

from espalier import files
from espalier.data import origin, tokenizer
from espalier.data.prepare import DataRecipe, corpus
from espalier.errors import DataError, ModelError, RunError
from espalier.folder import MADE, ModelFolder


@pytest.fixture
def texts(corpus_folder, tmp_path) -> Path:
    return Path(shutil.copytree(corpus_folder, tmp_path / "texts"))


@pytest.fixture
def corpus_folder(request) -> Path:
    return request.getfixturevalue("corpus")


@pytest.fixture
def begin(texts, tmp_path, told):
    """Prepare the texts as they are and compare them with the run's record."""

    def begin(accept: str = "", **changes) -> origin.Origin:
        recipe = DataRecipe(sources=[str(texts)], held_out=0.2, vocab_size=300, sequence_length=16, **changes)
        prepared = corpus(recipe, home=files.home(), tell=told.append)
        origin.require_same(tmp_path, prepared, accept=accept, tell=told.append)
        return origin.Origin.of(prepared)

    return begin


def test_what_was_only_touched_is_the_same(begin, texts):
    first = begin()
    for path in texts.iterdir():
        os.utime(path, (1, 1))
    assert begin() == first


def test_text_that_was_edited_is_refused_until_it_is_accepted_by_its_hash(begin, texts, tmp_path, told):
    begin()
    kept = tokenizer_of_run(tmp_path)
    edited = texts / "text00.txt"
    before = edited.read_text()
    edited.write_text(before + " value" * 40)
    with pytest.raises(DataError) as refusal:
        begin(tokenizer=str(kept))
    assert "other text than the run began with" in refusal.value.found
    digest = refusal.value.mend.split()[-1].rstrip(".")
    with pytest.raises(DataError):
        begin(accept="0" * 12, tokenizer=str(kept))
    assert begin(accept=digest, tokenizer=str(kept)).digest == digest
    assert digest in told[-1]
    assert begin(tokenizer=str(kept)).digest == digest, "it is recorded"
    assert json.loads((tmp_path / origin.RECORD).read_text())["before"]


def test_another_tokenizer_is_refused_whatever_is_accepted_and_its_first_id_named(begin, tmp_path):
    begin()
    kept = tokenizer_of_run(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    shutil.copy(kept / "tokenizer.json", tmp_path / "checkpoint-1")
    swap(kept / "tokenizer.json", 290, 291)
    with pytest.raises(DataError, match="first differing id 290"):
        begin(accept=begin_digest(begin, kept), tokenizer=str(kept))


def begin_digest(begin, kept: Path) -> str:
    try:
        return begin(tokenizer=str(kept)).digest
    except DataError:
        return ""


def tokenizer_of_run(tmp_path: Path) -> Path:
    """A copy of the one tokenizer that the cache holds."""
    found = next(path for path in files.home().rglob("tokenizer.json"))
    return Path(shutil.copytree(found.parent, tmp_path / "kept"))


def swap(path: Path, one: int, other: int) -> None:
    """Let two ids of a tokenizer stand for each other's tokens."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[one]], vocabulary[by_id[other]] = other, one
    path.write_text(json.dumps(content))


def test_two_tokenizers_differ_first_where_an_id_changes(begin, tmp_path):
    begin()
    kept = tokenizer_of_run(tmp_path) / "tokenizer.json"
    other = tmp_path / "other.json"
    shutil.copy(kept, other)
    assert tokenizer.first_difference(kept, other) is None
    swap(other, 280, 299)
    assert tokenizer.first_difference(kept, other) == 280


def test_a_model_folder_with_another_tokenizer_is_refused(finished, tmp_path):
    folder = Path(shutil.copytree(finished / "final", tmp_path / "model"))
    ModelFolder.open(folder)
    (folder / files.MANIFEST).unlink()  # a copy that somebody made
    ModelFolder.open(folder)
    swap(folder / "tokenizer.json", 270, 271)
    with pytest.raises(ModelError, match="another tokenizer than the model was trained with"):
        ModelFolder.open(folder)
    made = json.loads((folder / MADE).read_text())
    (folder / MADE).write_text(json.dumps({**made, "tokenizer": None}))
    ModelFolder.open(folder)


def test_a_run_whose_sources_changed_is_refused_and_the_model_kept(espalier, recipe_file, corpus_folder, tmp_path):
    import yaml

    texts = Path(shutil.copytree(corpus_folder, tmp_path / "texts"))
    values = yaml.safe_load(recipe_file.read_text())
    values["data"]["sources"] = [str(texts)]
    recipe = tmp_path / "edited.yaml"
    recipe.write_text(yaml.safe_dump(values))
    command = espalier.start("run", recipe)
    folder = tmp_path / "runs" / "tiny"
    command.until(lambda: (folder / "checkpoint-7" / files.MANIFEST).exists())
    command.send(9)
    command.wait()
    (texts / "text01.txt").write_text("other words " * 50)
    done = espalier("run", recipe)
    assert done.code == 3 and "another tokenizer than the run began with" in done.err
    assert (folder / "checkpoint-7").exists()


@pytest.mark.parametrize("record, found", [(None, "no such file"), ("{}", "seal"), ("null", "seal")])
def test_a_run_that_lost_its_record_is_not_given_a_new_one(begin, tmp_path, record, found):
    begin()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / origin.RECORD).unlink()
    if record is not None:
        (tmp_path / origin.RECORD).write_text(record)
    with pytest.raises(RunError, match=found):
        begin()
