"""A model spread over many devices: what each rank holds and sends, how much of it idles, and how long an update takes.

The arrangement is Megatron-LM's (Narayanan et al., arXiv 2104.04473), and each axis is what its paper says:

    data      replicas, each with rows of its own; `sharding` says what they divide among them: nothing, the optimizer's
              state (zero1), gradients too (zero2), weights too (full, as FSDP2). ZeRO, arXiv 1910.02054
    tensor    ranks that split every product, and what lies between products along the sequence. arXiv 2205.05198
    pipeline  stages of as many layers each; of a micro-batch, forward and backward take turns (1F1B). arXiv 2104.04473
    expert    of the data ranks, those that hold different experts and send each other tokens. GShard, arXiv 2006.16668

Ranks of a tensor group are neighbours, then come those of an expert and of a data group, then the stages. Collectives
are rings: of S bytes each of n ranks sends S·(n-1)/n to gather, to reduce and scatter or all to all, and twice that
to reduce for all. Experts are taken to be used evenly. Left out, being small: gradients of norms and routers between
tensor ranks, and the sums of a split softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from espalier.budget.flops import Operator, is_expert, operators, training_flops
from espalier.budget.hardware import Hardware
from espalier.budget.memory import (
    SIZE,
    Accumulate,
    Dtype,
    Recompute,
    head_bytes_per_token,
    layer_bytes_per_token,
    sets_held,
)
from espalier.errors import RecipeError
from espalier.recipe import Recipe
from espalier.spec import ModelSpec

Axis = Literal["data", "tensor", "pipeline", "expert"]
Kind = Literal["all-reduce", "reduce-scatter", "all-gather", "all-to-all", "point-to-point"]
Sharding = Literal["none", "zero1", "zero2", "full"]
GRADIENT, MASTER, MOMENTS = 4, 4, 8  # bytes a parameter: float32, as are AdamW's two moments


class Layout(Recipe):
    """How many ways each axis splits the model or its work; expert ranks are among the data ranks."""

    data: int = Field(default=1, gt=0)
    tensor: int = Field(default=1, gt=0)
    pipeline: int = Field(default=1, gt=0)
    expert: int = Field(default=1, gt=0)
    sharding: Sharding = "none"

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.pipeline


class Links(Recipe):
    """B/s that a rank sends to others of its node and to those of other nodes, and how many ranks a node has."""

    within: float = Field(gt=0)
    between: float = Field(gt=0)
    per_node: int = Field(default=8, gt=0)

    def bandwidth(self, axis: Axis, layout: Layout) -> float:
        """B/s between the ranks of one axis, all of which send at the same time."""
        tensor = layout.tensor
        spans = {"tensor": tensor, "expert": tensor * layout.expert, "data": tensor * layout.data}
        return self.within if spans.get(axis, layout.ranks) <= self.per_node else self.between


@dataclass(frozen=True)
class Update:
    """What one optimizer step is made from: `rows` sequences in all, which a data rank takes `micro_rows` at a time,
    adding up their gradients.
    """

    rows: int
    micro_rows: int
    sequence_length: int
    compute: Dtype = "bfloat16"
    recompute: Recompute = "none"
    accumulate: Accumulate = "running"

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_rows * self.sequence_length

    def micro_batches(self, layout: Layout) -> int:
        """How many a data rank takes."""
        return self.rows // (layout.data * self.micro_rows)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank when it holds most.

    weights      in the compute dtype; under full sharding this rank's part of the float32 masters
    gradients    float32; added in pairs, a set more for each that waits for another
    optimizer    AdamW's two float32 moments; under bfloat16 the float32 masters of the weights too
    gathered     under full sharding: embedding and head, two layers' weights (one at work, the next on its way), one
                 layer's gradients, all whole
    activations  what autograd keeps, op by op and with fused attention, of all micro-batches under way
    logits       three float32 copies of a micro-batch's, on the last stage
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Transfer:
    """Bytes that a rank sends in one update along one axis by one kind of operation."""

    axis: Axis
    kind: Kind
    bytes: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of an update: products, what is sent along each axis and not hidden, and waiting for other stages."""

    compute: float
    tensor: float
    expert: float
    pipeline: float
    data: float
    bubble: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def require_fit(spec: ModelSpec, layout: Layout, update: Update) -> None:
    """`RecipeError` naming the axis that doesn't divide what it splits."""
    heads = {name: getattr(spec, name) for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")}
    wanted = [("tensor", layout.tensor, name, size) for name, size in heads.items()]
    wanted.append(("pipeline", layout.pipeline, "num_hidden_layers", spec.num_hidden_layers))
    wanted.append(("expert", layout.expert, "data", layout.data))
    wanted.append(("expert", layout.expert, "num_experts", max(spec.num_experts, 1)))
    wanted.append(("data", layout.data * update.micro_rows, "rows of an update", update.rows))
    for axis, parts, name, size in wanted:
        if size % parts:
            raise RecipeError(
                f"layout.{axis}",
                found=f"{parts} parts of {size} {name}" + (" with the micro-batch" if axis == "data" else ""),
                expected=f"a divisor of {size}",
                mend="Change one of the two.",
            )


def rank_memory(spec: ModelSpec, layout: Layout, update: Update) -> RankMemory:
    """The memory of the fullest rank, trained by AdamW."""
    require_fit(spec, layout, update)
    stages = (stage_memory(spec, layout, update, stage) for stage in _unlike(layout))
    return max(stages, key=lambda memory: memory.total)


def stage_memory(spec: ModelSpec, layout: Layout, update: Update, stage: int) -> RankMemory:
    """The memory of a rank of one pipeline stage, from 0."""
    size, master = SIZE[update.compute], MASTER if update.compute == "bfloat16" else 0
    layer, ends = _layer(spec, layout), _ends(spec, layout, stage)
    held = layer * (spec.num_hidden_layers // layout.pipeline) + ends
    part = held.sharded(layout)
    shards = {"none": 0, "zero1": 1, "zero2": 2, "full": 3}[layout.sharding]
    activations, logits = _activations(spec, layout, update, stage)
    sets = 1 + sets_held(update.micro_batches(layout), update.accumulate)
    return RankMemory(
        weights=MASTER * part if shards == 3 else size * held.total,
        gradients=GRADIENT * sets * (part if shards >= 2 else held.total),
        optimizer=(MOMENTS + (0 if shards == 3 else master)) * (part if shards >= 1 else held.total),
        gathered=size * (ends.total + 3 * layer.total) if shards == 3 else 0,
        activations=activations,
        logits=logits,
    )


def traffic(spec: ModelSpec, layout: Layout, update: Update) -> list[Transfer]:
    """What a rank of the stage that sends most sends in one update."""
    require_fit(spec, layout, update)
    stages = ([*stage_traffic(spec, layout, update, stage)] for stage in _unlike(layout))
    return max(stages, key=lambda transfers: sum(transfer.bytes for transfer in transfers))


def bubble_share(layout: Layout, micro_batches: int) -> float:
    """The share of an update in which a stage waits for others, (p-1)/(m+p-1). Narayanan et al., section 2.2."""
    return (layout.pipeline - 1) / (micro_batches + layout.pipeline - 1)


def step_time(
    spec: ModelSpec,
    layout: Layout,
    update: Update,
    hardware: Hardware,
    links: Links,
    *,
    efficiency: float = 1.0,
    overlap: float = 0.0,
) -> StepTime:
    """Seconds of one update, at the pace of the slowest stage.

    efficiency  the share of the hardware's peak that products reach; at 1 the time is one that can't be beaten
    overlap     the share of what data ranks send that hides behind products; nothing else is hidden
    """
    require_fit(spec, layout, update)
    peak = efficiency * hardware.part(1).peak_flops[update.compute]
    work = update.rows // layout.data * update.sequence_length * _slowest_stage(spec, layout, update)
    compute = work / (layout.tensor * peak)
    times = (_stage_time(spec, layout, update, links, overlap, compute, stage) for stage in _unlike(layout))
    return max(times, key=lambda time: time.total)


def _stage_time(
    spec: ModelSpec, layout: Layout, update: Update, links: Links, overlap: float, compute: float, stage: int
) -> StepTime:
    """The update as it is for a stage whose products take `compute` seconds."""
    sent: dict[Axis, float] = dict.fromkeys(("tensor", "expert", "pipeline", "data"), 0.0)
    for transfer in stage_traffic(spec, layout, update, stage):
        sent[transfer.axis] += transfer.bytes / links.bandwidth(transfer.axis, layout)
    sent["data"] *= 1 - overlap
    bubble = (compute + sent["tensor"] + sent["expert"]) * (layout.pipeline - 1) / update.micro_batches(layout)
    return StepTime(compute, **sent, bubble=bubble)


@dataclass(frozen=True)
class _Held:
    """Parameters of a rank, before data ranks divide them: those that all data ranks share, and experts."""

    shared: int
    experts: int

    def __add__(self, other: _Held) -> _Held:
        return _Held(self.shared + other.shared, self.experts + other.experts)

    def __mul__(self, times: int) -> _Held:
        return _Held(self.shared * times, self.experts * times)

    @property
    def total(self) -> int:
        return self.shared + self.experts

    def sharded(self, layout: Layout) -> int:
        """One data rank's part; an expert is shared by fewer of them."""
        return math.ceil(self.shared / layout.data) + math.ceil(self.experts * layout.expert / layout.data)


def _unlike(layout: Layout) -> list[int]:
    """The stages that differ: first and last, and the second for all between, none of which holds or sends more."""
    return sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})


