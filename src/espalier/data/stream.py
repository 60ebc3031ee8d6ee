"""Stream: rows of tokens in an order that follows from the seed alone, for any batch size and any number of ranks.

A position in the stream is one number, the samples taken so far; nothing else has to be saved to go on.
"""

from __future__ import annotations

import hashlib
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from espalier.data.pack import Tokens
from espalier.errors import DataError, RecipeError

IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, int64 [B, T].

    labels[b, t] is the token after input_ids[b, t], or -100 where it isn't to be predicted; position_ids are None
    when they would only count from 0 along each row.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray | None

    def rows(self, begin: int, end: int) -> Batch:
        """Rows [begin, end) of the batch."""
        positions = None if self.position_ids is None else self.position_ids[begin:end]
        return Batch(self.input_ids[begin:end], self.labels[begin:end], positions)


@dataclass(frozen=True)
class Stream:
    """Rows of `sequence_length` tokens and their successors, shuffled anew each epoch.

    Row r covers tokens [r T, r T + T]; the last token of a row is the first of the next, so each is predicted once.
    The rest of less than a row at the end is left out. With attend="document" positions restart after `eos_id`,
    which is how transformers tells packed documents apart, and the first token of a document isn't predicted.
    """

    tokens: Tokens
    _: KW_ONLY
    sequence_length: int
    seed: int
    attend: Literal["row", "document"]
    eos_id: int

    def __post_init__(self) -> None:
        if self.rows == 0:
            raise DataError(
                str(self.tokens.path),
                found=f"{len(self.tokens)} tokens",
                expected=f"at least {self.sequence_length + 1}, for one row and its successors",
                mend="Add documents, or lower sequence_length; for a split held out, raise held_out.",
            )

    @property
    def rows(self) -> int:
        """Samples in an epoch."""
        return max(0, len(self.tokens) - 1) // self.sequence_length

    def batch(self, start: int, count: int, *, rank: int = 0, ranks: int = 1, together: int = 1) -> Batch:
        """Samples [start, start + count) of the shuffled stream, dealt out to the ranks `together` at a time.

        A sample's number alone fixes its row: sample g is the (g mod rows)-th of epoch g // rows.
        """
        if count % ranks:
            raise RecipeError(
                "batch size",
                found=f"{count} rows over {ranks} ranks",
                expected="the same number of rows on every rank",
                mend=f"Make the batch a multiple of {ranks} rows.",
            )
        return self.take(self.order(start, count)[np.arange(count) // together % ranks == rank])

    def spread(self, count: int) -> np.ndarray:
        """`count` rows at even distances over the split, all of them where there are no more: for evaluation.

        Neighbouring rows come from one document, so the first `count` would stand for a file or two.
        """
        count = min(count, self.rows)
        return np.arange(count) * self.rows // max(count, 1)

    def take(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, as they lie in the split."""
        length = self.sequence_length
        windows = [self.tokens.read(int(row) * length, length + 1) for row in rows]
        tokens = np.array(windows, dtype=np.int64).reshape(len(rows), length + 1)
        input_ids, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        if self.attend == "row":
            return Batch(input_ids, labels, None)
        ends = input_ids == self.eos_id
        labels[ends] = IGNORED
        return Batch(input_ids, labels, _positions(ends))

    def order(self, start: int, count: int) -> np.ndarray:
        """The rows of samples [start, start + count), int64 [count]."""
        samples = np.arange(start, start + count)
        rows = np.empty(count, np.int64)
        for epoch in np.unique(samples // self.rows):
            here = samples // self.rows == epoch
            rows[here] = self._permutation(int(epoch))[samples[here] % self.rows]
        return rows

    def order_fingerprint(self, count: int) -> str:
        """Digest of the rows of the first `count` samples: two streams that agree on it see the same data."""
        return hashlib.sha256(self.order(0, count).astype("<i8").tobytes()).hexdigest()

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._current:
            self._current.clear()  # an epoch's order takes 8 bytes a row
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._current[epoch] = generator.permutation(self.rows)
        return self._current[epoch]

    @cached_property
    def _current(self) -> dict[int, np.ndarray]:
        return {}


def _positions(ends: np.ndarray) -> np.ndarray:
    """Positions [B, T] that count from 0 at the start of each row and after each end of a document."""
    index = np.broadcast_to(np.arange(ends.shape[1]), ends.shape)
    starts = np.zeros_like(index)
    starts[:, 1:] = np.where(ends[:, :-1], index[:, 1:], 0)
    return index - np.maximum.accumulate(starts, axis=1)
