"""The writers: all that puts files on a disk which a later process relies on, each with a way to tell what is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from espalier import files, records
from espalier.data.pack import CARD, Tokens
from espalier.data.prepare import DataRecipe, corpus
from espalier.errors import UserError
from espalier.folder import ModelFolder
from espalier.grow import apply, operators
from espalier.ledger import Cost, Entry, Ledger, read
from espalier.model import build
from espalier.model.axes import discover
from espalier.model.mup import Parametrization
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import FINAL, METRICS, RECIPE, RESULTS, Run
from espalier.train import checkpoint
from espalier.train.device import Device
from faults.small import Small, save, silent, state_of


@dataclass(frozen=True)
class Writer:
    """Something that writes below a folder.

    before   puts there what is there beforehand
    write    is swept; done again after a fault, it must come to the same end as without one
    outcome  what a user of it sees, JSON-able; an exception means damage
    between  whether outcomes other than those before and after are fine, as outcome alone says
    """

    name: str
    before: Callable[[Path], object]
    write: Callable[[Path], object]
    outcome: Callable[[Path], Any]
    between: bool = False


def nothing(place: Path) -> None:
    """What is there before a first write."""


def writers(small: Small) -> list[Writer]:
    """Every writer, on the small run's things."""
    parent = small.run / FINAL
    steps = sorted(checkpoint.list_steps(small.run))
    model, moments, _ = checkpoint.load(small.run / f"checkpoint-{steps[-1]}", Device())
    keep = partial(save, model=model, moments=moments, need_bytes=1)

    def checkpoints(place: Path) -> None:
        for step in (3, 5):
            keep(place, progress=checkpoint.Progress(step=step))

    def export(place: Path) -> None:
        with files.whole_folder(place / FINAL, need_bytes=1) as folder:
            build.save(model, folder, parent)
            files.write_text(folder / "README.md", "a model\n")

    def grow(place: Path) -> None:
        shape = discover(json.loads((parent / "config.json").read_text())).shape
        growths = operators.plan_growth(shape, shape.changed(num_hidden_layers=6), depth="stack", width="zero_pad")
        std_of = Parametrization().std_of(growths[-1].after)
        opened = ModelFolder.open(parent)
        apply.grow_folder(
            opened, place / "grown", growths, seed=5, std_of=std_of, finish=nothing, tell=silent, shard_bytes=60_000
        )

    discover(json.loads((parent / "config.json").read_text()))  # once for all forks
    data = DataRecipe.model_validate(small.recipe()["data"])
    return [
        Writer(
            "a file that is replaced (write_bytes)",
            lambda place: files.write_text(place / "x.json", "old"),
            lambda place: files.write_text(place / "x.json", "new"),
            lambda place: (place / "x.json").read_text(),
        ),
        Writer("a new folder (whole_folder)", nothing, lambda place: _folder(place / "x", "new"), _folder_outcome),
        Writer(
            "a folder that is replaced (whole_folder)",
            lambda place: _folder(place / "x", "old"),
            lambda place: _folder(place / "x", "new"),
            _folder_outcome,
        ),
        Writer("a folder in parts (resumable_folder)", nothing, _parts, _folder_outcome),
        Writer("the ledger (add)", lambda place: _spend(place, 3), lambda place: _spend(place, 4), _spent),
        Writer("metrics (rewind, append)", lambda place: _log(place, 3), lambda place: _log(place, 4), _logged),
        Writer("a run (start, charge, finish)", nothing, _begin_and_end, _status, between=True),
        Writer(
            "a checkpoint (save, prune)",
            checkpoints,
            lambda place: keep(place, progress=checkpoint.Progress(step=7)) and None,
            _checkpoints,
        ),
        Writer("the export (final/)", nothing, export, lambda place: _whole(place / FINAL)),
        Writer("growth from folder to folder", nothing, grow, lambda place: _whole(place / "grown")),
        Writer("a report (results.json)", _results(1.0), _results(2.0), lambda place: (place / RESULTS).read_text()),
        Writer(
            "the data cache (dataset, tokenizer, shards)",
            nothing,
            lambda place: corpus(data, home=place, tell=silent) and None,
            _cache,
            between=True,
        ),
    ]


