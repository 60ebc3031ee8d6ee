"""Mutations of what is on the disk: each must be found before it is used; what is whole must pass (F8, F9)."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from espalier import files, recipe
from espalier.data.pack import Tokens
from espalier.dataset import Dataset
from espalier.errors import UserError
from espalier.folder import ModelFolder
from espalier.ledger import read
from espalier.report import Report
from espalier.run import FINAL, LEDGER, METRICS, PLAN, RECIPE, RESULTS, STATE, read_json, read_lines
from faults.calls import End
from faults.sheet import Row
from faults.small import Setting, fresh

MUTATIONS = 500
KINDS = ("flip", "cut", "extend", "swap", "delete", "empty", "rename")


@dataclass(frozen=True)
class Kept:
    """Something on the disk and how it is opened; opening raises a UserError, or gives a line, about damage."""

    name: str
    path: Path
    open: Callable[[Path], object]
    hashed: bool = True


def mutations(setting: Setting) -> list[Row]:
    """Mutate one file, open what it belongs to, put it back."""
    dice, all_kept = setting.dice("mutations"), _copies(setting)
    found, missed, tried = (
        0,
        [],
        max(len(all_kept) * 2, round(MUTATIONS * min(1.0, 10 * setting.share))),
    )  # cheap: a tenth of the rest has all
    plain_tried, plain_found = 0, 0
    for number in range(tried):
        kept = all_kept[number % len(all_kept)]
        said = _mutated(setting, kept, dice)
        plain_tried += not kept.hashed
        plain_found += not kept.hashed and said is None
        found += said is None
        missed += [said] if said else []
    hashed = tried - plain_tried
    of_hashed = found - plain_found
    unhashed = [said for said in missed if said.startswith("run folder")]
    others = [said for said in missed if not said.startswith("run folder")]
    why = "a run's own JSON carries no hash: what still parses after a mutation is taken as written"
    return [
        Row(
            "G4",
            f"mutations of checkpoints, model folders and the data cache: {hashed}",
            f"{of_hashed} of {hashed} found before use",
            "all",
            not others,
            "; ".join(others[:3]),
            trials=hashed,
            of=round(MUTATIONS * hashed / tried),
        ),
        Row(
            "G4",
            f"mutations of a run folder's recipe, plan, ledger, metrics, state and results: {plain_tried}",
            f"{plain_found} of {plain_tried} found before use",
            "all",
            not unhashed,
            why if unhashed else "",
            trials=plain_tried,
            of=round(MUTATIONS * plain_tried / tried),
        ),
        _clean(setting, all_kept),
    ]


def _copies(setting: Setting) -> list[Kept]:
    """Copies of the small run's things, and how each is opened."""
    run = fresh(setting.small.run, setting.place / "run")
    home = fresh(setting.small.place / "home", setting.place / "home")
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    data, vocabulary = next((home / "data").glob("[!.]*")), next((home / "tokenizers").glob("[!.]*"))
    plain: dict[str, Callable[[Path], object]] = {
        RECIPE: recipe.stored,
        PLAN: lambda path: read_json(_there(path), None),
        LEDGER: lambda path: read(_there(path)),
        METRICS: lambda path: list(read_lines(_there(path))),
        STATE: lambda path: read_json(_there(path), None),
        RESULTS: lambda path: Report.load(_there(path)),
    }
    return [
        Kept("checkpoint", newest, files.damage),
        Kept("model folder", run / FINAL, lambda path: ModelFolder.open(path) and None),
        Kept("dataset", data, lambda path: Dataset.open(path) and None),
        Kept("tokenizer", vocabulary, files.damage),
        *(
            Kept("tokens", path, lambda path: Tokens.open(path).verify())
            for path in sorted((home / "tokens").glob("[!.]*"))
        ),
        *(Kept(f"run folder: {name}", run / name, partial(_read, work), hashed=False) for name, work in plain.items()),
    ]


def _there(path: Path) -> Path:
    """A file that isn't there is missed at once, or empty: the run has no other way to know."""
    if not path.exists() or not path.read_bytes().strip():
        raise FileNotFoundError(path)
    return path


def _read(work: Callable[[Path], object], path: Path) -> None:
    """Read a file of which only a refusal counts."""
    work(path)


def _mutated(setting: Setting, kept: Kept, dice: random.Random) -> str | None:
    """None if a mutation was found, else what was missed. The file is put back."""
    paths = sorted(path for path in kept.path.rglob("*") if path.is_file()) if kept.path.is_dir() else [kept.path]
    path, kind = dice.choice(paths), dice.choice(KINDS)
    content, saved = path.read_bytes(), path.with_name("saved-aside")
    others = [other for other in paths if other.read_bytes() != content]
    if (kind == "swap" and not others) or (kind in ("flip", "cut", "empty") and not content):
        kind = "extend"
    shutil.copy2(path, setting.place / saved.name)
    try:
        _mutate(path, content, kind, dice, others)
        told = _opened(setting, kept)
    finally:
        (path.parent / f"{path.name}.renamed").unlink(missing_ok=True)
        shutil.move(setting.place / saved.name, path)
    return None if told else f"{kept.name}, {path.name}, {kind}: not found"


def _mutate(path: Path, content: bytes, kind: str, dice: random.Random, others: list[Path]) -> None:
    if kind == "flip":
        place = dice.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :])
    elif kind == "cut":
        path.write_bytes(content[: dice.randrange(len(content))])
    elif kind == "extend":
        path.write_bytes(content + dice.randbytes(dice.randint(1, 64)))
    elif kind == "swap":
        path.write_bytes(dice.choice(others).read_bytes())
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    else:
        path.rename(path.with_name(f"{path.name}.renamed"))


def _opened(setting: Setting, kept: Kept) -> str | None:
    """What opening says of damage; an error that is no refusal is a miss."""
    try:
        said = kept.open(kept.path)
    except UserError as error:
        setting.seen(End(error={"kind": type(error).__name__, **dict(error.lines())}))
        return str(error)
    except FileNotFoundError as error:
        return str(error)
    return str(said) if said else None


def _clean(setting: Setting, all_kept: list[Kept]) -> Row:
    """Whole things with other times, and as copies under another name, must pass."""
    blamed = [f"{kept.name}: {said}" for kept in all_kept for said in _blamed(setting, kept)]
    tried = f"clean files: {len(all_kept)} kinds, touched and copied"
    of = len(all_kept)
    return Row("G4", tried, f"{len(blamed)} blamed", "0", not blamed, "; ".join(blamed[:3]), trials=of, of=of)


def _blamed(setting: Setting, kept: Kept) -> Iterator[str]:
    for path in [kept.path, *kept.path.rglob("*")]:
        os.utime(path, (1, 1))
    copied = setting.folder("copied") / kept.path.name
    (shutil.copytree if kept.path.is_dir() else shutil.copy)(kept.path, copied)
    for place in (kept.path, copied):
        if said := _opened(setting, Kept(kept.name, place, kept.open)):
            yield said
