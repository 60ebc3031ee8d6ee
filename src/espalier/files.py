"""Files that appear whole or not at all.

Everything is written under a temporary name beside its place, flushed to the disk, then renamed. A folder gets
a manifest of SHA-256 hashes, written last: a folder without one, or one whose files differ from it, is not used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from espalier.errors import ResourceError, UserError

MANIFEST = "manifest.json"
PARTIAL = ".partial-"
RETIRED = ".retired-"


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
            _sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def whole_folder(path: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder that takes `path`'s place, with a manifest, when the block ends well.

    An existing folder at `path` is replaced only then. `need_bytes` is checked against the free space first.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}")
    with disk_errors(path, need_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path.parent, need_bytes)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            write_manifest(partial)
            for entry in partial.rglob("*"):
                _sync(entry)
            _sync(partial)
            _replace_folder(path, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_partials(folder: Path) -> list[str]:
    """Delete what interrupted writers left in `folder`; the names of what was removed.

    A folder that was about to be replaced, and whose successor isn't there, gets its name back.
    """
    for retired in folder.glob(f"{RETIRED}*"):
        _restore(folder / retired.name.removeprefix(RETIRED))
        shutil.rmtree(retired, ignore_errors=True)
    left = sorted(entry for entry in folder.glob(f"{PARTIAL}*"))
    for entry in left:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return [entry.name for entry in left]


def write_manifest(folder: Path) -> None:
    """Record size and hash of every file below `folder`, itself left out."""
    files = {
        str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files})


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that should match its manifest, in a line; None when it matches."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"].items()
        recorded = [(name, {"bytes": entry["bytes"], "sha256": entry["sha256"]}) for name, entry in entries]
    except FileNotFoundError:
        return f"{folder.name} has no {MANIFEST}: it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder.name}/{MANIFEST} can't be read"
    for name, entry in recorded:
        path = folder / name
        if not path.is_file():
            return f"{folder.name}/{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{folder.name}/{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
        if sha256(path) != entry["sha256"]:
            return f"{folder.name}/{name}: sha256 differs from the manifest"
    return None


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
        if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.ENAMETOOLONG):
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
    _sync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _restore(path: Path) -> None:
    """Give a folder that stepped aside its name back, unless its successor has it."""
    if _retired(path).exists() and not path.exists():
        _retired(path).rename(path)


def _retired(path: Path) -> Path:
    return path.with_name(f"{RETIRED}{path.name}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
