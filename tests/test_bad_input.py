"""Bad input: each kind ends in four lines that help and its own exit code, and nothing that was there is lost."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from espalier import files, records
from espalier.data.prepare import QUARANTINE
from espalier.run import FINAL, LEDGER, LOG, METRICS, PLAN, RECIPE, STATE
from espalier.train.checkpoint import list_steps

LABELS = ["where", "found", "expected", "mend"]
SHORT = ("stages.0.duration=64 tokens", "stages.1.duration=64 tokens")


def labels(err: str) -> list[str]:
    """The labels of the lines in which a refusal is shown; a long text goes on without one."""
    return [line.split()[0] for line in err.splitlines() if line[:9].strip() and line.split()[0] in LABELS]


@pytest.fixture
def refused(espalier, recipe_file, tmp_path):
    """Run the tiny recipe with overrides; assert that it is refused in four lines with this code, and give them."""

    def refused(code: int, *overrides: str, recipe: Path = recipe_file, **limits: int) -> str:
        done = espalier("run", recipe, *overrides, **limits)
        assert done.code == code, (done.code, done.out, done.err)
        assert labels(done.err) == LABELS, done.err
        assert "Traceback" not in done.out + done.err and "bug" not in done.err
        assert not list((tmp_path / "runs").glob(f"*/{files.PARTIAL}*"))
        return done.err

    return refused


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.batch_tokens=lots", "batch_tokens"),
        ("train.batch_tokens=-1", "batch_tokens"),
        ("train.batchtokens=64", "batch_tokens"),
        ("stages=[]", "stages"),
        ("stages.0.duration=soon", "3M tokens"),
        ("stages.0.duration=1e999 tokens", "without end"),
        ("stages.7.duration=1M tokens", "index"),
        ("name=../elsewhere", "name"),
        ("optimizer.name=sgd", "muon"),
        ("budget.usd=0", "budget.usd"),
        ("data.held_out=2", "held_out"),
        ("samples.prompts=['']", "samples.prompts"),
        ("model.family=bert", "granite"),
        ("data.sequence_length=65", "max_position_embeddings 64"),
        ("model.family=llama", "parametrization.kind"),
    ],
)
def test_a_value_that_cannot_be_taken(refused, override, said):
    assert said in refused(2, override)


@pytest.mark.parametrize(
    "text, said",
    [("name: a\nname: b\n", "twice"), ("a: [1\n", "YAML"), ("- 1\n", "list"), ("name: \0\n", "text"), ("", "stages")],
)
def test_a_file_that_is_no_recipe(refused, tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert said in refused(2, recipe=path)


def test_a_recipe_that_is_not_there_or_not_text(refused, tmp_path):
    assert "no.yaml" in refused(2, recipe=tmp_path / "no.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff\xfe\n")
    assert "UTF-8" in refused(2, recipe=tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("stages.0.num_attention_heads=3", "model.head_dim=null"), "stage 1"),
        (("stages.0.hidden_size=40",), "isn't a multiple of head_dim 16"),
        (("stages.1.hidden_size=16",), "stage 2: hidden_size"),
        (("stages.0.num_hidden_layers=5",), "stage 2: num_hidden_layers"),
        (("stages.0.hidden_size=0",), "hidden_size"),
        (("model.vocab_size=200",), "300 ids"),
    ],
    ids=["heads", "head size", "narrower", "shallower", "nothing", "vocabulary"],
)
def test_a_shape_that_cannot_be_built_or_grown_into(refused, overrides, said, tmp_path):
    code = 2 if "model.head_dim=null" in overrides else 4
    assert said in refused(code, *overrides) or code == 2
    assert not list((tmp_path / "runs").glob(f"tiny/{FINAL}"))


@pytest.mark.parametrize(
    "override, said",
    [
        ("stages.0.duration=10 tokens", "at least one step of 64 tokens"),
        ("budget.tokens=100", "budget.tokens"),
        ("budget.flops=1000", "budget.flops"),
        ("budget.hours=1e-7", "budget.hours"),
        ("stages.0.duration=50%", "no limit"),
    ],
)
def test_a_budget_that_is_too_small_for_a_step(refused, override, said, tmp_path):
    assert said in refused(8, override)
    assert not (tmp_path / "runs" / "tiny" / PLAN).exists()


@pytest.mark.parametrize(
    "kind, said",
    [
        ("missing", "nothing there"),
        ("empty", "no file of text"),
        ("blank", "0 documents"),
        ("unreadable", "unreadable: Input/output error"),
        ("short", "sequence_length"),
        ("other tokenizer", "tokenizer.json"),
        ("word tokenizer", "byte-level"),
    ],
)
def test_a_corpus_or_tokenizer_that_cannot_be_used(refused, tmp_path, kind, said):
    folder = tmp_path / "text"
    overrides = {
        "missing": [f"data.sources=[{folder}-1]"],
        "unreadable": ["data.sources=[/proc/self/mem]"],  # it may be opened, and reading it fails, for root as well
        "short": [f"data.sources=[{folder}]", "data.sequence_length=64", "model.max_position_embeddings=64"],
        "other tokenizer": [f"data.tokenizer={folder}"],
        "word tokenizer": [f"data.tokenizer={folder}"],
    }.get(kind, [f"data.sources=[{folder}]"])
    folder.mkdir()
    if kind == "blank":
        (folder / "blank.txt").write_text("  \n")
    if kind == "short":
        for number in range(9):
            (folder / f"{number}.txt").write_text(f"word {number}")
    if kind == "word tokenizer":
        word_level = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": word_level}))
    assert said in refused(3, *overrides)


def test_bytes_that_are_no_text_are_put_aside_counted_and_the_run_goes_on(
    espalier, corpus, recipe_file, shared_home, tmp_path
):
    folder = Path(shutil.copytree(corpus, tmp_path / "text"))
    (folder / "broken.txt").write_bytes(b"caf\xe9 \xff\xfe")
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 3}\nnot json\n')
    done = espalier("run", recipe_file, *SHORT, f"data.sources=[{folder}]", "data.bad_rows=0.5")
    assert done.code == 0, done.err
    assert "1 malformed JSON, 1 no text, 1 not UTF-8" in done.out
    quarantined = [path.read_text() for path in (shared_home / "data").glob(f"*/{QUARANTINE}")]
    assert any("text/broken.txt" in text and "text/rows.jsonl:3" in text for text in quarantined)


def test_a_folder_that_holds_something_else(refused, copy_of_finished, tmp_path):
    before = {path: path.read_bytes() for path in copy_of_finished.rglob("*") if path.is_file()}
    assert re.search(r"seed +1 +2 +refused", refused(5, "seed=2"))
    other = tmp_path / "runs" / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("irreplaceable")
    assert "other files" in refused(5, "name=mine")
    assert (other / "thesis.txt").read_text() == "irreplaceable" and len(list(other.iterdir())) == 1
    assert {path: path.read_bytes() for path in before} == before


def test_numbers_that_are_not_finite(refused, tmp_path):
    err = refused(7, "optimizer.learning_rate=1e38", "optimizer.vector_learning_rate=1e38")
    assert "step " in err and "finite numbers" in err
    run = tmp_path / "runs" / "tiny"
    assert records.read(run / STATE, None)["status"] == "failed"
    assert "NumericsError" in (run / LOG).read_text(), "the traceback is in the log"


@pytest.fixture
def stopped(espalier, recipe_file, tmp_path, logged_steps) -> Path:
    """A run that was stopped half way, with two checkpoints."""
    run = tmp_path / "runs" / "tiny"
    command = espalier.start("run", recipe_file)
    command.until(lambda: logged_steps(run) >= 15)
    command.send(signal.SIGTERM)
    assert command.wait().code == 143
    assert len(list_steps(run)) == 2
    return run


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])


def test_damaged_checkpoints(refused, espalier, stopped, recipe_file, finished):
    newest, older = (stopped / f"checkpoint-{step}" for step in list_steps(stopped))
    spoil(newest / "model.safetensors")
    kept = shutil.copytree(older, stopped.parent / "kept")
    spoil(older / "trainer" / "optimizer.safetensors")
    err = refused(5)
    assert "model.safetensors: sha256 differs" in err and "optimizer.safetensors: sha256 differs" in err
    assert newest.exists() and older.exists(), "what is damaged is the user's to delete"

    shutil.rmtree(older)
    kept.rename(older)
    done = espalier("run", recipe_file)
    assert done.code == 0, done.err
    assert f"Ignored {newest.name}/model.safetensors: sha256 differs" in done.out
    assert f"Using {older.name}" in done.out
    assert (stopped / FINAL / "model.safetensors").read_bytes() == (finished / FINAL / "model.safetensors").read_bytes()


def test_damaged_files_of_a_run(refused, stopped):
    for name in (PLAN, STATE, METRICS, LEDGER, RECIPE):
        path = stopped / name
        content = path.read_text()
        path.write_text("{" + content[1:].replace(":", ";", 3))
        assert f"runs/tiny/{name}" in refused(5)
        path.write_text(content)
    assert len(list_steps(stopped)) == 2


@pytest.fixture
def small_disk(tmp_path):
    """Make `runs` a disk of so many bytes; skipped where mounting isn't permitted."""
    runs = tmp_path / "runs"
    runs.mkdir()

    def small_disk(size: int, how: str = "size") -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"{how}={size}", "tmpfs", str(runs)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"mounting isn't permitted: {error}")

    yield small_disk
    with contextlib.suppress(OSError):
        subprocess.run(["umount", str(runs)], capture_output=True, check=False)


