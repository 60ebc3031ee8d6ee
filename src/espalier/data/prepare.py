"""Prepare: from sources to a dataset of distinct documents, parted into what is trained on and what is held out.

A dataset is made once: its folder is named by the recipe and by the names, sizes and times of the local files.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ByteSize, Field, field_validator

from espalier import __version__, files
from espalier.data.ops.dedup import text_hash, unique
from espalier.data.sources import ARCHIVE, STDLIB, UNPACK, BadFiles, Document, Quarantine, Source, local_files, read
from espalier.dataset import Dataset
from espalier.errors import DataError
from espalier.method import method
from espalier.recipe import Recipe, Safe
from espalier.run import Run

if TYPE_CHECKING:
    from espalier.data.pack import Tokens

TRAIN, VALIDATION = "train", "validation"
QUARANTINE = "quarantine.jsonl"
WRITE_BYTES = 4 * 2**20


class DataRecipe(Recipe):
    """What to train on, and how it is cut into tokens and rows."""

    sources: tuple[Source, ...] = Field(default=(Source.model_validate(STDLIB),), min_length=1)
    held_out: float = Field(default=0.02, gt=0, lt=1, description="share of the documents kept for validation")
    bad_rows: Safe[float] = Field(
        default=0.01, ge=0, le=1, description="share of the rows that may be put aside; with more, the text is refused"
    )
    bad_files: Safe[BadFiles] = Field(
        default="refuse", description="what becomes of the rest of a file of rows in which reading breaks off"
    )
    max_bytes: ByteSize | None = Field(default=None, description="at most so much text, as in 12MB")
    sequence_length: int = Field(default=256, ge=2, description="tokens in a row")
    attend: Literal["row", "document"] = Field(
        default="row", description="how far back a token sees: its row, or its own document within the row"
    )
    vocab_size: int = Field(default=4096, ge=257, description="of the tokenizer that is trained")
    tokenizer: str | None = Field(default=None, description="a tokenizer or model folder to use instead")

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_many(cls, given: Any) -> Any:
        return given if isinstance(given, list | tuple) else [given]


@dataclass(frozen=True)
class Corpus:
    """A dataset with its tokenizer's folder and the tokens of both splits."""

    dataset: Dataset
    tokenizer: Path
    train: Tokens
    validation: Tokens


@method(costs="one pass over the text; disk for its compressed copy and 2 bytes a token (4 above 65535 ids)")
def prepare_data(recipe: DataRecipe, run: Run) -> Dataset:
    """Read, deduplicate and split the sources, train the tokenizer, and tokenise both splits.

    Everything lands in the cache, where training finds it.
    """
    return corpus(recipe, home=files.home(), tell=run.tell).dataset


def corpus(recipe: DataRecipe, *, home: Path, tell: Callable[[str], None]) -> Corpus:
    """All that training needs of a recipe's text, from `home` as far as it was made before."""
    from espalier.data import pack, tokenizer

    dataset = prepare(recipe, home=home, tell=tell)
    chosen = tokenizer.choose(recipe.tokenizer, dataset, recipe.vocab_size, home=home, tell=tell)
    train, validation = (pack.tokenize(dataset, split, chosen, home=home, tell=tell) for split in (TRAIN, VALIDATION))
    return Corpus(dataset, chosen, train, validation)


def prepare(recipe: DataRecipe, *, home: Path, tell: Callable[[str], None]) -> Dataset:
    """The dataset of a recipe, with splits train and validation and columns text and origin.

    Found in `home`/data when it was made before; a damaged copy is made again. `dropped` counts what was left out:
    empty and duplicate documents, and by reason what couldn't be read (the first hundred are in quarantine.jsonl).
    Raises `DataError` when a source isn't there or breaks off, more than `bad_rows` couldn't be read, or a split would
    be empty.
    """
    path = home / "data" / _key(recipe)
    if path.exists():
        try:
            return Dataset.open(path)
        except DataError as error:
            tell(f"The cached dataset is damaged ({error.found}); making it again.")
    tell(f"Reading {', '.join(source.path for source in recipe.sources)}.")
    with files.whole_folder(path) as folder:
        dataset = _write(recipe, path, folder, tell)
        dataset.save_card(folder)
    left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(dataset.dropped.items()))
    tell(
        f"{dataset.rows[TRAIN]} documents to train on ({dataset.bytes[TRAIN] / 1e6:,.1f} MB), "
        f"{dataset.rows[VALIDATION]} held out ({dataset.bytes[VALIDATION] / 1e6:,.1f} MB); "
        f"left out: {left_out or 'none'}."
    )
    return dataset


def split_of(text: str, held_out: float) -> str:
    """The split of a document, from its text alone: whatever else is in the corpus, it stays there."""
    return VALIDATION if int.from_bytes(text_hash(text)[:8], "big") < held_out * 2**64 else TRAIN


def _key(recipe: DataRecipe) -> str:
    listing = []
    for source in recipe.sources:
        for origin, path in local_files(source).items():
            status = path.stat()
            listing.append([origin, str(path.resolve()), status.st_size, status.st_mtime_ns])
    told = recipe.model_dump(mode="json", include={"sources", "held_out", "bad_rows", "bad_files", "max_bytes"})
    return files.digest([__version__, told, listing])[:16]


