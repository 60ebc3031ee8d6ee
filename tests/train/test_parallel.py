"""Ranks that share a training: the same data and the same bits as one process, whatever their number."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed
from transformers import AutoModelForCausalLM

from espalier.budget.memory import sets_held
from espalier.errors import RecipeError, ResourceError
from espalier.folder import ModelFolder
from espalier.train import checkpoint
from espalier.train.checkpoint import Progress, Saver
from espalier.train.device import Device, initial_model
from espalier.train.loop import Segment, State, update
from espalier.train.objectives import NextToken
from espalier.train.optim import Optimizer
from espalier.train.parallel import ALONE, Pairs, Parallel, add_copies, divided, in_pairs, local, part, whole
from espalier.train.recipe import OptimizerRecipe, ParallelRecipe
from espalier.train.validate import validate
from espalier.world import SINGLE, World

from .conftest import MUP

ROWS, MICRO_ROWS = 8, 2


@pytest.fixture
def spec(spec, request):
    """Four ranks have 12 of a vector's numbers each, which don't fill the processor's registers."""
    sizes = {"hidden_size": 48, "head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 4}
    return spec.changed(**getattr(request, "param", sizes))


@pytest.fixture
def train(spec, stream):
    """Train some steps; the state, the losses and the samples that this rank saw."""

    def train(parallel: Parallel, steps: int, state: State | None = None, optimizer: str = "muon", **device):
        on = Device(**device)
        if state is None:
            model = initial_model(spec, MUP, on, parallel, seed=0)
            state = State(
                spec, model, Optimizer(model, spec, OptimizerRecipe(name=optimizer), MUP, parallel), Progress()
            )
        segment = Segment(steps, ROWS, MICRO_ROWS, 1.0, lambda step: 1.0)
        done = [update(state, stream, segment, NextToken(), on, parallel) for _ in range(steps - state.progress.step)]
        return state, [[step.loss, step.grad_norm] for step in done]

    return train


def everything(state: State) -> dict[str, torch.Tensor]:
    """What training changes, whole."""
    weights = {name: whole(weight.detach()) for name, weight in state.model.named_parameters()}
    moments = {
        f"{name} {key}": whole(value)
        for name, quantities in sorted(state.optimizer.state().items())
        for key, value in sorted(quantities.items())
    }
    return weights | moments


def bits(state: State) -> str:
    """A digest of everything that training changes."""
    values = everything(state).values()
    return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in values)).hexdigest()


def resume(path, spec, parallel: Parallel, optimizer: str = "muon") -> State:
    model, moments, progress = checkpoint.load(path, Device(), parallel)
    state = State(spec, model, Optimizer(model, spec, OptimizerRecipe(name=optimizer), MUP, parallel), progress)
    state.optimizer.load_state(moments)
    return state


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(
    ("size", "shape"),
    [(2, {}), (4, {}), (4, {"shard": 2}), (2, {"shard": 1}), (4, {"shard": 1})],
    ids=["2 shards", "4 shards", "2 copies of 2", "2 copies", "4 copies"],
)
def test_ranks_make_the_updates_of_one_process_bit_for_bit(size, shape, optimizer, train, ranks):
    alone, told = train(ALONE, 5, optimizer=optimizer)
    expected = [told, bits(alone)]

    def work(world: World) -> list:
        state, told = train(Parallel.over(world, ParallelRecipe(**shape), "cpu"), 5, optimizer=optimizer)
        return [told, bits(state)]

    for of_rank in ranks(size, work):
        assert of_rank == expected


@pytest.mark.parametrize(
    "spec",
    [{"hidden_size": 36, "head_dim": 18, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 92}],
    indirect=True,
)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_whose_parts_do_not_fill_registers_are_updated_alike(optimizer, size, train, ranks):
    alone, told = train(ALONE, 5, optimizer=optimizer)

    def work(world: World) -> list:
        state, told = train(Parallel.over(world, ParallelRecipe(), "cpu"), 5, optimizer=optimizer)
        return [told, bits(state)]

    assert ranks(size, work) == [[told, bits(alone)]] * size


@pytest.mark.parametrize("shape", [{}, {"shard": 1}], ids=["shards", "copies"])
def test_a_tensor_group_makes_the_same_updates_but_for_rounding(train, ranks, shape):
    alone, told = train(ALONE, 5)

    def work(world: World) -> list:
        state, told = train(Parallel.over(world, ParallelRecipe(tensor=2, **shape), "cpu"), 5)
        return [told, {name: value.tolist() for name, value in everything(state).items()}]

    first, *others = ranks(4, work)
    assert all(other == first for other in others)
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(told), rtol=1e-5, atol=0.0)
    for name, value in everything(alone).items():
        torch.testing.assert_close(torch.tensor(first[1][name]), value, rtol=0.0, atol=0.02)


