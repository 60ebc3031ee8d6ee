"""Held-out loss, in nats a token and in bits a byte (comparable between vocabularies)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel

from espalier.data.stream import Stream
from espalier.train.device import Device
from espalier.train.loop import Objective
from espalier.train.parallel import ALONE, Parallel, forget, within


@dataclass(frozen=True)
class HeldOut:
    """loss: nats a token; bpb: bits a byte of text; tokens: how many labels; stderr: of the loss.

    batches: nats, labels and bytes of text of each batch
    """

    loss: float
    bpb: float
    tokens: int
    stderr: float
    batches: tuple[tuple[float, int, int], ...] = field(default=(), repr=False)


def validate(
    model: PreTrainedModel,
    stream: Stream,
    byte_lengths: np.ndarray,
    objective: Objective,
    device: Device,
    *,
    rows: int,
    micro_rows: int,
    parallel: Parallel = ALONE,
) -> HeldOut:
    """The loss over `rows` rows spread over a stream, always the same ones, in batches that the ranks take in turn.

    byte_lengths: bytes of each token id
    """
    chosen = stream.spread(rows)
    begins = range(0, len(chosen), micro_rows)
    measured: list[float] = []
    with device.evaluation(), device.autocast():
        for turn in range(0, len(begins), parallel.data_ranks):
            # Ranks pass together: one that has no batch left takes the last once more, for nothing.
            begin = begins[min(turn + parallel.data_rank, len(begins) - 1)]
            batch = stream.take(chosen[begin : begin + micro_rows])
            loss = float(within(model, objective, *device.tensors(batch)).detach())
            kept = batch.labels[batch.labels >= 0]
            measured += [loss, kept.size, int(byte_lengths[kept].sum())]
    forget(model)
    batches = tuple(
        (loss, int(labels), int(text))
        for ranks in zip(*map(_triples, parallel.gathered(*measured)), strict=True)
        for loss, labels, text in ranks
    )[: len(begins)]
    losses, labels, text_bytes = map(list, zip(*batches, strict=True))
    bpb = sum(losses) / math.log(2) / max(sum(text_bytes), 1)
    error = _standard_error(losses, labels)
    return HeldOut(sum(losses) / sum(labels), bpb, sum(labels), error, batches)


def _triples(numbers: list[float]) -> list[tuple[float, ...]]:
    return [tuple(numbers[begin : begin + 3]) for begin in range(0, len(numbers), 3)]


def _standard_error(losses: list[float], labels: list[int]) -> float:
    """Of sum(losses) / sum(labels), from batches that need not be of one size: the linearised error of a ratio."""
    batches = len(losses)
    if batches < 2:
        return 0.0
    residuals = np.array(losses) - sum(losses) / sum(labels) * np.array(labels)
    return math.sqrt(batches / (batches - 1) * float(residuals @ residuals)) / sum(labels)