def _layer(spec: ModelSpec, layout: Layout) -> _Held:
    """What a rank holds of one layer: its part of every product, norms and router whole."""
    shared = experts = 0
    for op in _layer_operators(spec, 1):
        if is_expert(op, spec):
            experts += math.ceil(op.parameters / (layout.tensor * layout.expert))
        else:
            split = op.inputs and op.name != "router"
            shared += math.ceil(op.parameters / layout.tensor) if split else op.parameters
    return _Held(shared, experts)


def _ends(spec: ModelSpec, layout: Layout, stage: int) -> _Held:
    """What a rank holds outside the layers: the embedding on the first stage, norm and head on the last."""
    matrix = math.ceil(spec.vocab_size * spec.hidden_size / layout.tensor)
    first, last = stage == 0, stage == layout.pipeline - 1
    head = last and not (first and spec.tie_word_embeddings)  # a tied matrix is on both stages, and once on one
    return _Held(matrix * first + matrix * head + spec.hidden_size * last, 0)


def _layer_operators(spec: ModelSpec, sequence_length: int) -> list[Operator]:
    outside = ("embedding", "final_norm", "lm_head")
    return [op for op in operators(spec, sequence_length) if op.name not in outside]


def _activations(spec: ModelSpec, layout: Layout, update: Update, stage: int) -> tuple[int, int]:
    """Bytes of what is kept for the backward pass, and of the logits."""
    layers = spec.num_hidden_layers // layout.pipeline
    under_way = min(layout.pipeline - stage, update.micro_batches(layout))
    whole = layer_bytes_per_token(spec, update.sequence_length, update.compute, "sdpa")
    kept = layer_bytes_per_token(spec, update.sequence_length, update.compute, "sdpa", update.recompute)
    per_token = under_way * layers * kept + whole - kept  # a layer at a time is run again
    if stage < layout.pipeline - 1:
        return math.ceil(update.tokens * per_token / layout.tensor), 0
    last = head_bytes_per_token(spec, update.compute)
    logits = 3 * 4 * update.tokens * math.ceil(spec.vocab_size / layout.tensor)
    return math.ceil(update.tokens * (per_token + last) / layout.tensor), logits


