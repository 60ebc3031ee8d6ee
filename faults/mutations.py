"""Mutations of what is on the disk: each must be found before it is used; what is whole must pass (F8, F9)."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from espalier import files, records
from espalier.data.origin import RECORD
from espalier.data.pack import CARD
from espalier.data.prepare import DataRecipe, corpus
from espalier.dataset import Dataset
from espalier.errors import UserError
from espalier.folder import ModelFolder
from espalier.run import FINAL, LEDGER, METRICS, PLAN, RECIPE, RESULTS, STATE, require_whole, status
from espalier.story import Story
from faults.calls import End
from faults.sheet import Row
from faults.small import Setting, fresh, of_damage

MUTATIONS = 500
MODEL, RUN = "model folder", "run folder"
RECORDS = (RECIPE, PLAN, LEDGER, METRICS, STATE, RESULTS, RECORD)
KINDS = ("flip", "cut", "extend", "swap", "delete", "empty", "rename")


@dataclass(frozen=True)
class Kept:
    """A folder on the disk and how it is opened; opening raises a UserError, or gives a line, about damage.

    names  of the files that are mutated, as a pattern below the folder
    """

    name: str
    path: Path
    open: Callable[[Path], object]
    names: str = "**/*"

    def files(self) -> list[Path]:
        return sorted(path for path in self.path.glob(self.names) if path.is_file())


def mutations(setting: Setting) -> list[Row]:
    """Mutate one file, open what it belongs to, put it back."""
    dice, all_kept = setting.dice("mutations"), _copies(setting)
    # Cheap: a tenth of the rest has all of them.
    tried = max(len(all_kept) * 2, round(MUTATIONS * min(1.0, 10 * setting.share)))
    said = [
        (all_kept[number % len(all_kept)], _mutated(setting, all_kept[number % len(all_kept)], dice))
        for number in range(tried)
    ]
    return [
        _row(
            "checkpoints, model folders and the data cache",
            [miss for kept, miss in said if kept.name != RUN],
            tried / MUTATIONS,
            f"a model folder without its {files.MANIFEST} is anyone's, and taken as it is",
        ),
        _row("a run folder's records", [miss for kept, miss in said if kept.name == RUN], tried / MUTATIONS),
        _clean(setting, all_kept),
    ]


def _row(what: str, said: list[str | None], share: float, why: str = "") -> Row:
    missed, of = [miss for miss in said if miss], round(len(said) / share)
    figure = f"{len(said) - len(missed)} of {len(said)} found before use"
    why = "; ".join(missed[:3]) or why
    return Row("G4", f"mutations of {what}: {len(said)}", figure, "all", not missed, why, trials=len(said), of=of)


def _copies(setting: Setting) -> list[Kept]:
    """Copies of the small run's things, and how each is opened."""
    run = fresh(setting.small.run, setting.place / "run")
    home = fresh(setting.small.place / "home", setting.place / "home")
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    data, vocabulary = next((home / "data").glob("[!.]*")), next((home / "tokenizers").glob("[!.]*"))
    stated = DataRecipe.model_validate(setting.small.recipe()["data"])

    def taken(home: Path) -> str:
        """What is said when a run takes its tokens from the cache: of those that were damaged, which are made again."""
        told: list[str] = []
        corpus(stated, home=home, tell=told.append)
        return "; ".join(of_damage(told))

    return [
        Kept("checkpoint", newest, files.damage),
        Kept(MODEL, run / FINAL, lambda path: ModelFolder.open(path) and None),
        Kept("dataset", data, lambda path: Dataset.open(path) and None),
        Kept("tokenizer", vocabulary, files.damage),
        *(Kept("tokens", home, taken, f"tokens/[!.]*/{name}") for name in ("shard-*.bin", CARD)),
        *(Kept(RUN, run, _open_run, name) for name in RECORDS),
    ]


def _open_run(path: Path) -> str | None:
    """Read all of a run as its page does; the status of one that has lost its end."""
    require_whole(path)
    Story(path)
    records.read(path / RECORD, None)
    return None if status(path) == "finished" else status(path)


def _mutated(setting: Setting, kept: Kept, dice: random.Random) -> str | None:
    """None if a mutation was found, else what was missed. The file is put back."""
    paths = kept.files()
    path, kind = dice.choice(paths), dice.choice(KINDS)
    if kept.name == MODEL and path.name == files.MANIFEST and kind in ("delete", "rename"):
        kind = "flip"  # a model folder without a manifest is anyone's, and taken as it is
    content, saved = path.read_bytes(), path.with_name("saved-aside")
    others = [other for other in sorted(kept.path.rglob("*")) if other.is_file() and other.read_bytes() != content]
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
    copied = fresh(kept.path, setting.place / "copied" / kept.path.name)
    for place in (kept.path, copied):
        if said := _opened(setting, Kept(kept.name, place, kept.open)):
            yield said
