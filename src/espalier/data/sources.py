"""Sources: where documents come from, and how each kind is read.

A source is the standard library, a local file or folder, or a dataset on the Hugging Face Hub. A document that isn't
text goes to quarantine and is counted; a source that can't be read at all is refused. Archives aren't unpacked: where
their members would land, and how large they become, is theirs to say.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import re
import sysconfig
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from espalier.dataset import CARD, Dataset
from espalier.errors import DataError
from espalier.recipe import Recipe
from espalier.untrusted import MAX_ROW_BYTES, json_object, lines

STDLIB = "stdlib"
HUB = "hub:"
HUB_NAME = r"[\w.-]+/[\w.-]+"

_KNOWN = """
.txt .text .md .markdown .rst .org .adoc .tex .html .htm .xml .yaml .yml .toml .ini .cfg
.py .pyi .pyx .js .mjs .jsx .ts .tsx .css .scss .vue .java .kt .scala .groovy .c .h .cc .cpp .cxx .hpp .cu .cs .fs .go
.rs .swift .m .mm .rb .php .pl .pm .lua .r .jl .hs .ml .clj .ex .exs .erl .el .lisp .scm .sh .bash .zsh .ps1 .bat .sql
.proto .graphql .cmake .gradle .tf .asm .s .f90 .f .pas .dart .zig .nim .v .sv .vhd
"""
TEXT_SUFFIXES = frozenset(_KNOWN.split())
_PACKED = ".tar .tgz .tbz2 .txz .zip .gz .bz2 .xz .zst .lz4 .br .7z .rar"
ARCHIVES = frozenset(_PACKED.split())
UNPACK = "Unpack archives yourself, into an empty folder: tar -xf FILE -C FOLDER, unzip FILE -d FOLDER, zstd -d FILE."
# What a Hub dataset may be read by: those readers of `datasets` that only take rows from the files of its repository.
HUB_READERS = frozenset({"parquet", "json", "csv", "text"})
NOT_CORPUS = frozenset({"__pycache__", "node_modules"})
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})

# How the parts of a split's name are spelled in file names; other words stand for themselves.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}

# A longer document is quarantined: tokenising takes about 110 bytes of memory for each of its bytes.
MAX_DOCUMENT_BYTES = MAX_ROW_BYTES
TOO_LONG = f"longer than {MAX_DOCUMENT_BYTES // 2**20} MiB"
# Rows in memory at a time, where it isn't known how long each is.
HELD_BYTES = 16 * MAX_DOCUMENT_BYTES
ARCHIVE = "archive, not unpacked"
ARROW_FILE = b"ARROW1"  # how one begins
BadFiles = Literal["refuse", "quarantine"]


@dataclass(frozen=True)
class Document:
    """A text and where it came from: a file, or a file and the number of its row (lines from 1, rows from 0)."""

    text: str
    origin: str


@dataclass
class Quarantine:
    """What couldn't be read as text: how many by reason, and the first hundred by origin.

    bad_files  whether a file of rows that breaks off is refused, or its rest put aside as so many rows
    """

    bad_files: BadFiles = "refuse"
    counts: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, str]] = field(default_factory=list)

    def add(self, origin: str, reason: str, *, rows: int = 1, told: str = "") -> None:
        self.counts[reason] += rows
        if len(self.first) < 100:
            self.first.append((origin, told or reason))

    def add_rest(self, origin: str, reason: str, error: Exception, *, read: int, stated: int | None) -> None:
        """Put aside what follows row number `read` of a file that states so many, if it still says how many.

        `DataError` unless bad files may be put aside.
        """
        lost = "of an unknown number" if stated is None else f"of {stated:,}; {stated - read:,} are lost"
        told = f"{reason} ({_first_line(error)}): {read:,} rows could be read {lost}"
        if self.bad_files == "refuse":
            raise DataError(
                origin,
                found=told,
                expected="a whole file",
                mend="Restore the file or remove it, or go on without its rest with bad_files=quarantine.",
            ) from error
        self.add(origin, reason, rows=1 if stated is None else max(stated - read, 1), told=told)


class Source(Recipe):
    """One place that documents come from; a plain string in a recipe is its `path`."""

    path: str = Field(min_length=1, description="stdlib, a file, a folder, or hub:OWNER/NAME")
    column: str = Field(default="text", description="the column of rows that holds the text")
    split: str = Field(default="train", description="the split of a dataset")
    subset: str | None = Field(default=None, description="the configuration of a Hub dataset that has several")
    pattern: str | None = Field(default=None, description="the files of a folder, such as **/*.md")
    licence: str = "unknown"

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, given: Any) -> Any:
        if not isinstance(given, str | os.PathLike):
            return given
        path = os.fspath(given)
        if path == STDLIB:
            return {"path": path, "licence": "PSF-2.0"}
        if not path.startswith(HUB):
            return {"path": path}
        name, colon, split = path.removeprefix(HUB).partition(":")
        return {"path": HUB + name} | ({"split": split} if colon else {})

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.path.startswith(HUB) and not re.fullmatch(HUB_NAME, self.path.removeprefix(HUB)):
            raise ValueError(f"{self.path!r} where hub:OWNER/NAME or hub:OWNER/NAME:split was expected")
        if self.pattern is not None and not _can_match(self.pattern):
            raise ValueError(f"pattern {self.pattern!r} where one below the folder, such as **/*.md, was expected")
        return self


def _can_match(pattern: str) -> bool:
    parts = PurePath(pattern).parts
    return (
        bool(parts) and not PurePath(pattern).is_absolute() and all("**" not in part or part == "**" for part in parts)
    )


def read(source: Source, quarantine: Quarantine) -> Iterator[Document]:
    """The documents of a source, in an order that depends only on names.

    A file of text or code is one document; .jsonl, .json (a JSON object a line), .parquet and .arrow are rows.
    Raises `DataError` for a source that isn't there, is an archive or has no such column.
    """
    if source.path.startswith(HUB):
        yield from _read_hub(source, quarantine)
    for origin, path in local_files(source).items():
        if path.suffix.lower() in ARCHIVES:
            quarantine.add(origin, ARCHIVE)
            continue
        reader = READERS.get(path.suffix.lower(), _read_text)
        try:
            yield from reader(path, origin, source, quarantine)
        except OSError as error:
            quarantine.add(origin, f"unreadable: {error.strerror or 'damaged'}")


def local_files(source: Source) -> dict[str, Path]:
    """The files that a source is read from, by origin, in reading order; none for a Hub dataset.

    Of a folder: the files that `pattern` matches, else those with a known suffix, archives among them. Names that
    start with a dot are left out, and links to folders aren't followed: name what they point to as a source of its own.
    """
    if source.path.startswith(HUB):
        return {}
    if source.path == STDLIB:
        return _standard_library()
    path = _located(source.path)
    if path.is_file():
        if path.suffix.lower() in ARCHIVES:
            raise DataError(
                source.path, found="an archive", expected="a file of text or rows, or a folder", mend=UNPACK
            )
        return {path.name: path}
    if (path / CARD).is_file():
        dataset = Dataset.open(path)
        found = [dataset.split_file(split) for split in dataset.rows]
    else:
        found = _matching(path, source.pattern)
    if not found:
        raise DataError(
            source.path,
            found=f"no file that matches {source.pattern}" if source.pattern else "no file of text, code or rows",
            expected="a folder with a corpus",
            mend="Name another folder, or say which files with pattern: '**/*.SUFFIX'.",
        )
    root = path.resolve().name
    return {f"{root}/{file.relative_to(path).as_posix()}": file for file in _of_split(found, source, path)}


def _standard_library() -> dict[str, Path]:
    """The interpreter's own library sources, tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    return {f"{STDLIB}/{name}": root / name for name in names if NOT_STDLIB.isdisjoint(name.split("/"))}