def test_a_disk_that_is_full(refused, espalier, recipe_file, small_disk, finished, tmp_path):
    small_disk(1_500_000)
    err = refused(6)
    assert "full disk" in err and "MB" in err
    run = tmp_path / "runs" / "tiny"
    kept = list_steps(run)
    assert kept and all(files.damage(run / f"checkpoint-{step}") is None for step in kept)

    subprocess.run(["mount", "-o", "remount,size=30000000", str(run.parent)], check=True)
    done = espalier("run", recipe_file)
    assert done.code == 0, done.err
    assert f"Resumed at step {kept[0]} " in done.out
    assert (run / FINAL / "model.safetensors").read_bytes() == (finished / FINAL / "model.safetensors").read_bytes()


@pytest.mark.parametrize("file_bytes", [2_000, 60_000, 160_000, 300_000])
def test_a_file_that_cannot_be_written_whole(refused, espalier, recipe_file, finished, tmp_path, file_bytes):
    """As on a disk that fills in the middle of a file: the system cuts every write at so many bytes."""
    refused(6, file_bytes=file_bytes)
    run = tmp_path / "runs" / "tiny"
    assert all(files.damage(run / f"checkpoint-{step}") is None for step in list_steps(run))
    done = espalier("run", recipe_file)
    assert done.code == 0, done.err
    assert (run / FINAL / "model.safetensors").read_bytes() == (finished / FINAL / "model.safetensors").read_bytes()


@pytest.mark.parametrize("runs", ["/sys/runs", "/etc/hostname/runs", "x" * 300], ids=["no", "file", "long"])
def test_a_folder_that_cannot_be_written(espalier, recipe_file, runs):
    done = espalier("run", recipe_file, f"--runs={runs}")
    assert done.code == 6 and labels(done.err) == LABELS, done.err


def test_a_tokenizer_whose_ids_have_gaps_gets_a_row_for_each(espalier, recipe_file, finished, tmp_path):
    folder = Path(shutil.copytree(finished / FINAL, tmp_path / "tokenizer"))
    text = json.loads((folder / "tokenizer.json").read_text())
    added = dict(text["added_tokens"][0], id=310, content="<far>")
    text["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(text))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    largest = max(tokenizer.get_vocab().values())
    done = espalier("run", recipe_file, *SHORT, f"data.tokenizer={folder}")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "runs" / "tiny" / FINAL / "config.json").read_text())
    assert config["vocab_size"] == largest + 1
