"""Power loss: the recorded calls of a writer, replayed with what wasn't flushed dropped, torn or kept (FAULTS F3).

The model of the disk is stricter than a journalling file system: a file's bytes are safe once the file was flushed, its
name once its folder was. What isn't safe survives in any prefix, file by file and folder by folder. What a writer found
when it began is safe.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from faults import calls
from faults.calls import Call
from faults.sheet import Row
from faults.small import Setting, fresh
from faults.writers import Writer, writers

REPLAYS = 2  # of each call, besides the one that drops all that isn't safe


@dataclass(eq=False)
class File:
    """A file: its bytes now, and those that are safe."""

    now: bytes = b""
    safe: bytes = b""

    def survives(self, dice: random.Random | None) -> bytes:
        """The safe bytes, or torn ones: the new bytes up to some place behind what both have in common."""
        if dice is None or dice.random() < 0.5 or self.now == self.safe:
            return self.safe
        return self.now[: dice.randint(_in_common(self.now, self.safe), len(self.now))]


@dataclass(eq=False)
class Folder:
    """A folder: its entries now, those that are safe, and each version in between."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    safe: dict[str, File | Folder] = field(default_factory=dict)
    versions: list[dict[str, File | Folder]] = field(default_factory=list)

    def change(self, name: str, entry: File | Folder | None) -> None:
        entries = dict(self.now)
        entries.pop(name, None)
        self.now = entries if entry is None else {**entries, name: entry}
        self.versions.append(self.now)

    def flush(self) -> None:
        self.safe, self.versions = self.now, []

    def write(self, path: Path, dice: random.Random | None) -> None:
        """Put what survives below `path`."""
        path.mkdir(parents=True)
        entries = self.safe if dice is None else dice.choice([self.safe, *self.versions])
        for name, entry in entries.items():
            if isinstance(entry, Folder):
                entry.write(path / name, dice)
            else:
                (path / name).write_bytes(entry.survives(dice))

    def is_safe(self) -> bool:
        """Whether everything in it would survive as it is."""
        return self.now == self.safe and all(
            entry.is_safe() if isinstance(entry, Folder) else entry.now == entry.safe for entry in self.now.values()
        )


class Disk:
    """The tree below a folder, changed call by call."""

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, _read(place)
        self.early: list[str] = []  # renames of what wasn't safe

    def apply(self, call: Call) -> None:
        """Do what a call did."""
        found = self._find(call.path)
        if found is None or call.name in ("close", "chmod", "utime"):
            return
        folder, name = found
        entry = folder.now.get(name) if name else self.root
        if call.name == "open" and not isinstance(entry, Folder):
            if entry is None:
                folder.change(name, File())
            elif call.flags & 0o1000:
                entry.now = b""
        elif call.name == "mkdir" and entry is None:
            folder.change(name, Folder())
        elif call.name == "unlink" or (isinstance(entry, Folder) and call.name == "rmdir" and not entry.now):
            folder.change(name, None)
        elif call.name == "rename" and entry is not None:
            self._rename(call, folder, name, entry)
        elif call.name == "fsync" and isinstance(entry, Folder):
            entry.flush()
        elif isinstance(entry, File):
            self._change(call, entry)

    def _rename(self, call: Call, folder: Folder, name: str, entry: File | Folder) -> None:
        found = self._find(call.other)
        assert found is not None, call
        target, new = found
        safe = entry.is_safe() if isinstance(entry, Folder) else entry.now == entry.safe
        hidden = any(part.startswith(".") for part in Path(call.other).relative_to(self.place).parts)
        if not safe and not hidden:
            self.early.append(call.other)
        entries = {key: value for key, value in folder.now.items() if key != name}
        if target is folder:  # one step: neither name nor both
            folder.now = {**entries, new: entry}
            folder.versions.append(folder.now)
        else:
            folder.change(name, None)
            target.change(new, entry)

    def _change(self, call: Call, file: File) -> None:
        if call.name == "fsync":
            file.safe = file.now
        elif call.name == "truncate":
            file.now = file.now[: call.offset].ljust(call.offset, b"\0")
        elif call.name == "write" and call.data:
            begun = file.now[: call.offset].ljust(call.offset, b"\0")
            file.now = begun + call.data + file.now[call.offset + len(call.data) :]

    def _find(self, path: str) -> tuple[Folder, str] | None:
        """The folder of a path and its last name, "" for the place itself; None if there's no such folder: a call that
        failed, as the first of those that make a folder and its parents."""
        parts = Path(path).relative_to(self.place).parts
        folder = self.root
        for part in parts[:-1]:
            below = folder.now.get(part)
            if not isinstance(below, Folder):
                return None
            folder = below
        return folder, parts[-1] if parts else ""