def _located(name: str) -> Path:
    path = Path(name).expanduser()
    if os.access(path, os.R_OK) and (path.is_file() or path.is_dir()):
        return path
    siblings = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*siblings, STDLIB], n=1)
    if path.exists():
        mend = "Check its permissions, and that it is a file or folder."
    elif near:
        mend = f"Did you mean {near[0] if near[0] == STDLIB else path.parent / near[0]}?"
    elif re.fullmatch(HUB_NAME, name):
        mend = f"For a dataset on the Hugging Face Hub write {HUB}{name}."
    else:
        mend = "Check the path; it is taken from the folder that you are in."
    raise DataError(
        name,
        found="something that can't be read" if path.exists() else "nothing there",
        expected=f"{STDLIB}, a file, a folder, or {HUB}OWNER/NAME",
        mend=mend,
    )


def _matching(folder: Path, pattern: str | None) -> list[Path]:
    # Path.glob doesn't descend into links, so no loop of them can catch it.
    files = {file for file in folder.glob(pattern or "**/*") if _is_corpus(file.relative_to(folder)) and file.is_file()}
    if pattern is None:
        files = {file for file in files if file.suffix.lower() in TEXT_SUFFIXES | ARCHIVES or _has_rows(file)}
    return sorted(files, key=Path.as_posix)


def _is_corpus(relative: Path) -> bool:
    return not any(part.startswith(".") or part in NOT_CORPUS for part in relative.parts)


def _has_rows(file: Path) -> bool:
    # cache-*.arrow are intermediate results that `datasets` leaves beside a saved dataset.
    return file.suffix.lower() in (".jsonl", ".parquet", ".arrow") and not file.name.startswith("cache-")