def test_layers_that_are_recomputed_or_multiply_in_bfloat16_train_alike(train, ranks):
    ways = ({}, {"recompute": "layers"}, {"compute": "bfloat16"})

    def work(world: World) -> list:
        return [train(Parallel.over(world, ParallelRecipe(), "cpu"), 3, **way)[1] for way in ways]

    exact, again, coarse = expected = [train(ALONE, 3, **way)[1] for way in ways]
    assert again == exact and coarse != exact
    assert ranks(2, work) == [expected] * 2


def test_ranks_multiply_in_float8_alike(train, ranks):
    pytest.importorskip("torchao")

    def work(world: World) -> list:
        return train(Parallel.over(world, ParallelRecipe(), "cpu"), 3, compute="float8")[1]

    told = train(ALONE, 3, compute="float8")[1]
    assert ranks(2, work) == [told] * 2


def test_each_rank_holds_its_part_of_weights_gradients_and_moments(train, spec, ranks):
    def work(world: World) -> list:
        state, _ = train(Parallel.over(world, ParallelRecipe(), "cpu"), 1)
        moments = [value for quantities in state.optimizer.state().values() for value in quantities.values()]
        return [sum(local(tensor).numel() for tensor in group) for group in ([*state.model.parameters()], moments)]

    one = [sum(sizes) for sizes in zip(*ranks(1, lambda world: held(train)), strict=True)]
    of_each = ranks(4, work)
    for weights, moments in of_each:
        assert weights * 4 == one[0] and moments == pytest.approx(one[1] / 4, rel=0.02)


def held(train) -> list[int]:
    state, _ = train(ALONE, 1)
    moments = [value for quantities in state.optimizer.state().values() for value in quantities.values()]
    return [sum(tensor.numel() for tensor in group) for group in ([*state.model.parameters()], moments)]


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "optimizer", "when"),
    [(2, 2, "muon", "beside"), (2, 4, "adamw", "at once"), (4, 1, "muon", "at once"), (1, 2, "adamw", "beside")],
)
def test_a_checkpoint_goes_on_on_another_number_of_ranks_with_the_same_bits(
    saved_by, resumed_by, optimizer, when, train, spec, ranks, tmp_path
):
    expected, _ = train(ALONE, 5, optimizer=optimizer)

    def save(world: World) -> None:
        parallel = Parallel.of(world, ParallelRecipe(), "cpu")
        state, _ = train(parallel, 2, optimizer=optimizer)
        saver = Saver(tmp_path, tokenizer=None, keep=2, when=when, parallel=parallel)
        saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
        train(parallel, 4, state)  # what is being written must not change with the state
        saver.finish()

    def go_on(world: World) -> list:
        parallel = Parallel.of(world, ParallelRecipe(), "cpu")
        path = checkpoint.newest(tmp_path, print, world)
        state = resume(path, spec, parallel, optimizer)
        return bits(train(parallel, 5, state)[0])

    ranks(saved_by, save)
    assert checkpoint.written_by(tmp_path / "checkpoint-2") == saved_by
    opened = AutoModelForCausalLM.from_pretrained(ModelFolder.open(tmp_path / "checkpoint-2").path)
    assert opened.config.architectures == ["GraniteForCausalLM"]
    assert ranks(resumed_by, go_on) == [bits(expected)] * resumed_by


def test_copies_that_nobody_shares_are_saved_as_they_were(train, spec, ranks, tmp_path):
    def save(world: World) -> str:
        parallel = Parallel.over(world, ParallelRecipe(shard=1), "cpu")
        state, _ = train(parallel, 2)
        before = bits(state)
        held = checkpoint.Held.of(dict(state.model.named_parameters()), parallel, copies=True)
        live = {name: local(weight.detach()).data_ptr() for name, weight in state.model.named_parameters()}
        assert all(value.data_ptr() != live[name] for name, value in held.tensors.items())
        return before

    first, second = ranks(2, save)
    assert first == second


def test_a_rank_that_cannot_write_leaves_the_checkpoint_before(train, ranks, tmp_path, monkeypatch):
    def work(world: World) -> str:
        parallel = Parallel.of(world, ParallelRecipe(), "cpu")
        state, _ = train(parallel, 1)
        saver = Saver(tmp_path, tokenizer=None, keep=2, parallel=parallel)
        saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
        state.progress = replace(state.progress, step=2)
        if world.rank == 1:
            monkeypatch.setattr(checkpoint.shards, "write_tensors", full)
        try:
            saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
        except ResourceError as error:
            return error.where
        return ""

    def full(*_: object, **more: object) -> None:
        raise OSError(28, "full")

    assert ranks(2, work) == [f"rank 1: {tmp_path / 'checkpoint-2'}"] * 2
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]


