"""Pack: the tokens of a split, computed once, in memory-mapped shards.

A shard is a raw little-endian array of whole documents, each followed by the end-of-sequence token. `tokens.json`
lists the finished shards with their hashes and is written anew after each, so an interrupted job goes on from there.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from espalier import files, records
from espalier.data import tokenizer as tokenizers
from espalier.dataset import Dataset
from espalier.errors import DataError

CARD = "tokens.json"
SHARD_TOKENS = 8_000_000
# Bytes of text that are encoded at once: enough documents for every core, about 110 bytes of memory for each.
BATCH_BYTES = 1_000_000


@dataclass(frozen=True)
class Shard:
    """One file of tokens; `bytes` are those of the documents' text in UTF-8."""

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Tokens:
    """A split's tokens as one long array, over shards on disk that are opened when first read."""

    path: Path
    dtype: str
    eos_id: int
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @classmethod
    def open(cls, path: Path) -> Tokens:
        """Open what `tokenize` wrote; what is unfinished or unreadable is refused."""
        tokens = _read_card(path)
        if tokens is None or not tokens.complete:
            raise DataError(
                str(path),
                found="tokens that were never finished" if tokens else f"no readable {CARD}",
                expected="the tokens of a split",
                mend="Tokenise the split again; what is finished is kept.",
            )
        return tokens

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of the text that the tokens stand for."""
        return sum(shard.bytes for shard in self.shards)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), of the type they have on disk."""
        assert 0 <= start <= start + count <= len(self), f"tokens {start} to {start + count} of {len(self)}"
        pieces = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while count:
            first = start - (int(self._ends[index]) - self.shards[index].tokens)
            piece = self._read(index, first, min(count, self.shards[index].tokens - first))
            pieces.append(piece)
            start, count, index = start + len(piece), count - len(piece), index + 1
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def is_whole(self, shard: Shard) -> bool:
        """Whether a shard's file has the bytes that were written."""
        path = self.path / shard.name
        return path.is_file() and files.sha256(path) == shard.sha256

    def save(self) -> None:
        card = {
            "tokens": len(self),
            "documents": self.documents,
            "bytes": self.bytes,
            "dtype": self.dtype,
            "eos_id": self.eos_id,
            "complete": self.complete,
            "shards": [asdict(shard) for shard in self.shards],
        }
        records.write(self.path / CARD, card)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.tokens for shard in self.shards])

    @cached_property
    def _descriptors(self) -> dict[int, int]:
        return {}

    def _read(self, index: int, first: int, count: int) -> np.ndarray:
        """Tokens of a shard. Read, not mapped: a page fault on a silent disk would stop all threads, and on a bad one
        end the process.
        """
        shard = self.shards[index]
        if index not in self._descriptors:
            self._descriptors[index] = os.open(self.path / shard.name, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptors[index])
        size = np.dtype(self.dtype).itemsize
        read = os.pread(self._descriptors[index], count * size, first * size)
        if len(read) < count * size:
            raise DataError(
                str(self.path / shard.name),
                found="a shard that is missing or has changed since it was written",
                expected=f"sha256 {shard.sha256}",
                mend="Restore it, or delete the folder to have the split tokenised again.",
            )
        return np.frombuffer(read, self.dtype)


def tokenize(dataset: Dataset, split: str, tokenizer_path: Path, *, home: Path, tell: Callable[[str], None]) -> Tokens:
    """The tokens of a split, from `home`/tokens as far as they are there and whole, else computed.

    Text that looks like a special token is encoded as the text it is, so a document can't end another.
    """
    tokenizer = tokenizers.load(tokenizer_path)
    tokenizer.encode_special_tokens = True
    eos_id = tokenizers.eos_id(tokenizer_path)
    key = files.digest([dataset.fingerprint(), tokenizers.fingerprint(tokenizer_path), eos_id, split])[:16]
    path = home / "tokens" / key
    dtype = "<u2" if len(tokenizers.byte_lengths(tokenizer)) <= 65535 else "<u4"
    tokens = _kept(path, tell) or Tokens(path, dtype, eos_id)
    if tokens.complete:
        return tokens
    with files.disk_errors(path):
        files.make_folder(path)
    tell(f"Tokenising {split}: {(dataset.bytes[split] - tokens.bytes) / 1e6:,.1f} MB of text.")
    texts = itertools.islice(dataset.texts(split), tokens.documents, None)
    for ids, documents, size in _encode(texts, tokenizer, eos_id, dtype):
        name = f"shard-{len(tokens.shards):05d}.bin"
        files.write_bytes(path / name, ids.tobytes())
        shard = Shard(name, len(ids), documents, size, files.sha256(path / name))
        tokens = replace(tokens, shards=(*tokens.shards, shard))
        tokens.save()
    tokens = replace(tokens, complete=True)
    tokens.save()
    tell(f"{split}: {len(tokens):,} tokens of {tokens.bytes / max(1, len(tokens)):.2f} bytes.")
    return tokens


def _kept(path: Path, tell: Callable[[str], None]) -> Tokens | None:
    """The tokens in a folder up to the first shard that isn't as it was written; None when nothing is there."""
    if not path.exists():
        return None
    tokens = _read_card(path)
    if tokens is None:
        tell(f"{path.name}/{CARD} can't be read; tokenising from the start.")
        return None
    whole = tuple(itertools.takewhile(tokens.is_whole, tokens.shards))
    if len(whole) < len(tokens.shards):
        tell(f"{path.name}/{tokens.shards[len(whole)].name} isn't as it was written; tokenising from there.")
        return replace(tokens, shards=whole, complete=False)
    return tokens


def _read_card(path: Path) -> Tokens | None:
    """What the card says; None if it isn't as it was written."""
    try:
        card = records.parse((path / CARD).read_text(encoding="utf-8"), CARD)
        shards = tuple(Shard(**shard) for shard in card["shards"])
        return Tokens(path, card["dtype"], card["eos_id"], shards, card["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _encode(
    texts: Iterable[str], tokenizer: Tokenizer, eos_id: int, dtype: str
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(tokens, documents, bytes of text) of shard after shard.

    Shards end where batches do: a job that goes on after one makes the same shards as one that never stopped.
    """
    parts: list[np.ndarray] = []
    tokens = size = 0
    for batch in _batches(texts):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, eos_id], dtype))
            tokens += len(parts[-1])
        size += sum(len(text.encode()) for text in batch)
        if tokens >= SHARD_TOKENS:
            yield np.concatenate(parts), len(parts), size
            parts, tokens, size = [], 0, 0
    if parts:
        yield np.concatenate(parts), len(parts), size


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