def power_loss(setting: Setting) -> list[Row]:
    """Cut the power after every call of every writer; what is there then must be the old state or the new one."""
    replays, possible, early, wrong, unlike, unsafe = 0, 0, [], [], [], []
    kinds = writers(setting.small)
    for writer in kinds:
        prepared = setting.folder("prepared")
        writer.before(prepared)
        before = writer.outcome(prepared)
        calm = fresh(prepared, setting.place / "calm")
        whole = calls.watch(partial(writer.write, calm), calm)
        after = writer.outcome(calm)
        fresh(prepared, setting.place / "start")
        disk = Disk(calm)
        disk.root = _read(setting.place / "start")
        possible += len(whole.calls)
        dice, chosen = setting.dice(writer.name), set(setting.some(range(len(whole.calls))))
        for number, call in enumerate(whole.calls):
            disk.apply(call)
            for again in range(1 + REPLAYS if number in chosen else 0):
                replays += 1
                said = _replayed(setting, disk, writer, before, after, dice if again else None)
                wrong += [
                    f"{writer.name}, after call {number + 1} ({call.name} {Path(call.path).name}): {said}"
                ] * bool(said)
        early += disk.early
        if _replayed(setting, disk, writer, after, after, None) or not _is(writer, setting.place / "replayed", after):
            unsafe.append(writer.name)
        if _contents(disk.root) != _contents(_read(calm)):
            unlike.append(writer.name)
    tried = f"power loss after file calls of {len(kinds)} writers: {replays} replays"
    return [
        Row(
            "F3",
            tried,
            f"{len(wrong)} bad replays",
            "0",
            not wrong,
            "; ".join(wrong[:3]),
            trials=replays,
            of=(1 + REPLAYS) * possible,
        ),
        Row(
            "F3",
            "renames of what wasn't flushed",
            str(len(early)),
            "0",
            not early,
            "; ".join(sorted(set(early))[:3]),
            trials=len(kinds),
            of=len(kinds),
        ),
        Row(
            "F3",
            "writers whose work isn't safe when they return",
            str(len(unsafe)),
            "0",
            not unsafe,
            "; ".join(unsafe),
            trials=len(kinds),
            of=len(kinds),
        ),
        Row(
            "F3",
            "writers whose recorded calls, replayed, come to other bytes than they wrote",
            str(len(unlike)),
            "0",
            not unlike,
            ", ".join(unlike),
            trials=len(kinds),
            of=len(kinds),
        ),
    ]


def _replayed(
    setting: Setting, disk: Disk, writer: Writer, before: object, after: object, dice: random.Random | None
) -> str:
    """What is wrong with what survives now; "" if nothing is."""
    place = setting.place / "replayed"
    shutil.rmtree(place, ignore_errors=True)
    disk.root.write(place, dice)
    try:
        outcome = writer.outcome(place)
    except Exception as error:
        return f"damaged: {error}"[:200]
    return "" if writer.between or outcome in (before, after) else f"another state ({outcome})"[:200]


def _is(writer: Writer, place: Path, outcome: object) -> bool:
    """Whether what is there is just this."""
    return bool(writer.outcome(place) == outcome)


def _read(place: Path) -> Folder:
    """The tree below a folder, all of it safe."""
    entries: dict[str, File | Folder] = {}
    for path in sorted(place.iterdir()):
        content = b"" if path.is_dir() else path.read_bytes()
        entries[path.name] = _read(path) if path.is_dir() else File(content, content)
    return Folder(entries, entries)


def _contents(folder: Folder) -> dict[str, object]:
    """Names and bytes as they are now."""
    return {
        name: _contents(entry) if isinstance(entry, Folder) else entry.now for name, entry in sorted(folder.now.items())
    }


def _in_common(one: bytes, other: bytes) -> int:
    """How many bytes both begin with."""
    return next(
        (n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
