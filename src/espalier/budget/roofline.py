"""Roofline: how long each operator takes at least, and what keeps it from being faster.

An operator that does F FLOPs and moves B bytes takes max(F / peak, B / bandwidth) seconds, and on top of it a fixed
overhead for each of its kernels. F / B is its intensity; where it is below peak / bandwidth, the ridge, memory is the
bound (Williams et al., "Roofline", 2009; for language models arXiv 2402.16363). Only relative statements are safe:
no kernel reaches both roofs.

FLOPs are those of `flops.operators`. Bytes are those of kernels that read and write each number once. A product
without weights moves activations and the cache; a mixture's weights count for the experts that a batch really hits.
Work that is divided among devices adds up to the same: so all amounts are those of all devices together, and the
hardware is the row for all of them. Only the hidden state is there whole on every device.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from espalier.budget.flops import Operator, operators, parameters
from espalier.budget.hardware import Hardware
from espalier.spec import ModelSpec

Attention = Literal["eager", "sdpa"]
Bound = Literal["compute", "memory", "link", "overhead"]

# Kernels of one occurrence as transformers runs it op by op; one where nothing is said. Elementwise are rotary
# positions, the cache's concatenations, the activation and the residual sums; softmax is scaled and masked before.
# The embedding comes with the table of rotary positions, which all layers share.
KERNELS = {"embedding": 9, "norms": 12, "final_norm": 6, "softmax": 3, "elementwise": 16, "optimizer": 12}
# How often operators without products read and write the hidden state.
PASSES = {"embedding": 1, "norms": 2, "final_norm": 1}
OPTIMIZER_NUMBERS = 7  # a parameter: weight, gradient and two moments are read, all but the gradient written
MOST_ROWS = 2**24  # a batch beyond any memory


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    batch            rows at a time
    weight_bits      bits of a stored weight; fewer than the activations' save bytes, not FLOPs
    activation_bits  bits of an activation; products run at the float32 peak from 32 on, else at the bfloat16 peak
    cache_bits       bits of a key or value in the cache
    attention        "eager" writes the scores to memory and reads them back, "sdpa" is fused and never does
    devices          how many devices each product is divided among (tensor parallelism)
    """

    batch: int = 1
    weight_bits: int = 16
    activation_bits: int = 16
    cache_bits: int = 16
    attention: Attention = "sdpa"
    devices: int = 1

    @property
    def peak(self) -> Literal["float32", "bfloat16"]:
        return "float32" if self.activation_bits >= 32 else "bfloat16"