def _slowest_stage(spec: ModelSpec, layout: Layout, update: Update) -> int:
    """FLOPs a token of the last stage, which trains the head beside as many layers as the others have."""
    stage = spec.changed(num_hidden_layers=spec.num_hidden_layers // layout.pipeline)
    return training_flops(stage, update.sequence_length, update.recompute)


def _ring(size: float, ranks: int) -> float:
    """Bytes that each of `ranks` sends so that all hold `size` bytes of which each had its part, or the reverse."""
    return size * (ranks - 1) / ranks


def stage_traffic(spec: ModelSpec, layout: Layout, update: Update, stage: int) -> Iterator[Transfer]:
    """What a rank of one pipeline stage, from 0, sends in an update."""
    batches, layers = update.micro_batches(layout), spec.num_hidden_layers // layout.pipeline
    first, last = stage == 0, stage == layout.pipeline - 1
    again = 1 if update.recompute == "layers" else 0
    stream = update.tokens * spec.hidden_size * SIZE[update.compute]  # the residual stream of a micro-batch

    # A block gathers its input before its first product and scatters its sums after its last, and the backward pass
    # does the reverse and gathers the input, which was kept in parts, once more. arXiv 2205.05198, section 4.2.2.
    # Where tokens went to other ranks' experts, they are gathered there, once for each expert used.
    blocks = layers * (1 + (spec.num_experts_per_tok if layout.expert > 1 else 1))
    gathers = blocks * (3 + again) + first + 2 * last  # the embedding's gradients; the head's input, twice
    scatters = blocks * (2 + again) + first + last
    yield Transfer("tensor", "all-gather", batches * gathers * _ring(stream, layout.tensor))
    yield Transfer("tensor", "reduce-scatter", batches * scatters * _ring(stream, layout.tensor))

    # Tokens go to their experts and come back, and so do gradients.
    moved = layers * (4 + 2 * again) * spec.num_experts_per_tok * stream / layout.tensor
    yield Transfer("expert", "all-to-all", batches * _ring(moved, layout.expert))

    # The residual stream to the next stage, its gradient to the one before.
    neighbours = (not first) + (not last)
    yield Transfer("pipeline", "point-to-point", batches * neighbours * stream / layout.tensor)
    if spec.tie_word_embeddings and first != last:
        embedding = GRADIENT * spec.vocab_size * spec.hidden_size / layout.tensor
        yield Transfer("pipeline", "all-reduce", 2 * _ring(embedding, 2))

    held = _layer(spec, layout) * layers + _ends(spec, layout, stage)
    reduced = _ring(held.shared, layout.data) + _ring(held.experts, layout.data // layout.expert)
    gradients, weights = GRADIENT * reduced, SIZE[update.compute] * reduced
    if layout.sharding == "none":
        yield Transfer("data", "all-reduce", 2 * gradients)
        return
    # zero1 adds gradients up before it sends them; the others have no room for all of them.
    yield Transfer("data", "reduce-scatter", gradients * (1 if layout.sharding == "zero1" else batches))
    # full gathers the weights before the forward and before the backward pass of every micro-batch.
    yield Transfer("data", "all-gather", weights * (2 * batches if layout.sharding == "full" else 1))