def test_a_damaged_part_is_found_whichever_rank_reads_it(train, ranks, tmp_path):
    def save(world: World) -> None:
        parallel = Parallel.of(world, ParallelRecipe(), "cpu")
        saver = Saver(tmp_path, tokenizer=None, keep=2, parallel=parallel)
        for step in (1, 2):
            state, _ = train(parallel, step)
            saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)

    def newest(world: World) -> str:
        path = checkpoint.newest(tmp_path, print, world)
        return path.name if path else ""

    ranks(2, save)
    for file in sorted((tmp_path / "checkpoint-2").rglob("*.*")):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert ranks(3, newest) == ["checkpoint-1"] * 3, file
        file.write_bytes(kept)
    assert ranks(3, newest) == ["checkpoint-2"] * 3


def test_ranks_share_the_evaluation_and_agree_with_one_process(train, spec, stream, ranks):
    def held_out(parallel: Parallel) -> list:
        state, _ = train(parallel, 1)
        lengths = np.ones(spec.vocab_size, np.int64)
        more = {"rows": 10, "micro_rows": 2, "parallel": parallel}
        held = [local(weight).numel() for weight in state.model.parameters()]
        found = validate(state.model, stream, lengths, NextToken(), Device(), **more)
        assert [local(weight).numel() for weight in state.model.parameters()] == held, "what was gathered is let go"
        train(parallel, 2, state)  # weights that were gathered for it don't hide those that are updated
        again = validate(state.model, stream, lengths, NextToken(), Device(), **more)
        return [found.loss, found.bpb, found.tokens, found.stderr, again.loss]

    alone = held_out(ALONE)
    assert alone[0] != alone[-1]
    for size in (2, 4):  # of five batches
        assert ranks(size, lambda world: held_out(Parallel.over(world, ParallelRecipe(), "cpu"))) == [alone] * size


@pytest.mark.parametrize(
    ("world", "recipe", "key"),
    [
        (World(0, 4, 0, 4), ParallelRecipe(shard=3), "train.parallel.shard"),
        (World(0, 4, 0, 2), ParallelRecipe(tensor=4), "train.parallel.tensor"),
        (World(0, 3, 0, 3), ParallelRecipe(tensor=2), "train.parallel.tensor"),
    ],
)
def test_ranks_that_cannot_be_divided_so_are_refused(world, recipe, key):
    with pytest.raises(RecipeError) as refusal:
        divided(world, recipe)
    assert refusal.value.where == key


def test_rows_that_ranks_cannot_share_are_refused():
    with pytest.raises(RecipeError, match="7 rows an update over 2 data ranks"):
        Parallel(World(0, 2, 0, 2), shard=2).require_rows(7)


@given(rows=st.integers(1, 64), most=st.integers(1, 16), size=st.integers(1, 8))
def test_every_rank_makes_as_many_passes(rows, most, size):
    parallel, rows = Parallel(World(0, size, 0, size), shard=size), rows * size
    micro = parallel.micro_rows(rows, most)
    dealt = np.bincount(np.arange(rows) // micro % size, minlength=size)
    assert micro <= most and len(set(dealt.tolist())) == 1


@given(st.integers(1, 40))
def test_pairs_are_added_as_a_tree_of_their_number(count):
    weight = torch.nn.Parameter(torch.zeros(()))
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    pairs, waiting = Pairs([weight]), 0
    for number, value in enumerate(values):
        (weight * value).backward()
        waiting = max(waiting, len(pairs._held))
        pairs.add(last=number == count - 1)
    assert weight.grad == tree(values.tolist())
    assert waiting == sets_held(count, "pairs"), "what the memory of an update is priced by"


@given(st.integers(1, 20))
def test_ranks_are_added_as_the_tree_of_their_number(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    assert in_pairs(list(values.clone())) == tree(values.tolist())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_copies_are_added_as_the_tree_of_their_number(ranks, size):
    values = torch.randn(size, 2, 5, generator=torch.Generator().manual_seed(size))

    def work(world: World) -> list:
        mine = values[world.rank].clone()
        add_copies(mine, group=distributed.group.WORLD)
        return mine.tolist()

    assert ranks(size, work) == [in_pairs(list(values.clone())).tolist()] * size


def tree(values: list[float]) -> torch.Tensor:
    """The sum in pairs, pairs of pairs and so on, from the left."""
    terms = [torch.tensor(value) for value in values]
    while len(terms) > 1:
        terms = [left + right for left, right in zip(terms[::2], terms[1::2], strict=False)] + terms[
            len(terms) // 2 * 2 :
        ]
    return terms[0]


def test_a_tensor_that_is_not_shared_is_whole():
    tensor = torch.arange(6.0)
    assert whole(tensor) is tensor and local(tensor) is tensor and part(tensor, tensor) is tensor
    assert Parallel.of(SINGLE, ParallelRecipe(), "cpu") is ALONE
