"""Layouts: small cases worked out by hand, sums over the ranks, and a published run of 192 devices."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from espalier.budget import flops, memory, parallel
from espalier.budget.hardware import Hardware
from espalier.budget.parallel import Layout, Links, Update
from espalier.errors import RecipeError
from espalier.spec import ModelSpec

A800 = Hardware("A800", "cuda", 1, {"float32": 19.5e12, "bfloat16": 312e12}, 80 * 10**9, 2e12, 400.0, 1.0, 0.5, {})
LINKS = Links(within=2e11, between=2.5e10)
SHARDINGS = ("none", "zero1", "zero2", "full")
MIXTURE = {"family": "mixtral", "num_experts": 8, "num_experts_per_tok": 2}


def small(**sizes) -> ModelSpec:
    given = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    return ModelSpec(**{"family": "llama", **given, "num_attention_heads": 4, **sizes})


def update(rows=32, micro_rows=1, **more) -> Update:
    return Update(rows, micro_rows, 40, **more)


def sent(spec, layout, batch) -> dict[tuple[str, str], float]:
    return {(move.axis, move.kind): move.bytes for move in parallel.traffic(spec, layout, batch) if move.bytes}


def seconds(spec, layout, batch, **more) -> parallel.StepTime:
    return parallel.step_time(spec, layout, batch, A800, LINKS, **more)


layouts = st.builds(
    Layout,
    data=st.sampled_from([1, 2, 4, 8]),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4]),
    sharding=st.sampled_from(SHARDINGS),
)
choices = st.fixed_dictionaries(
    {"compute": st.sampled_from(["float32", "bfloat16"]), "recompute": st.sampled_from(["none", "layers"])}
)


@pytest.mark.parametrize("spec", [small(), small(tie_word_embeddings=True), small(**MIXTURE)], ids=str)
@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_one_rank_holds_what_one_device_does_and_sends_nothing(spec, compute, recompute):
    batch = update(rows=6, micro_rows=3, compute=compute, recompute=recompute)
    rank = parallel.rank_memory(spec, Layout(), batch)
    kept = memory.activation_bytes_per_token(spec, 40, compute, "sdpa", recompute)
    layer = memory.layer_bytes_per_token(spec, 40, compute, "sdpa")
    again = layer - 4 * spec.hidden_size if recompute == "layers" else 0  # beside its input, which was kept
    assert rank.activations == batch.tokens * (kept + again)
    assert rank.gradients == 4 * flops.parameters(spec)
    if compute == "float32":
        assert rank.weights == 4 * flops.parameters(spec)
        assert rank.optimizer == memory.optimizer_bytes(spec, "adamw")
    else:  # 18 bytes a parameter: on one device those of the embedding and of norms aren't cast
        assert rank.weights + rank.optimizer == 14 * flops.parameters(spec)
    assert sent(spec, Layout(), batch) == {}
    time = seconds(spec, Layout(), batch)
    work = 6 * 40 * flops.training_flops(spec, 40, recompute)
    assert time.total == time.compute == pytest.approx(work / A800.peak_flops[compute])


@settings(deadline=None)
@given(layouts, choices, st.booleans())
def test_what_data_ranks_divide_adds_up_to_what_one_holds(layout, how, tied):
    spec, batch = small(tie_word_embeddings=tied), update(**how)
    plain = Layout(**layout.model_dump(exclude={"sharding"}))
    master = parallel.MASTER if how["compute"] == "bfloat16" else 0
    for stage in range(layout.pipeline):
        whole, part = (parallel.stage_memory(spec, one, batch, stage) for one in (plain, layout))
        held = whole.gradients // 4
        assert whole.optimizer == (8 + master) * held
        divided = SHARDINGS.index(layout.sharding)
        parts = layout.data * part.optimizer, layout.data * part.gradients, layout.data * part.weights
        wanted = (8 if divided == 3 else 8 + master) * held, 4 * held, 4 * held
        for number, (sum_of_ranks, all_of_it) in enumerate(zip(parts, wanted, strict=True), start=1):
            if divided >= number:
                # each rank's part is rounded up to a whole number
                assert all_of_it <= sum_of_ranks <= all_of_it + 12 * layout.data
        assert (part.activations, part.logits) == (whole.activations, whole.logits)
        assert (part.gathered > 0) == (layout.sharding == "full")


@pytest.mark.parametrize("passes, sets", [(1, 1), (2, 1), (3, 2), (4, 2), (6, 2), (8, 3), (16, 4)])
def test_a_rank_that_adds_in_pairs_holds_its_part_of_what_waits(passes, sets):
    spec, layout = small(), Layout(data=4, sharding="full")
    one = parallel.Update(rows=4 * passes, micro_rows=1, sequence_length=40)
    running, pairs = (
        parallel.rank_memory(spec, layout, dataclasses.replace(one, accumulate=how)) for how in ("running", "pairs")
    )
    assert pairs.gradients == sets * running.gradients
    assert dataclasses.replace(pairs, gradients=running.gradients) == running


@settings(deadline=None)
@given(layouts, st.booleans(), st.sampled_from([{}, MIXTURE]))
def test_stages_and_tensor_ranks_hold_every_parameter(layout, tied, family):
    spec = small(tie_word_embeddings=tied, **family)
    plain = Layout(tensor=layout.tensor, pipeline=layout.pipeline)
    held = sum(parallel.stage_memory(spec, plain, update(), stage).gradients for stage in range(layout.pipeline)) // 4
    whole = ("norms", "final_norm", "router")
    repeated = sum(op.parameters * op.count for op in flops.operators(spec, 1) if op.name in whole)
    twice = spec.vocab_size * spec.hidden_size if tied and layout.pipeline > 1 else 0
    assert held * layout.tensor == flops.parameters(spec) + (layout.tensor - 1) * repeated + twice


def test_experts_are_held_once_by_all_expert_ranks():
    spec = small(**MIXTURE)
    experts = sum(op.parameters * op.count for op in flops.operators(spec, 1) if op.copies > 1)
    for expert in (1, 2, 8):
        rank = parallel.rank_memory(spec, Layout(data=8, expert=expert), update())
        assert rank.gradients // 4 == flops.parameters(spec) - experts + experts // expert
        # and with all the state divided by data ranks, it doesn't matter which of them hold which experts
        assert parallel.rank_memory(spec, Layout(data=8, expert=expert, sharding="zero1"), update()).optimizer == (
            parallel.rank_memory(spec, Layout(data=8, sharding="zero1"), update()).optimizer
        )


def test_full_sharding_gathers_the_ends_two_layers_and_one_layer_s_gradients():
    spec = small()
    layer = sum(op.parameters for op in flops.operators(spec, 1) if op.count == 4)
    ends = 2 * 160 * 64 + 64
    rank = parallel.rank_memory(spec, Layout(data=4, sharding="full"), update())
    assert rank.gathered == 2 * (ends + 3 * layer)


@settings(deadline=None)
@given(layouts, choices)
def test_the_more_is_divided_the_less_a_rank_holds(layout, how):
    spec, batch = small(), update(**how)
    base = parallel.rank_memory(spec, layout, batch)
    for axis in ("data", "tensor"):
        more = layout.model_copy(update={axis: getattr(layout, axis) * 2})
        if getattr(more, axis) <= 4:
            assert parallel.rank_memory(spec, more, batch).total <= base.total
    steps = [parallel.rank_memory(spec, layout.model_copy(update={"sharding": kind}), batch) for kind in SHARDINGS]
    states = [memory.weights + memory.gradients + memory.optimizer for memory in steps]
    assert states == sorted(states, reverse=True)
    again = Update(batch.rows, 1, 40, how["compute"], "layers")
    assert (
        parallel.rank_memory(spec, layout, again).activations <= base.activations * 1.3
    )  # of few layers it saves none


@settings(deadline=None)
@given(layouts, choices, st.booleans(), st.sampled_from([1, 2, 8]), st.sampled_from([4, 8, 16]))
def test_the_fullest_rank_and_the_one_that_sends_most_are_those_of_all_stages(layout, how, tied, pipeline, layers):
    spec, batch = small(tie_word_embeddings=tied, num_hidden_layers=layers), update(**how)
    layout = layout.model_copy(update={"pipeline": min(pipeline, layers)})
    stages = range(layout.pipeline)
    held = [parallel.stage_memory(spec, layout, batch, stage).total for stage in stages]
    moved = [sum(one.bytes for one in parallel.stage_traffic(spec, layout, batch, stage)) for stage in stages]
    assert parallel.rank_memory(spec, layout, batch).total == max(held)
    assert sum(one.bytes for one in parallel.traffic(spec, layout, batch)) == max(moved)


@settings(deadline=None)
@given(layouts, choices, st.booleans(), st.sampled_from([1.0, 1e-3, 1e-6]))
def test_an_update_takes_as_long_as_the_stage_that_sends_longest(layout, how, tied, slower):
    """Not the one that sends most: its links may be the faster ones."""
    spec, batch = small(tie_word_embeddings=tied), update(**how)
    links = Links(within=4e7, between=4e7 * slower, per_node=4)
    time = parallel.step_time(spec, layout, batch, A800, links)
    for stage in range(layout.pipeline):
        moves = parallel.stage_traffic(spec, layout, batch, stage)
        sent = sum(move.bytes / links.bandwidth(move.axis, layout) for move in moves)
        assert time.total >= (time.compute + sent) * (1 - 1e-9)


def test_a_rank_is_one_device_of_a_row():
    """A GPU of those that a row counts, or a CPU with all its cores."""
    spec, batch = small(), update()
    for kind, count, share in (("cuda", 1, 1), ("cuda", 4, 4), ("cpu", 1, 1), ("cpu", 4, 1)):
        row = dataclasses.replace(A800, kind=kind, count=count)
        time = parallel.step_time(spec, Layout(), batch, row, LINKS)
        assert time.compute == pytest.approx(share * seconds(spec, Layout(), batch).compute)


def test_early_stages_hold_the_micro_batches_under_way():
    spec = small(num_hidden_layers=16)
    layout, batch = Layout(pipeline=4), update(rows=8)
    kept = [parallel.stage_memory(spec, layout, batch, stage).activations for stage in range(4)]
    one = batch.tokens * memory.layer_bytes_per_token(spec, 40, "bfloat16", "sdpa") * 4
    head = batch.tokens * memory.head_bytes_per_token(spec, "bfloat16")
    assert kept == [4 * one, 3 * one, 2 * one, one + head]
    two = [parallel.stage_memory(spec, layout, update(rows=2), stage).activations for stage in range(4)]
    assert two == [2 * one, 2 * one, 2 * one, one + head]


def test_data_ranks_send_what_rings_send():
    spec, batch = small(), update(rows=32)
    n = flops.parameters(spec)
    share = 3 / 4  # of a ring of four
    for batches, rows in ((8, 32), (2, 8)):
        batch = update(rows=rows)
        by = {kind: sent(spec, Layout(data=4, sharding=kind), batch) for kind in SHARDINGS}
        assert by["none"] == {("data", "all-reduce"): 2 * share * 4 * n}
        assert by["zero1"] == {("data", "reduce-scatter"): share * 4 * n, ("data", "all-gather"): share * 2 * n}
        assert by["zero2"][("data", "reduce-scatter")] == batches * share * 4 * n
        assert by["zero2"][("data", "all-gather")] == share * 2 * n
        assert by["full"][("data", "reduce-scatter")] == batches * share * 4 * n
        assert by["full"][("data", "all-gather")] == 2 * batches * share * 2 * n


@pytest.mark.parametrize("recompute, gathers, scatters", [("none", 3, 2), ("layers", 4, 3)])
def test_tensor_ranks_gather_and_scatter_around_every_block(recompute, gathers, scatters):
    spec, layout = small(num_hidden_layers=2), Layout(tensor=4)
    moved = sent(spec, layout, update(rows=3, recompute=recompute))
    one = 3 / 4 * 40 * 64 * 2  # a ring of four; tokens, channels, bytes
    assert moved[("tensor", "all-gather")] == 3 * one * (2 * 2 * gathers + 1 + 2)
    assert moved[("tensor", "reduce-scatter")] == 3 * one * (2 * 2 * scatters + 1 + 1)
    assert len(moved) == 2


def test_stages_send_the_stream_on_and_its_gradient_back():
    stream = 8 * 40 * 64 * 2
    assert sent(small(), Layout(pipeline=2), update(rows=8)) == {("pipeline", "point-to-point"): stream}
    assert sent(small(), Layout(pipeline=4), update(rows=8)) == {("pipeline", "point-to-point"): 2 * stream}
    tied = sent(small(tie_word_embeddings=True, vocab_size=16_000), Layout(pipeline=2), update(rows=8))
    assert tied[("pipeline", "all-reduce")] == 4 * 16_000 * 64


def test_tokens_go_to_their_experts_and_back_in_both_passes():
    spec, layout = small(**MIXTURE), Layout(data=8, expert=4)
    moved = sent(spec, layout, update(rows=16))
    assert moved[("expert", "all-to-all")] == 2 * 4 * 4 * 3 / 4 * 2 * 40 * 64 * 2
    assert ("expert", "all-to-all") not in sent(spec, Layout(data=8), update(rows=16))
    experts = sum(op.parameters * op.count for op in flops.operators(spec, 1) if op.copies > 1)
    shared = flops.parameters(spec) - experts
    assert moved[("data", "all-reduce")] == 2 * 4 * (7 / 8 * shared + 1 / 2 * experts / 4)


@pytest.mark.parametrize("recompute, passes, gathers", [("none", 4, 3), ("layers", 6, 4)])
def test_tensor_ranks_send_their_parts_of_tokens_and_gather_them_at_every_expert(recompute, passes, gathers):
    spec, layout = small(**MIXTURE), Layout(data=4, tensor=2, expert=4)
    moved = sent(spec, layout, update(rows=4, recompute=recompute))
    stream = 40 * 64 * 2
    assert moved[("expert", "all-to-all")] == 3 / 4 * 4 * passes * 2 * stream / 2
    assert moved[("tensor", "all-gather")] == 1 / 2 * stream * (4 * (1 + 2) * gathers + 1 + 2)
    assert sent(spec, Layout(tensor=2), update(rows=1))[("tensor", "all-gather")] == 1 / 2 * stream * (4 * 2 * 3 + 3)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_logits_take_three_float32_copies(peak_bytes, compute):
    head = torch.zeros(4096, 8, requires_grad=True)
    hidden, targets = torch.zeros(40, 8, requires_grad=True), torch.zeros(40, dtype=torch.long)

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):
            total = functional.cross_entropy(functional.linear(hidden, head).float(), targets)
        total.backward()

    rank = parallel.rank_memory(small(vocab_size=4096), Layout(), update(compute=compute))
    assert rank.logits == pytest.approx(peak_bytes(loss), rel=0.25)


def test_the_last_stage_s_ranks_hold_their_part_of_the_logits():
    rank = parallel.stage_memory(small(), Layout(tensor=4, pipeline=2), update(), 1)
    assert rank.logits == 12 * 40 * 160 / 4
    assert parallel.stage_memory(small(), Layout(tensor=4, pipeline=2), update(), 0).logits == 0


@given(st.integers(1, 16), st.integers(1, 64))
def test_the_bubble_is_the_time_in_which_the_pipe_fills_and_drains(stages, batches):
    share = parallel.bubble_share(Layout(pipeline=stages), batches)
    assert share == pytest.approx(1 - batches / (batches + stages - 1))
    assert parallel.bubble_share(Layout(pipeline=stages), 2 * batches) <= share


def test_the_bubble_of_a_step_is_its_share():
    spec, layout = small(num_hidden_layers=8), Layout(pipeline=4)
    time = seconds(spec, layout, update(rows=12))
    assert time.bubble / (time.compute + time.bubble) == pytest.approx(parallel.bubble_share(layout, 12))


def test_products_take_as_long_as_the_peak_that_they_reach_says_and_hidden_traffic_takes_none():
    spec, layout, batch = small(), Layout(data=4, tensor=2), update()
    best = seconds(spec, layout, batch)
    half = seconds(spec, layout, batch, efficiency=0.5)
    assert half.compute == pytest.approx(2 * best.compute) and half.tensor == best.tensor
    for overlap in (0.0, 0.25, 1.0):
        assert seconds(spec, layout, batch, overlap=overlap).data == pytest.approx((1 - overlap) * best.data)
    assert best.compute == pytest.approx(32 * 40 * flops.training_flops(spec, 40) / 8 / A800.peak_flops["bfloat16"])


def test_a_group_within_a_node_sends_over_its_links():
    layout = Layout(data=8, tensor=4, pipeline=2, expert=2)
    speeds = {axis: LINKS.bandwidth(axis, layout) for axis in ("tensor", "expert", "data", "pipeline")}
    assert speeds == {"tensor": 2e11, "expert": 2e11, "data": 2.5e10, "pipeline": 2.5e10}
    for axis, size in sent(small(**MIXTURE), layout, update()).items():
        assert size > 0, axis
    time = seconds(small(**MIXTURE), layout, update())
    total = {}
    for (axis, _), size in sent(small(**MIXTURE), layout, update()).items():
        total[axis] = total.get(axis, 0) + size / speeds[axis]
    assert {axis: getattr(time, axis) for axis in total} == pytest.approx(total)


@pytest.mark.parametrize(
    "layout, axis",
    [
        ({"tensor": 3}, "tensor"),
        ({"pipeline": 3}, "pipeline"),
        ({"data": 4, "expert": 2}, "expert"),
        ({"data": 5}, "data"),
    ],
)
def test_an_axis_that_does_not_divide_what_it_splits_is_refused_by_name(layout, axis):
    with pytest.raises(RecipeError) as refused:
        parallel.rank_memory(small(), Layout(**layout), update())
    assert refused.value.where == f"layout.{axis}"


# FLM-101B's stages on 24 nodes of 8 A800 (arXiv 2309.03852, section 4): layers, channels, heads, data x tensor x
# pipeline, rows, billions of tokens a day. Its gated MLP here has as many weights as GPT's. The paper prints the shape
# of the last stage alone; the others are ones of as many parameters.
FLM = {
    "16B": (32, 6144, 48, (96, 2, 1), 2304, 25.48),
    "51B": (60, 8192, 64, (24, 4, 2), 2304, 7.38),
    "101B": (80, 10_240, 80, (12, 4, 4), 2160, 4.06),
}


@pytest.fixture(params=FLM)
def flm(request):
    layers, hidden, heads, (data, tensor, pipeline), rows, tokens_a_day = FLM[request.param]
    spec = ModelSpec(
        family="llama", vocab_size=100_256, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads
    )
    layout = Layout(data=data, tensor=tensor, pipeline=pipeline, sharding="zero1")
    assert layout.ranks == 192
    assert flops.parameters(spec) / 1e9 == pytest.approx(float(request.param.removesuffix("B")), rel=0.025)
    return spec, layout, Update(rows, 1, 2048), tokens_a_day


def test_flm_s_layouts_fit_their_devices_and_would_not_with_state_on_every_rank(flm):
    spec, layout, batch, _ = flm
    assert parallel.rank_memory(spec, layout, batch).total < A800.memory_bytes
    whole = layout.model_copy(update={"sharding": "none"})
    assert parallel.rank_memory(spec, whole, batch).total > A800.memory_bytes
    single = Layout(data=192, sharding="zero1")
    assert parallel.rank_memory(spec, single, Update(192, 1, 2048)).total > A800.memory_bytes


def test_flm_s_tokens_a_day_are_half_to_two_thirds_of_what_peaks_and_links_allow(flm):
    spec, layout, batch, published = flm
    at_most = batch.rows * 2048 * 86_400 / seconds(spec, layout, batch).total / 1e9
    assert 0.5 < published / at_most < 0.67


def test_flm_s_products_reached_half_of_the_peak_or_a_little_more(flm):
    """What is left for them of the published time, once what was sent and waited for is taken off."""
    spec, layout, batch, published = flm
    tokens = batch.rows * 2048 * 86_400 / 1e9
    slower, faster = (tokens / seconds(spec, layout, batch, efficiency=share).total for share in (0.49, 0.57))
    assert slower < published < faster