def _folder(path: Path, text: str) -> None:
    with files.whole_folder(path, need_bytes=10) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "a").write_text(text)
        files.write_text(folder / "b", text)


def _parts(place: Path) -> None:
    with files.resumable_folder(place / "x", "key", need_bytes=10) as journal:
        for name in ("a", "b", "c"):
            if name not in journal.finished:
                (journal.folder / name).write_text(name)
                journal.add(name, files.sha256(journal.folder / name))


def _folder_outcome(place: Path) -> Any:
    """The folder's hashes; a reader waits for its name, which a killed replacement may have left to the next start."""
    files.remove_partials(place)
    return _whole(place / "x")


def _whole(path: Path) -> Any:
    """The hashes of a folder that matches its manifest; None where there is none."""
    if not path.exists():
        return None
    damage = files.damage(path)
    assert damage is None, damage
    return sorted(files.recorded(path).items())


def _spend(place: Path, entries: int) -> None:
    """As a run does it, which says what the disk said."""
    ledger = Ledger(place / "ledger.jsonl")
    while len(ledger.entries) < entries:
        with files.disk_errors(place):
            ledger.add(Entry("train", Cost(tokens=1.0 + len(ledger.entries))))


def _spent(place: Path) -> Any:
    return [entry.cost.tokens for entry in read(place / "ledger.jsonl")]


def _log(place: Path, steps: int) -> None:
    with Run.start(place / "run", Recipe(), tell=silent) as run:
        run.rewind_metrics(3, stage=0)
        for step in range(len(list(records.read_lines(run.folder / METRICS))) + 1, steps + 1):
            run.log_metrics(step=step, stage=0, loss=1.0)


def _logged(place: Path) -> Any:
    return [line["step"] for line in records.read_lines(place / "run" / METRICS)]


def _begin_and_end(place: Path) -> None:
    with Run.start(place / "run", Recipe(), tell=silent) as run:
        run.charge("start")
        run.finish("finished")


def _status(place: Path) -> Any:
    """A begun run's ledger can be read, and its status is one that a run may have."""
    read(place / "run" / "ledger.jsonl")
    status = records.read(place / "run" / "state.json", {"status": "running"})["status"]
    assert status in ("running", "finished", "failed"), status
    return status, (place / "run" / RECIPE).exists()


def _checkpoints(place: Path) -> Any:
    """The two newest whole ones, bit for bit; the newest must load."""
    newest = checkpoint.newest(place, silent)
    assert newest is not None, "no checkpoint"
    checkpoint.load(newest, Device())
    whole = [step for step in checkpoint.list_steps(place) if files.damage(place / f"checkpoint-{step}") is None]
    return [[step, state_of(place / f"checkpoint-{step}")] for step in whole[:2]]


def _results(value: float) -> Callable[[Path], None]:
    def save(place: Path) -> None:
        report = Report("x", context={})
        report.add("held-out", "loss", value, n=1)
        report.save(place / RESULTS)

    return save


def _cache(place: Path) -> Any:
    """Hashes of all that is finished; whatever has a name there is whole, and shards are as their card says."""
    found = {}
    for path in sorted(path for kind in ("data", "tokenizers") for path in (place / kind).glob("[!.]*")):
        found[str(path.relative_to(place))] = _whole(path)
    for path in sorted((place / "tokens").glob("[!.]*")):
        try:
            tokens = Tokens.open(path)
        except UserError:
            continue  # unfinished, and known to be
        assert all(map(tokens.is_whole, tokens.shards)), path
        found[path.name] = (path / CARD).read_text()
    return found