@dataclass(frozen=True)
class Row:
    """All occurrences of an operator in a phase: FLOPs, bytes moved, and the seconds that each bound would take."""

    name: str
    flops: float
    weights: float
    activations: float
    cache: float
    seconds_of: dict[Bound, float]

    @property
    def bytes(self) -> float:
        """Moved to and from memory; what devices send to one another isn't in it."""
        return self.weights + self.activations + self.cache

    @property
    def intensity(self) -> float:
        """FLOPs a byte; 0 for what isn't a product."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def seconds(self) -> float:
        *roofs, overhead = self.seconds_of.values()
        return max(roofs) + overhead

    def times(self, factor: float) -> Row:
        """As if it were done `factor` times."""
        return Row(
            self.name,
            flops=factor * self.flops,
            weights=factor * self.weights,
            activations=factor * self.activations,
            cache=factor * self.cache,
            seconds_of={bound: factor * seconds for bound, seconds in self.seconds_of.items()},
        )

    @property
    def bound(self) -> Bound:
        """What takes the longest."""
        return max(self.seconds_of, key=self.seconds_of.__getitem__)


@dataclass(frozen=True)
class Phase:
    """A pass through the model: its operators in order, and their sums."""

    rows: tuple[Row, ...]

    @property
    def flops(self) -> float:
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> float:
        return sum(row.bytes for row in self.rows)

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def bound(self) -> Bound:
        """The bound of the operators that take most of the time."""
        shares: Counter[Bound] = Counter()
        for row in self.rows:
            shares[row.bound] += row.seconds  # type: ignore[assignment]
        return max(shares, key=shares.__getitem__)


@dataclass(frozen=True)
class Roofline:
    """A model on the hardware that it is divided among, run in one way."""

    spec: ModelSpec
    hardware: Hardware  # all devices that the setting names, together: see Hardware.part
    setting: Setting

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on computing is the bound."""
        return self.hardware.peak_flops[self.setting.peak] / self.hardware.memory_bandwidth

    def prefill(self, prompt: int) -> Phase:
        """Reading prompts of `prompt` tokens, with logits at the last position only."""
        return self._forward(new=prompt, context=prompt, logits=1)

    def decode(self, context: int) -> Phase:
        """One more token a row, which attends to `context` tokens, itself among them."""
        return self._forward(new=1, context=context, logits=1)

    def training(self, length: int) -> Phase:
        """An AdamW step on rows of `length` tokens.

        The backward pass takes two products for each of the forward, of the same size and so of the same bytes.
        Fused attention computes its scores again (a fifth product beside its four). The optimizer is in float32.
        """
        forward = self._forward(new=length, context=length, logits=length)
        again = {"attention": 3.5, "all_reduce": 2.0}
        numbers = OPTIMIZER_NUMBERS * parameters(self.spec)
        update = self._row("optimizer", 1, weights=4 * numbers)
        return Phase((*(row.times(again.get(row.name, 3.0)) for row in forward.rows), update))

    def generation(self, prompt: int, generated: int) -> float:
        """Seconds to read prompts and write `generated` tokens a row: the first comes with the prompt.

        Every step is summed with the cache that it reads, which grows by a token a step.
        """
        return self.prefill(prompt).seconds + sum(
            self.decode(context).seconds for context in range(prompt + 1, prompt + generated)
        )

    def memory(self, prompt: int, generated: int) -> dict[str, float]:
        """Bytes on all devices: weights, the cache at its longest, and what the largest operator reads and writes."""
        tokens = self.setting.batch * (prompt + generated)
        one_layer = replace(self, spec=self.spec.changed(num_hidden_layers=1))
        keys_and_values = 2 * self.spec.num_hidden_layers * self.spec.key_value_size
        return {
            "weights": parameters(self.spec) * self.setting.weight_bits / 8,
            "cache": tokens * keys_and_values * self.setting.cache_bits / 8,
            "activations": max(row.activations for row in one_layer.prefill(prompt).rows),
        }

    def turning_batch(self) -> int | None:
        """The batch from which on the products with weights are compute-bound in decoding; None if they never are.

        Attention never turns: each row reads a cache of its own.
        """
        weighted = [op for op in operators(self.spec, 1) if op.inputs]

        def turned(batch: int) -> bool:
            rows = [self._product(op, batch) for op in weighted]
            return sum(row.seconds_of["compute"] - row.seconds_of["memory"] for row in rows) >= 0

        found = bisect_left(range(1, MOST_ROWS), True, key=turned) + 1
        return found if found < MOST_ROWS else None

    def _forward(self, *, new: int, context: int, logits: int) -> Phase:
        """A forward pass of `new` tokens a row that attend to `context` tokens, with logits at the last `logits`."""
        batch, layers = self.setting.batch, self.spec.num_hidden_layers
        rows, written = [], 0
        for op in operators(self.spec, context):
            if op.name == "scores":
                rows += self._attention(op, new=new, context=context)
            elif op.name == "lm_head":
                rows.append(self._product(op, batch * logits))
            elif op.inputs:
                rows.append(self._product(op, batch * new))
                written += op.used * op.outputs
            elif op.name in PASSES:
                moved = self._activations(batch * new, whole=2 * PASSES[op.name] * self.spec.hidden_size)
                rows.append(self._row(op.name, op.count, activations=moved))
        # What a product writes is read and written once more, by a rotation, an activation or a residual sum.
        whole = 2 * self.spec.hidden_size  # the two residual sums
        moved = self._activations(batch * new, whole=2 * whole, divided=2 * (written - whole))
        rows.append(self._row("elementwise", layers, activations=moved))
        if self.setting.devices > 1:
            rows.append(self._all_reduce(batch * new))
        return Phase(tuple(rows))

    def _product(self, op: Operator, tokens: int) -> Row:
        """A product with weights; of its copies those are read that at least one token chooses.

        It reads or writes the hidden state on one side; the other side is divided among the devices.
        """
        hit = op.copies * (1 - (1 - op.used / op.copies) ** tokens)
        hidden = self.spec.hidden_size
        numbers = op.flops / 2 / op.used  # of one copy: a token takes two FLOPs for each that it meets
        return self._row(
            op.name,
            op.count,
            kernels=hit,
            flops=tokens * op.flops,
            weights=hit * numbers * self.setting.weight_bits / 8,
            activations=self._activations(op.used * tokens, whole=hidden, divided=op.inputs + op.outputs - hidden),
        )

    def _attention(self, scores: Operator, *, new: int, context: int) -> list[Row]:
        """Queries times keys, softmax, times values; in one when fused. Heads are divided among the devices."""
        batch, layers, size = self.setting.batch, scores.count, self.setting.activation_bits / 8
        queries = batch * new * self.spec.query_size * size
        square = batch * new * context * self.spec.num_attention_heads * size
        # Keys, or values: the new ones are written, and all are read.
        cache = batch * (new + context) * self.spec.key_value_size * self.setting.cache_bits / 8
        flops = batch * new * scores.flops
        if self.setting.attention == "sdpa":
            return [self._row("attention", layers, flops=2 * flops, activations=2 * queries, cache=2 * cache)]
        return [
            self._row("scores", layers, flops=flops, activations=queries + square, cache=cache),
            self._row("softmax", layers, activations=2 * square),
            self._row("values", layers, flops=flops, activations=square + queries, cache=cache),
        ]

    def _all_reduce(self, tokens: int) -> Row:
        """Sums over the devices after attention and feed-forward: in a ring each sends every number almost twice."""
        sent = 2 * (1 - 1 / self.setting.devices) * tokens * self.spec.hidden_size * self.setting.activation_bits / 8
        return self._row("all_reduce", 2 * self.spec.num_hidden_layers, link=sent / self.hardware.link_bandwidth)

    def _activations(self, tokens: int, *, whole: int, divided: int = 0) -> float:
        """Bytes of so many numbers a token, on every device or divided among them."""
        return tokens * (self.setting.devices * whole + divided) * self.setting.activation_bits / 8

    def _row(
        self,
        name: str,
        count: int,
        *,
        kernels: float = 1.0,
        flops: float = 0.0,
        weights: float = 0.0,
        activations: float = 0.0,
        cache: float = 0.0,
        link: float = 0.0,
    ) -> Row:
        """`count` times the amounts of one occurrence; `link` are seconds."""
        seconds_of: dict[Bound, float] = {
            "compute": flops / self.hardware.peak_flops[self.setting.peak],
            "memory": (weights + activations + cache) / self.hardware.memory_bandwidth,
            "link": link,
            "overhead": KERNELS.get(name, kernels) * self.hardware.kernel_seconds,
        }
        return Row(name, flops, weights, activations, cache, seconds_of).times(count)