def _of_split(found: list[Path], source: Source, root: Path) -> list[Path]:
    """All files but the rows of other splits. A file that names no split belongs to train, as on the Hub."""

    def splits(file: Path) -> set[str]:
        words = re.split(r"[^a-z0-9]+", file.relative_to(root).as_posix().lower())
        return {SPLIT_WORDS.get(word, word) for word in words}

    def chosen(file: Path) -> bool:
        named = splits(file)
        return source.split in named or (source.split == "train" and named.isdisjoint(SPLIT_WORDS.values()))

    kept = [file for file in found if not _has_rows(file) or chosen(file)]
    if found and not kept:
        raise DataError(
            f"{source.path}: split",
            found=f"no file of split {source.split!r} among {', '.join(file.name for file in found[:5])}",
            expected="files with the split in their names, such as train-00000.parquet",
            mend="Set split: NAME to one that is there, or name a file.",
        )
    return kept


def _read_text(path: Path, origin: str, source: Source, quarantine: Quarantine) -> Iterator[Document]:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        quarantine.add(origin, TOO_LONG)
    else:
        yield from _checked(path.read_bytes().removeprefix(BOM_UTF8), origin, quarantine)


def _read_json_lines(path: Path, origin: str, source: Source, quarantine: Quarantine) -> Iterator[Document]:
    column_seen = False
    for place, line in _lines(path, origin, quarantine):
        try:
            row = json_object(line)
        except UnicodeDecodeError as error:
            quarantine.add(*_not_utf8(place, error))
            continue
        except ValueError as reason:
            quarantine.add(place, str(reason))
            continue
        if not column_seen:
            _require_column(place, source.column, row)
            column_seen = True
        yield from _checked(row.get(source.column), place, quarantine)


def _lines(path: Path, origin: str, quarantine: Quarantine) -> Iterator[tuple[str, bytearray]]:
    """(place, line) of a file's lines that aren't empty."""
    number = 0
    try:
        for number, line in enumerate(lines(path, MAX_DOCUMENT_BYTES), start=1):
            if line is None:
                quarantine.add(f"{origin}:{number}", TOO_LONG)
            elif not line.isspace():
                yield f"{origin}:{number}", line
    except OSError as error:
        quarantine.add_rest(origin, "unreadable file", error, read=number, stated=None)


def _read_parquet(path: Path, origin: str, source: Source, quarantine: Quarantine) -> Iterator[Document]:
    from pyarrow import ArrowException, parquet

    numbers, stated = itertools.count(), None
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            _require_column(origin, source.column, file.schema_arrow.names)
            stated = file.metadata.num_rows
            groups = range(file.metadata.num_row_groups)
            batches = itertools.chain.from_iterable(_read_group(file, group, origin, source) for group in groups)
            yield from _read_batches(batches, numbers, origin, source, quarantine)
    except (ArrowException, OSError) as error:
        quarantine.add_rest(origin, "damaged Parquet", error, read=next(numbers), stated=stated)


def _read_group(file: Any, group: int, origin: str, source: Source) -> Iterator[Any]:
    """A row group of a Parquet file in batches that may not become much larger than HELD_BYTES.

    A few bytes of the file can stand for gigabytes of text: every row may be the same long word of a dictionary.
    """
    stated = file.metadata.row_group(group)
    if not stated.num_rows:
        return
    columns = (stated.column(number) for number in range(stated.num_columns))
    size = sum(one.total_uncompressed_size for one in columns if one.path_in_schema.split(".")[0] == source.column)
    if size > MAX_DOCUMENT_BYTES * stated.num_rows:
        raise DataError(
            f"{origin}: {source.column}",
            found=f"{stated.num_rows} rows of {size} bytes together",
            expected=f"rows of at most {MAX_DOCUMENT_BYTES // 2**20} MiB",
            mend="Cut the texts, or set the source's column to one that holds documents.",
        )
    yield from file.iter_batches(_rows_at_once(size), row_groups=[group], columns=[source.column])


def _read_arrow(path: Path, origin: str, source: Source, quarantine: Quarantine) -> Iterator[Document]:
    """Rows of an Arrow stream, as `Dataset.save_to_disk` writes them, or of an Arrow file, also called Feather."""
    import pyarrow

    numbers = itertools.count()
    try:
        with pyarrow.memory_map(str(path)) as file, _arrow_batches(file) as (schema, batches):
            _require_column(origin, source.column, schema.names)
            yield from _read_batches(batches, numbers, origin, source, quarantine)
    except (pyarrow.ArrowException, OSError) as error:
        quarantine.add_rest(origin, "damaged Arrow", error, read=next(numbers), stated=None)


