"""A run goes on with the data it began with, or says that it doesn't."""

import json
import os
import re
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
        prepared = corpus(origin.with_own_tokenizer(recipe, tmp_path), home=files.home(), tell=told.append)
        origin.require_same(tmp_path, prepared, accept=accept, tell=told.append)
        return origin.Origin.of(prepared)

    return begin


def test_what_was_only_touched_is_the_same(begin, texts):
    first = begin()
    for path in texts.iterdir():
        os.utime(path, (1, 1))
    assert begin() == first


@pytest.mark.parametrize("stated", [True, False])
def test_text_that_was_edited_is_refused_until_it_is_accepted_by_its_hash(begin, texts, tmp_path, told, stated):
    given = {"tokenizer": str(tokenizer_of_run(begin, tmp_path))} if stated else {}
    first = begin(**given)
    edited = texts / "text00.txt"
    before = edited.read_text()
    edited.write_text(before + " value" * 40)
    with pytest.raises(DataError) as refusal:
        begin(**given)
    assert "other text than the run began with" in refusal.value.found
    digest = refusal.value.mend.split()[-1].rstrip(".")
    with pytest.raises(DataError):
        begin(accept="0" * 12, **given)
    now = begin(accept=digest, **given)
    assert now.digest == digest and now.tokenizer == first.tokenizer and now.shards != first.shards
    assert digest in told[-1] and str(tmp_path / ("kept" if stated else origin.TOKENIZER)) in told[-1]
    assert begin(**given).digest == digest, "it is recorded"
    assert json.loads((tmp_path / origin.RECORD).read_text())["before"]


def test_a_run_keeps_the_tokenizer_it_began_with_and_trains_no_other(begin, texts, tmp_path, monkeypatch):
    first = begin()
    (texts / "text00.txt").write_text("quite other words " * 60)
    monkeypatch.delattr(tokenizer, "trainers")
    with pytest.raises(DataError) as refusal:
        begin()
    assert begin(accept=refusal.value.mend.split()[-1].rstrip(".")).tokenizer == first.tokenizer
    (tmp_path / origin.TOKENIZER / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RunError, match=r"tokenizer_config\.json has 2 bytes") as damaged:
        begin()
    assert "checkpoint" in damaged.value.mend


def permuted(told: dict) -> None:
    vocabulary = told["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[290]], vocabulary[by_id[291]] = 291, 290


def other_merges(told: dict) -> None:
    told["model"]["merges"].reverse()


def other_normaliser(told: dict) -> None:
    told["normalizer"] = {"type": "Lowercase"}


def other_pre_tokeniser(told: dict) -> None:
    told["pre_tokenizer"]["use_regex"] = False


def added_token(told: dict) -> None:
    told["added_tokens"].append({**told["added_tokens"][0], "id": 300, "content": "<more>"})


@pytest.mark.parametrize(
    ("change", "number"),
    [(permuted, 290), (other_merges, None), (other_normaliser, None), (other_pre_tokeniser, None), (added_token, 300)],
)
def test_another_tokenizer_is_refused_whatever_is_accepted_and_its_first_id_named(begin, tmp_path, change, number):
    kept = tokenizer_of_run(begin, tmp_path)
    begin(tokenizer=str(kept))
    told = json.loads((kept / "tokenizer.json").read_text())
    change(told)
    (kept / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="another tokenizer than the run began with") as refusal:
        begin(tokenizer=str(kept))
    assert refusal.value.where.endswith("tokenizer.json")
    assert (f"first differing id {number}" in refusal.value.found) == (number is not None)
    with pytest.raises(DataError, match="another tokenizer"):
        begin(accept=refusal.value.mend, tokenizer=str(kept))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("special_tokens_map.json", "{}"),
        ("tokenizer_config.json", json.dumps({"eos_token": tokenizer.END_OF_TEXT, "chat_template": "{{ messages }}"})),
    ],
)
def test_another_template_or_other_special_tokens_are_another_tokenizer(begin, tmp_path, name, text):
    kept = tokenizer_of_run(begin, tmp_path)
    begin(tokenizer=str(kept))
    (kept / name).write_text(text)
    with pytest.raises(DataError, match="another tokenizer than the run began with") as refusal:
        begin(tokenizer=str(kept))
    assert refusal.value.where == str(kept / name) and str(tmp_path / origin.TOKENIZER) in refusal.value.mend


def tokenizer_of_run(begin, tmp_path: Path) -> Path:
    """A folder with the tokenizer that the texts give; the run is forgotten."""
    begin()
    (tmp_path / origin.RECORD).unlink()
    return Path(shutil.move(tmp_path / origin.TOKENIZER, tmp_path / "kept"))


def swap(path: Path, one: int, other: int) -> None:
    """Let two ids of a tokenizer stand for each other's tokens."""
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[by_id[one]], vocabulary[by_id[other]] = other, one
    path.write_text(json.dumps(content))


def test_another_tokenizer_is_refused_even_if_the_run_s_own_copy_is_damaged(begin, tmp_path):
    kept = tokenizer_of_run(begin, tmp_path)
    begin(tokenizer=str(kept))
    (tmp_path / origin.TOKENIZER / "tokenizer.json").write_text("{")
    swap(kept / "tokenizer.json", 290, 291)
    with pytest.raises(DataError, match="another tokenizer than the run began with") as refusal:
        begin(tokenizer=str(kept))
    assert "first differing id" not in refusal.value.found


def test_two_tokenizers_differ_first_where_an_id_changes(begin, tmp_path):
    kept = tokenizer_of_run(begin, tmp_path) / "tokenizer.json"
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


def test_a_run_whose_sources_changed_waits_for_consent_and_keeps_its_tokenizer(
    espalier, recipe_file, corpus_folder, tmp_path
):
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
    assert done.code == 3 and "other text than the run began with" in done.err
    assert (folder / "checkpoint-7").exists()
    digest = re.search(r"--accept-data\s+(\w{12})", done.err)[1]
    done = espalier("run", recipe, "--accept-data", digest)
    assert done.code == 0 and "Resumed at step" in done.out and "Training a tokenizer" not in done.out
    assert ModelFolder(folder / "final").tokenizer_fingerprint() == files.sha256(
        folder / origin.TOKENIZER / "tokenizer.json"
    )


@pytest.mark.parametrize("record, found", [(None, "no such file"), ("{}", "seal"), ("null", "seal")])
def test_a_run_that_lost_its_record_is_not_given_a_new_one(begin, tmp_path, record, found):
    begin()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / origin.RECORD).unlink()
    if record is not None:
        (tmp_path / origin.RECORD).write_text(record)
    with pytest.raises(RunError, match=found):
        begin()
