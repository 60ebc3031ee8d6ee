"""Files that appear whole or not at all.

Everything is written under a temporary name beside its place, flushed to the disk, then renamed. A folder gets
a manifest of SHA-256 hashes, written last: a folder without one, or one whose files differ from it, is not used.

A folder that takes hours to write is written in `.resumable-NAME` beside its place: `folder` with what is there so
far, `journal.json` with the hashes of the files that are finished, `lock`. A killed writer's successor goes on there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from espalier.errors import DataError, ResourceError, UserError

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
RESUMABLE = ".resumable-"
RETIRED = ".retired-"
UNWRITABLE = {getattr(errno, name) for name in ("EROFS", "EACCES", "EPERM", "EIO", "EEXIST", "ENOTDIR", "ENAMETOOLONG")}


def home() -> Path:
    """Where caches live: $ESPALIER_HOME, else ~/.cache/espalier."""
    return Path(os.environ.get("ESPALIER_HOME") or Path.home() / ".cache" / "espalier")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """Hex digest of a JSON-able value: equal values give equal digests, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    write_bytes(path, text.encode())


def read_text(path: Path, *, expected: str, mend: str) -> str:
    """A user's file as text, in UTF-8; `DataError` when it can't be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "bytes that aren't UTF-8"
        raise DataError(str(path), found=found, expected=expected, mend=mend) from None


def cut_torn_line(file: IO[bytes]) -> None:
    """Truncate a file, opened for reading and writing, to its whole lines: a crash may have cut the last one short."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's bytes in one step; after any failure the old file or the new one is there."""
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    with disk_errors(path, len(content)):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: object) -> None:
    write_text(path, _json(value))


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where there is none; their names are on the disk when this returns."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextlib.contextmanager
def whole_folder(
    path: Path, *, need_bytes: int = 0, known: Mapping[str, dict[str, Any]] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder that takes `path`'s place, with a manifest, when the block ends well.

    An existing folder at `path` is replaced only then. `need_bytes` is checked against the free space first. Files with
    a `known` entry of the manifest aren't read for it.
    """
    partial = new_folder(path, need_bytes=need_bytes)
    with disk_errors(path, need_bytes):
        try:
            yield partial
            put_in_place(path, partial, known)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def new_folder(path: Path, *, need_bytes: int = 0) -> Path:
    """An empty folder beside `path`, to be filled and put in its place; `ResourceError` if the disk is too full."""
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    with disk_errors(path, need_bytes):
        make_folder(path.parent)
        require_space(path.parent, need_bytes)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    return partial


@dataclass(frozen=True)
class Journal:
    """The finished files of a folder that is being written, kept on the disk for the next process.

    folder    where the files are written
    finished  {name below `folder`: its "sha256" and "bytes"}
    """

    path: Path
    key: str
    folder: Path
    finished: dict[str, dict[str, Any]]

    @classmethod
    def take_up(cls, place: Path, key: str) -> Journal:
        """The journal in `place`, of those files that are still there as they were finished; empty for another key."""
        path, folder = place / "journal.json", place / "folder"
        try:
            stored = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            stored = {"key": None}
        recorded = stored["files"] if stored["key"] == key else {}
        return cls(path, key, folder, {name: entry for name, entry in recorded.items() if _is(folder / name, entry)})

    @property
    def bytes(self) -> int:
        """Of the finished files together."""
        return sum(entry["bytes"] for entry in self.finished.values())

    def add(self, name: str, sha256: str) -> None:
        """Record that the file `name`, whose bytes have this hash, is finished: from now on it must not change."""
        sync(self.folder / name)
        sync((self.folder / name).parent)
        self.finished[name] = _entry(self.folder / name, sha256)
        write_json(self.path, {"key": self.key, "files": self.finished})

    def clear(self) -> None:
        """Delete all files but the finished ones, and the journal and the folder if nothing is left in them."""
        for entry in sorted(self.folder.rglob("*"), reverse=True):
            if entry.is_file() and str(entry.relative_to(self.folder)) not in self.finished:
                entry.unlink()
            elif entry.is_dir() and not any(entry.iterdir()):
                entry.rmdir()
        remove_partials(self.path.parent)
        if not self.finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def resumable_folder(path: Path, key: str, *, need_bytes: int = 0) -> Iterator[Journal]:
    """Like `whole_folder`, but what a failed or killed block had finished waits for the next call with the same key.

    Yields the journal: write into its `folder`, `add` each file that took long, and don't write again what it says
    is `finished`. `key` names all that the files depend on; another key starts anew. `need_bytes` is of the whole
    folder. Raises ResourceError while another process writes there.
    """
    place = path.with_name(f"{RESUMABLE}{path.name}")
    with disk_errors(path, need_bytes):
        make_folder(place)
        with _only_writer(path, place):
            journal = Journal.take_up(place, key)
            try:
                journal.clear()
                require_space(place, need_bytes - journal.bytes)
                journal.folder.mkdir(exist_ok=True)
                yield journal
                put_in_place(path, journal.folder, journal.finished)
                journal.path.unlink(missing_ok=True)
            except BaseException:
                journal.clear()
                raise


def remove_partials(folder: Path) -> list[str]:
    """Delete what interrupted writers left in `folder`; the names of what was removed.

    A folder that was about to be replaced, and whose successor isn't there, gets its name back. Resumable folders
    stay: they wait for the next call, or another process is writing them.
    """
    for retired in folder.glob(f"{RETIRED}*"):
        _restore(folder / retired.name.removeprefix(RETIRED))
        shutil.rmtree(retired, ignore_errors=True)
    left = sorted(entry for entry in folder.glob(f"{PARTIAL}*"))
    for entry in left:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return [entry.name for entry in left]


def write_manifest(folder: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Record size and hash of every file below `folder`, itself left out; files with a `known` entry aren't read."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    names = {str(path.relative_to(folder)): path for path in paths}
    entries = {name: (known or {}).get(name) or _entry(path, sha256(path)) for name, path in names.items()}
    write_json(folder / MANIFEST, {"files": entries})


def damage(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder that should match its manifest, in a line; None when it matches.

    Of several `parts` of its files, by one of which a rank may be satisfied, only one is read.
    """
    try:
        text = (folder / MANIFEST).read_text()
        entries = json.loads(text)["files"].items()
        recorded = [(name, {"bytes": entry["bytes"], "sha256": entry["sha256"]}) for name, entry in entries]
    except FileNotFoundError:
        return f"{folder.name} has no {MANIFEST}: it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder.name}/{MANIFEST} can't be read"
    if text != _json({"files": dict(entries)}):
        return f"{folder.name}/{MANIFEST} isn't as it was written"
    for name, entry in recorded[part::parts]:
        path = folder / name
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{folder.name}/{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"{folder.name}/{name}: sha256 differs from the manifest"
    return None


def recorded(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file by the folder's manifest; {} without one."""
    if not (folder / MANIFEST).exists():
        return {}
    return {name: entry["sha256"] for name, entry in json.loads((folder / MANIFEST).read_text())["files"].items()}


def require_space(folder: Path, need_bytes: int) -> None:
    """Refuse before writing when the disk can't hold `need_bytes` more."""
    free = shutil.disk_usage(folder).free
    if need_bytes > free:
        raise _disk_full(folder, need_bytes, free)


@contextlib.contextmanager
def disk_errors(path: Path, need_bytes: int = 0) -> Iterator[None]:
    """Turn the system's disk errors inside the block into a `ResourceError` about `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _system_error(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            there = next(parent for parent in path.absolute().parents if parent.exists())
            raise _disk_full(path, need_bytes, shutil.disk_usage(there).free) from error
        if number is not None and number in UNWRITABLE:
            raise ResourceError(
                str(path),
                found=f"the system said: {os.strerror(number)}",
                expected="a folder that can be written",
                mend="Choose another place with runs=FOLDER or ESPALIER_HOME, or mend the disk.",
            ) from error
        raise


def _system_error(error: Exception) -> int | None:
    """The errno of an OSError, or of what a library written in Rust says of one: "File too large (os error 27)"."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"\(os error ([0-9]+)\)", str(error))
    return int(said[1]) if said else None


def _disk_full(path: Path, need_bytes: int, free: int) -> ResourceError:
    need = f"at least {need_bytes / 1e6:,.1f} MB" if need_bytes else "more space than is left"
    return ResourceError(
        str(path),
        found=f"a full disk ({free / 1e6:,.1f} MB free)",
        expected=need,
        mend="Free some space and run it again; what was saved before is kept.",
    )


def written(path: Path, sha256: str) -> dict[str, Any]:
    """What a manifest records of a file that is complete and has this hash; it is on the disk when this returns."""
    sync(path)
    return _entry(path, sha256)


def _entry(path: Path, sha256: str) -> dict[str, Any]:
    return {"sha256": sha256, "bytes": path.stat().st_size}


def _is(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is the one that was recorded."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


@contextlib.contextmanager
def _only_writer(path: Path, place: Path) -> Iterator[None]:
    """Hold the lock in `place`, which is gone afterwards if nothing else is in it."""
    lock = place / "lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have been deleted by a holder who finished between our two calls.
            held = lock.stat().st_ino == os.fstat(file.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise ResourceError(
                str(path),
                found="another process that is writing it",
                expected="one writer",
                mend="Wait for it, or stop it and run this again; what it has finished is kept.",
            )
        try:
            yield
        finally:
            lock.unlink()
            with contextlib.suppress(OSError):
                place.rmdir()


def put_in_place(path: Path, new: Path, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Give a folder that is complete its manifest, flush it to the disk and rename it to `path`."""
    write_manifest(new, known)  # the last file: its write flushes the names in `new`
    for entry in new.rglob("*"):
        sync(entry)
    _replace_folder(path, new)


def _replace_folder(path: Path, new: Path) -> None:
    """Rename `new` to `path`. A folder can't be renamed over another, so the old one steps aside first."""
    retired = _retired(path)
    try:
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)
            path.rename(retired)
        new.rename(path)
    except BaseException:
        _restore(path)
        raise
    sync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _restore(path: Path) -> None:
    """Give a folder that stepped aside its name back, unless its successor has it."""
    if _retired(path).exists() and not path.exists():
        _retired(path).rename(path)


def _retired(path: Path) -> Path:
    return path.with_name(f"{RETIRED}{path.name}")


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