def _write(recipe: DataRecipe, path: Path, folder: Path, tell: Callable[[str], None]) -> Dataset:
    """Stream the kept documents into `folder`, which will be `path`."""
    quarantine, dropped, good = Quarantine(recipe.bad_files), Counter[str](), Counter[str]()
    read_all = (document for source in recipe.sources for document in _counted(read(source, quarantine), good))
    kept = _at_most(recipe.max_bytes, unique(_not_empty(read_all, dropped), dropped))
    with _Split(folder / f"{TRAIN}.parquet") as train, _Split(folder / f"{VALIDATION}.parquet") as validation:
        for document in kept:
            split = validation if split_of(document.text, recipe.held_out) == VALIDATION else train
            split.add(document)
    rows = good.total() + quarantine.counts.total()
    _require_few_bad(recipe, quarantine, rows)
    if quarantine.first:
        told = f"{quarantine.counts.total():,} of {rows:,} rows quarantined in {path / QUARANTINE}"
        tell(f"{': '.join(quarantine.first[0])}; {told}.")
    dropped += quarantine.counts
    if not train.rows or not validation.rows:
        raise _too_little(recipe, train.rows, validation.rows, dropped)
    lines = [json.dumps({"origin": origin, "reason": reason}) + "\n" for origin, reason in quarantine.first]
    files.write_text(folder / QUARANTINE, "".join(lines))
    return Dataset(
        path=path,
        kind="text",
        rows={TRAIN: train.rows, VALIDATION: validation.rows},
        bytes={TRAIN: train.bytes, VALIDATION: validation.bytes},
        dropped=dict(dropped),
        licence=", ".join(sorted({source.licence for source in recipe.sources})),
        parents=tuple(source.path for source in recipe.sources),
    )


def _counted(documents: Iterable[Document], counts: Counter[str]) -> Iterator[Document]:
    for document in documents:
        counts["read"] += 1
        yield document


def _not_empty(documents: Iterable[Document], dropped: Counter[str]) -> Iterator[Document]:
    for document in documents:
        if document.text.strip():
            yield document
        else:
            dropped["empty"] += 1


def _at_most(max_bytes: int | None, documents: Iterable[Document]) -> Iterator[Document]:
    """The documents up to the first with which their text would be more than `max_bytes`."""
    total = 0
    for document in documents:
        total += len(document.text.encode())
        if max_bytes is not None and total > max_bytes:
            return
        yield document


class _Split:
    """Writes one split's Parquet file, a few megabytes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self.bytes = 0
        self._waiting: list[Document] = []
        self._waiting_bytes = 0

    def __enter__(self) -> Self:
        import pyarrow
        from pyarrow import parquet

        self._schema = pyarrow.schema([("text", pyarrow.string()), ("origin", pyarrow.string())])
        self._file = self.path.open("wb")  # not Arrow's own: its errors at the end don't say what the disk said
        self._writer = parquet.ParquetWriter(self._file, self._schema, compression="zstd")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._flush()
            self._writer.close()

    def add(self, document: Document) -> None:
        size = len(document.text.encode())
        self.rows += 1
        self.bytes += size
        self._waiting.append(document)
        self._waiting_bytes += size
        if self._waiting_bytes >= WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        columns = {
            "text": [document.text for document in self._waiting],
            "origin": [document.origin for document in self._waiting],
        }
        self._writer.write_table(pyarrow.table(columns, schema=self._schema))
        self._waiting, self._waiting_bytes = [], 0


def _require_few_bad(recipe: DataRecipe, quarantine: Quarantine, rows: int) -> None:
    """Refuse a text of which more couldn't be read than its recipe allows."""
    bad = quarantine.counts.total()
    if bad / max(rows, 1) <= recipe.bad_rows:
        return
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(quarantine.counts.items()))
    places = ", ".join(origin for origin, _ in quarantine.first[:5])
    mend = f"Mend or remove them, or allow more with bad_rows={math.ceil(1e4 * bad / rows) / 1e4:g}."
    raise DataError(
        quarantine.first[0][0],
        found=f"{bad:,} of {rows:,} rows that can't be read ({reasons}), the first at {places}",
        expected=f"at most {recipe.bad_rows:.4g} of them",
        mend=mend + (f" {UNPACK}" if quarantine.counts[ARCHIVE] else ""),
    )


def _too_little(recipe: DataRecipe, train: int, validation: int, dropped: Counter[str]) -> DataError:
    left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    if train + validation == 0:
        mend = "Name a source that holds text" + (", or raise max_bytes." if recipe.max_bytes is not None else ".")
    elif validation == 0:
        mend = f"Add documents, or raise held_out (it is {recipe.held_out:g})."
    else:
        mend = f"Add documents, or lower held_out (it is {recipe.held_out:g})."
    return DataError(
        ", ".join(source.path for source in recipe.sources),
        found=f"{train} documents to train on and {validation} held out" + (f"; left out: {left_out}" * bool(left_out)),
        expected="at least one of each; which is which follows from each document's text",
        mend=mend,
    )
