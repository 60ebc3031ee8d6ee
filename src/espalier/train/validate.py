"""Held-out loss, in nats a token and in bits a byte (comparable between vocabularies)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedModel

from espalier.data.stream import Stream
from espalier.train.device import Device
from espalier.train.loop import Objective


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
) -> HeldOut:
    """The loss over `rows` rows spread over a stream, always the same ones. byte_lengths: bytes of each token id."""
    chosen = stream.spread(rows)
    losses, labels, text_bytes = [], [], []
    with device.evaluation(), device.autocast():
        for begin in range(0, len(chosen), micro_rows):
            batch = stream.take(chosen[begin : begin + micro_rows])
            inputs, targets, positions = device.tensors(batch)
            losses.append(float(objective(model, inputs, targets, positions).detach()))
            kept = batch.labels[batch.labels >= 0]
            labels.append(kept.size)
            text_bytes.append(int(byte_lengths[kept].sum()))
    bpb = sum(losses) / math.log(2) / max(sum(text_bytes), 1)
    error = _standard_error(losses, labels)
    batches = tuple(zip(losses, labels, text_bytes, strict=True))
    return HeldOut(sum(losses) / sum(labels), bpb, sum(labels), error, batches)


def _standard_error(losses: list[float], labels: list[int]) -> float:
    """Of sum(losses) / sum(labels), from batches that need not be of one size: the linearised error of a ratio."""
    batches = len(losses)
    if batches < 2:
        return 0.0
    residuals = np.array(losses) - sum(losses) / sum(labels) * np.array(labels)
    return math.sqrt(batches / (batches - 1) * float(residuals @ residuals)) / sum(labels)
