"""What fine-tuning a model folder takes: memory, FLOPs, time, money, and which hardware holds it. Arithmetic only.

Full fine-tuning keeps float32 weights under autocast and trains all of them, as `espalier run` does. LoRA
(arXiv 2106.09685) freezes the weights in the compute dtype and adds, to each linear layer of `target`, two matrices of
`rank`: r·(inputs + outputs) numbers. QLoRA (arXiv 2305.14314) stores the layers' frozen matrices in 4 bits, and makes
them whole one at a time. Estimates of the latter follow its paper and weren't measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from espalier import files, units
from espalier.budget import flops, memory, price, rows
from espalier.budget.hardware import USUAL_MFU, Hardware, catalogue, named
from espalier.budget.memory import SIZE
from espalier.errors import BudgetError, ModelError
from espalier.folder import ModelFolder
from espalier.ledger import Cost
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import RESULTS, Run
from espalier.spec import ModelSpec

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_LINEAR: tuple[Target, ...] = Target.__args__  # type: ignore[attr-defined]

# 4-bit NormalFloat: half a byte, an 8-bit constant for 64 weights, and a float32 one for 256 of those.
FOUR_BIT = 1 / 2 + 1 / 64 + 4 / (64 * 256)
LOSS_CHUNK = 1024  # tokens of which Espalier's loss has the logits at a time


class WayRecipe(Recipe):
    """How to fine-tune: what is trained, and in what passes.

    target           linear layers that get an adapter, by transformers' names
    sequence_length  tokens of a row; rows that are longer are cut, shorter ones packed
    batch            rows of one forward pass
    recompute        whether layers are computed again in the backward pass
    """

    method: Literal["full", "lora", "qlora"] = "lora"
    rank: int = Field(default=16, ge=1)
    target: tuple[Target, ...] = Field(default=ALL_LINEAR, min_length=1)
    sequence_length: int = Field(default=1024, gt=0)
    batch: int = Field(default=1, gt=0)
    recompute: Literal["none", "layers"] = "none"
    compute: Literal["bfloat16", "float32"] = "bfloat16"

    def changed(self, **values: object) -> WayRecipe:
        """This way with some values replaced."""
        kept = {name: getattr(self, name) for name in WayRecipe.model_fields}
        return WayRecipe.model_validate({**kept, **values})


class FinetuneRecipe(WayRecipe):
    """The model folder, the dataset (a file, or its rows and tokens), and the hardware: `here` or a catalogue's key."""

    model: Path
    data: Path | None = None
    rows: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0, description="tokens of all rows together, where no data is given")
    epochs: float = Field(default=1.0, gt=0)
    hardware: str = "here"
    utilization: float = Field(default=USUAL_MFU, gt=0, le=1, description="share of the matmul peak that is reached")

    @model_validator(mode="after")
    def _one_dataset(self) -> Self:
        stated = self.rows is not None and self.tokens is not None
        if (self.data is None) is not stated:
            raise ValueError("either data=FILE, or rows= and tokens= together")
        return self