@contextlib.contextmanager
def _arrow_batches(file: Any) -> Iterator[tuple[Any, Iterable[Any]]]:
    """(schema, batches) of an Arrow stream or file."""
    from pyarrow import ipc

    if file.read(len(ARROW_FILE)) == ARROW_FILE:
        with ipc.open_file(file) as arrow:
            yield arrow.schema, (arrow.get_batch(number) for number in range(arrow.num_record_batches))
    else:
        file.seek(0)
        with ipc.open_stream(file) as stream:
            yield stream.schema, stream


def _read_batches(
    batches: Iterable[Any], numbers: Iterator[int], origin: str, source: Source, quarantine: Quarantine
) -> Iterator[Document]:
    for batch in batches:
        column = _as_bytes(batch.column(source.column), f"{origin}: {source.column}")
        for part in _parts(column):
            for value in part.to_pylist():
                yield from _checked(value, f"{origin}:{next(numbers)}", quarantine)


def _as_bytes(column: Any, where: str) -> Any:
    """A column of text as one of bytes, whose offsets are known to lie in its data; `DataError` for another column."""
    import pyarrow

    binary = pyarrow.large_binary()
    try:
        if pyarrow.types.is_dictionary(column.type):
            column = pyarrow.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(binary), safe=False)
        else:
            column = column.cast(binary)
    except pyarrow.ArrowException:
        raise DataError(
            where,
            found=f"a column of {column.type}",
            expected="a column of text",
            mend="Set the source's column to one that holds text.",
        ) from None
    column.validate(full=True)
    return column


def _parts(column: Any) -> Iterator[Any]:
    """A column, a few rows at a time."""
    rows = _rows_at_once(column.nbytes)
    return (column.slice(start, rows) for start in range(0, len(column), rows))


def _rows_at_once(size: int) -> int:
    """How many rows of a column of `size` bytes may be decoded together, if each held all that the column has."""
    return min(max(HELD_BYTES // max(size, 1), 1), 256)


def _read_hub(source: Source, quarantine: Quarantine) -> Iterator[Document]:
    import datasets

    name = source.path.removeprefix(HUB)
    try:
        builder = datasets.load_dataset_builder(name, source.subset)
        _require_plain_hub(source, builder)
        rows = builder.as_streaming_dataset(split=source.split)
        for number, row in enumerate(rows):
            _require_column(source.path, source.column, row)
            yield from _checked(row[source.column], f"{source.path}:{number}", quarantine)
    except (OSError, ValueError) as error:
        raise DataError(
            source.path,
            found=str(error).split("\n", 1)[0],
            expected=f"a dataset of the Hugging Face Hub with a split {source.split!r}",
            mend="Check the name, subset and split, and that this machine reaches the Hub.",
        ) from error


def _require_plain_hub(source: Source, builder: Any) -> None:
    """Refuse a Hub dataset whose card has files read from elsewhere, such as this machine, or in an unsafe way."""
    reader = type(builder).__module__.split(".")[-1]
    own = f"hf://datasets/{source.path.removeprefix(HUB)}@"
    listed = [file for files in (builder.config.data_files or {}).values() for file in files]
    away = [file for file in listed if not file.startswith(own)]
    if reader not in HUB_READERS or away:
        raise DataError(
            source.path,
            found=f"the file {away[0]}" if away else f"rows that only the reader {reader!r} of `datasets` takes",
            expected=f"{', '.join(sorted(HUB_READERS))} files in the dataset's own repository",
            mend="Download its files, look at them, and name the folder.",
        )


def _checked(value: object, origin: str, quarantine: Quarantine) -> Iterator[Document]:
    """The document that a value makes, if it makes one."""
    if not isinstance(value, str | bytes):
        quarantine.add(origin, "no text")
        return
    try:
        # A string can hold lone surrogates, which are no more text than broken bytes are.
        size = len(value.encode() if isinstance(value, str) else value)
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeError as error:
        quarantine.add(*_not_utf8(origin, error))
        return
    if size > MAX_DOCUMENT_BYTES:
        quarantine.add(origin, TOO_LONG)
        return
    yield Document(text, origin)


def _first_line(error: Exception) -> str:
    """What a library says, in a line."""
    return (str(error) or type(error).__name__).split("\n", 1)[0][:200]


def _not_utf8(place: str, error: UnicodeError) -> tuple[str, str]:
    """Where in a document its bytes are no text, from 0, and that they are none."""
    return f"{place} byte {error.start}" if isinstance(error, UnicodeDecodeError) else place, "not UTF-8"


def _require_column(where: str, column: str, columns: Iterable[str]) -> None:
    names = list(columns)
    if column in names:
        return
    near = difflib.get_close_matches(column, names, n=1)
    raise DataError(
        where,
        found=f"the columns {', '.join(names) or '(none)'}",
        expected=f"a column {column!r}",
        mend=f"Set the source's column, as in column: {near[0] if near else 'NAME'}.",
    )


READERS: dict[str, Callable[[Path, str, Source, Quarantine], Iterator[Document]]] = {
    ".json": _read_json_lines,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