@dataclass(frozen=True)
class Need:
    """Bytes of fine-tuning at the moment that takes most.

    weights      of the model, frozen or trained, with what autocast copies
    adapters     float32, with their casts
    gradients    float32, of what is trained
    optimizer    AdamW's two moments of what is trained
    activations  what autograd keeps
    working      logits, gradients on their way, a 4-bit matrix made whole
    framework    Python and torch, before there is a model
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    framework: int = memory.FRAMEWORK

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """What a fine-tuning takes on one device.

    held_by        the GPUs that hold it, by key, with the price of the whole work in USD, cheapest first
    largest_batch  that the hardware asked for holds; 0 for none
    mend           what would make it fit there, "" where it fits
    """

    hardware: str
    parameters: int
    trained: int
    need: Need
    at_hand: int
    data: rows.Counted
    cost: Cost
    held_by: dict[str, float]
    largest_batch: int
    mend: str

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {units.si(size, 'B')}" for name, size in vars(self.need).items() if size)
        cost, share = self.cost, self.trained / self.parameters
        cut = f", {self.data.cut:,} rows cut" if self.data.cut else ""
        holders = ", ".join(f"{key} {units.money(usd)}" for key, usd in self.held_by.items())
        lines = {
            "trained": f"{units.count(self.trained)} of {units.count(self.parameters)} parameters ({share:.2%})",
            "memory": f"{units.si(self.need.total, 'B')} ({parts})",
            "data": f"{self.data.rows:,} rows, {units.count(self.data.tokens)} tokens an epoch{cut}",
            "work": f"{units.count(cost.tokens)} tokens, {units.si(cost.flops, 'FLOP')}",
            "on": f"{self.hardware}, {units.si(self.at_hand, 'B')} a device: "
            + ("doesn't fit" if self.mend else f"fits, up to batch={self.largest_batch}"),
            "takes": f"{units.duration(cost.seconds)}, {units.money(cost.usd)}, {units.amount(cost.kwh, 'kwh')}, "
            f"{units.amount(cost.kgco2e, 'kgco2e')} (estimated from the matmul peak)",
            "held by": holders or "no GPU of the catalogue",
            "mend": self.mend,
        }
        return "\n".join(f"{label:8} {text}" for label, text in lines.items() if text)


@method(needs="a model folder; a dataset or its size", costs="reading the dataset once")
def finetune(recipe: FinetuneRecipe, run: Run) -> Estimate:
    """Say what fine-tuning a model takes: memory by part, FLOPs, time, money, and the hardware that holds it."""
    folder = ModelFolder.open(recipe.model)
    data = _dataset(recipe)
    made = estimate(folder.spec, recipe, data, files.home())
    report = Report(str(recipe.model), context=asdict(made))
    report.add("fine-tuning", "memory", made.need.total, note="bytes")
    report.add("fine-tuning", "flops", made.cost.flops)
    report.save(run.folder / RESULTS)
    return made


def estimate(spec: ModelSpec, recipe: FinetuneRecipe, data: rows.Counted, home: Path) -> Estimate:
    """The estimate for a shape and a dataset; `BudgetError` when no hardware that is known holds it.

    Adapters on a mixture of experts are a `ModelError`: its experts are stacked in one tensor, not linear layers.
    """
    if spec.num_experts and recipe.method != "full":
        raise ModelError(
            str(recipe.model),
            found=f"a mixture of experts, {spec.family}",
            expected=f"a dense model for {recipe.method}",
            mend="Set method=full.",
        )
    known, row = catalogue(home), named(recipe.hardware, home=home)
    need, at_hand = need_of(spec, recipe), memory.of_one_device(row)
    gpus = {key: gpu for key, gpu in known.items() if gpu.kind == "cuda"}
    largest = max([at_hand, *map(memory.of_one_device, gpus.values())])
    if need.total > largest:
        raise BudgetError(
            f"{recipe.model}: memory",
            found=f"{units.si(need.total, 'B')} for {recipe.method} with batch={recipe.batch}",
            expected=f"at most {units.si(largest, 'B')}, what the largest device that is known has",
            mend=mend(spec, recipe, largest),
        )
    tokens = data.tokens * recipe.epochs
    work = tokens * flops_per_token(spec, recipe)
    holders = {
        key: _cost(gpu, recipe, tokens, work).usd
        for key, gpu in gpus.items()
        if need.total <= memory.of_one_device(gpu)
    }
    return Estimate(
        hardware=row.name,
        parameters=flops.parameters(spec),
        trained=flops.parameters(spec) if recipe.method == "full" else adapter_parameters(spec, recipe),
        need=need,
        at_hand=at_hand,
        data=data,
        cost=_cost(row, recipe, tokens, work),
        held_by=dict(sorted(holders.items(), key=lambda item: item[1])),
        largest_batch=largest_batch(spec, recipe, at_hand),
        mend="" if need.total <= at_hand else mend(spec, recipe, at_hand),
    )


def adapter_parameters(spec: ModelSpec, way: WayRecipe) -> int:
    """Numbers in the adapters: rank · (inputs + outputs) for each linear layer that has one."""
    return sum(way.rank * (op.inputs + op.outputs) * op.count for op in _targeted(spec, way))


def flops_per_token(spec: ModelSpec, way: WayRecipe) -> float:
    """FLOPs per token of training, counted as flops.training_flops does.

    Full: 3·F, with F those of the forward pass. With adapters of A parameters, frozen matrices need no gradient: the
    backward pass takes one product for each of the forward's, to the layer's input, and one more for each in attention,
    where both factors are computed. So 2·F + S + 3·2·A, with S those of attention; what lies before the first adapters
    needs no gradient either, and the first layer's q, k and v have none to pass on. Recomputed layers come on top.
    """
    length = way.sequence_length
    if way.method == "full":
        return flops.training_flops(spec, length, way.recompute)
    layers = [op for op in flops.operators(spec, length) if op.name not in ("embedding", "lm_head")]
    attention = sum(op.flops * op.count for op in layers if op.name in ("scores", "values"))
    first = sum(op.flops for op in layers if op.name in ("q", "k", "v"))
    adapters = 2 * adapter_parameters(spec, way)
    # A layer is computed again up to the last result that a gradient needs: before `down`, or an adapter on it.
    repeated = [op for op in layers if op.name != "down" or "down_proj" in way.target]
    again = sum(op.flops * op.count for op in repeated) + adapters if way.recompute == "layers" else 0
    return 2 * flops.forward_flops(spec, length) + attention - first + 3 * adapters + again


def need_of(spec: ModelSpec, way: WayRecipe) -> Need:
    """The memory of one device, all of the model on it."""
    if way.method == "full":
        peak = memory.training_memory(
            spec,
            rows=way.batch,
            sequence_length=way.sequence_length,
            optimizer="adamw",
            compute=way.compute,
            loss_chunk=LOSS_CHUNK,
            attention="sdpa",
            recompute=way.recompute,
        )
        return Need(peak.weights, 0, peak.gradients, peak.optimizer, peak.activations, peak.working)
    size, adapters, tokens = SIZE[way.compute], adapter_parameters(spec, way), way.batch * way.sequence_length
    casts = size if way.compute == "bfloat16" else 0
    matrices = memory.layer_matrices(spec)
    stored = matrices * (FOUR_BIT if way.method == "qlora" else size)
    whole = 2 * spec.hidden_size * max(spec.intermediate_size, spec.query_size) if way.method == "qlora" else 0
    layer = _kept_in_layer(spec, way)
    inputs, ends = size * spec.hidden_size, 4 * spec.hidden_size + 4 + size * spec.hidden_size
    kept = layer * spec.num_hidden_layers if way.recompute == "none" else inputs * spec.num_hidden_layers
    again = 0 if way.recompute == "none" else layer - inputs
    # Either the loss takes most, or the backward pass in the last layer.
    logits = memory.loss_bytes(tokens, min(LOSS_CHUNK, tokens), way.compute, "off") * spec.vocab_size
    loss = (tokens * (kept + ends), logits)
    in_layer = max(12 * spec.hidden_size, 2 * size * spec.intermediate_size)
    backward = (tokens * (kept + ends + again), tokens * in_layer)
    activations, working = max(loss, backward, key=sum)
    return Need(
        weights=round(stored) + size * (flops.parameters(spec) - matrices),
        adapters=(4 + casts) * adapters,
        gradients=4 * adapters,
        optimizer=8 * adapters,
        activations=activations,
        working=working + whole,
    )


def largest_batch(spec: ModelSpec, way: WayRecipe, at_hand: int) -> int:
    """The most rows in a pass for which `at_hand` bytes are enough; 0 if one row is too much."""
    return memory.most_that_fit(lambda batch: need_of(spec, way.changed(batch=batch)).total <= at_hand)


def mend(spec: ModelSpec, way: WayRecipe, at_hand: int) -> str:
    """The mildest settings by which `at_hand` bytes become enough."""
    for changes in _milder(spec, way):
        batch = largest_batch(spec, way.changed(**changes), at_hand)
        if batch:
            changes = changes | ({"batch": batch} if batch < way.batch else {})
            return f"Set {' '.join(f'{key}={value}' for key, value in changes.items())}."
    return "Choose a smaller model or a device with more memory."


def _milder(spec: ModelSpec, way: WayRecipe) -> Iterator[dict[str, object]]:
    """Changes that save memory, each on top of the last: none, recomputation, adapters, 4 bits, shorter rows."""
    yield {}
    changes: dict[str, object] = {}
    if way.recompute == "none":
        changes |= {"recompute": "layers"}
        yield changes
    adapters = {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[way.method]
    for name in () if spec.num_experts else adapters:
        changes |= {"method": name}
        yield changes
    length = way.sequence_length // 2
    while length >= 128:
        yield changes | {"sequence_length": length}
        length //= 2


def _kept_in_layer(spec: ModelSpec, way: WayRecipe) -> int:
    """Bytes a token that autograd keeps of a layer whose weights are frozen.

    As memory.activation_bytes_per_token has it, but a frozen matrix needs no input and a frozen norm no normalized
    input; an adapter needs its input and what its first matrix makes of it.
    """
    size, hidden, heads = SIZE[way.compute], spec.hidden_size, spec.num_attention_heads
    query_key = spec.query_size + spec.key_value_size
    targets = {name.removesuffix("_proj") for name in way.target}
    kept = 2 * (4 * hidden + 4) + 2 * size * query_key + 4 * heads + 3 * size * spec.intermediate_size
    kept += size * hidden * (bool(targets & {"q", "k", "v"}) + bool(targets & {"gate", "up"}))
    kept += size * spec.intermediate_size * ("down" in targets)
    kept += size * way.rank * len(targets)
    if spec.normed_heads == "each":
        kept += 4 * query_key + 4 * (heads + spec.num_key_value_heads)
    return kept


def _targeted(spec: ModelSpec, way: WayRecipe) -> list[flops.Operator]:
    return [op for op in flops.operators(spec, 1) if f"{op.name}_proj" in way.target]


def _cost(row: Hardware, recipe: FinetuneRecipe, tokens: float, work: float) -> Cost:
    """The price of the work on one device of a row of the catalogue, or on all cores of a CPU."""
    seconds = work / (row.peak_flops[recipe.compute] * recipe.utilization)
    return price.rates(row).cost(seconds, tokens=tokens, flops=work)


def _dataset(recipe: FinetuneRecipe) -> rows.Counted:
    if recipe.data:
        return rows.count(recipe.data, recipe.model, recipe.sequence_length)
    assert recipe.rows and recipe.tokens, "the recipe has been checked"
    return rows.Counted(recipe.rows, recipe.tokens)
