"""Reshaping moves old slots unchanged, fills new ones by rule, and treats moments as the weights."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espalier.errors import RunError
from espalier.model import build, reshape
from espalier.model.axes import discover
from espalier.model.growth import NEW, Growth, IndexMap, LayerMap
from espalier.model.layout import Axis, Block, Layout
from espalier.model.reshape import after, apply, apply_moment
from espalier.spec import ModelSpec

SPEC = ModelSpec(vocab_size=8, hidden_size=4, num_hidden_layers=2, num_attention_heads=2)
WRITER, READER, NORM = "layers.0.down.weight", "layers.0.up.weight", "norm.weight"
SIZES = st.tuples(st.integers(1, 6), st.integers(0, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def layout(hidden: int = 4, ffn: int = 6, unit: int = 1) -> Layout:
    """Two layers that write and read a residual stream, and a norm behind them."""
    tensors = {NORM: (Axis.of("hidden", hidden, 1, "along"),)}
    parts = {NORM: frozenset({"scales_residual", "final_norm"})}
    for layer in (0, 1):
        down, up = f"layers.{layer}.down.weight", f"layers.{layer}.up.weight"
        tensors[down] = (Axis.of("hidden", hidden, 1, "out"), Axis.of("heads", ffn, unit, "in"))
        tensors[up] = (Axis.of("heads", ffn, unit, "out"), Axis.of("hidden", hidden, 1, "in"))
        parts |= {down: frozenset({"writes_residual"}), up: frozenset({"reads_residual"})}
    return Layout(SPEC, tensors, parts, "layers.")


def weights(of: Layout) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn([axis.size for axis in axes], generator=generator) for name, axes in of.tensors.items()}


def growth(**more) -> Growth:
    return Growth("test", SPEC, SPEC, **{"exact": False, "layers": LayerMap.same(2), **more})


def grown(change: Growth, of: Layout, old: dict[str, torch.Tensor], *, seed: int = 0, std: float = 1.0):
    return dict(apply(change, of, old.__getitem__, seed=seed, std_of=lambda name, shape: std))


@given(groups=SIZES, each=SIZES)
def test_grouped_heads_keep_their_group_and_their_place_in_it(groups, each):
    source = IndexMap.grouped((groups[0], each[0]), (groups[1], each[1])).source.reshape(groups[1], each[1])
    old = np.arange(groups[0] * each[0]).reshape(groups[0], each[0])
    assert (source[: groups[0], : each[0]] == old).all()
    assert (source[groups[0] :] == NEW).all() and (source[:, each[0] :] == NEW).all()


@given(hidden=SIZES, heads=SIZES, unit=st.integers(1, 3))
def test_old_elements_stay_bit_for_bit_and_new_ones_follow_the_fill(hidden, heads, unit):
    of = layout(hidden[0], heads[0], unit)
    old = weights(of)
    change = growth(
        maps={"hidden": IndexMap.pad(*hidden), "heads": IndexMap.pad(*heads)},
        fills={"writes_residual": "zero", "scales_residual": "mean"},
    )
    new = grown(change, of, old)
    for name, weight in new.items():
        assert weight.shape == tuple(axis.size for axis in after(of, change).tensors[name])
        corner = tuple(slice(size) for size in old[name].shape)
        assert torch.equal(weight[corner], old[name])
        added = torch.ones_like(weight, dtype=torch.bool)
        added[corner] = False
        if "down" in name:
            assert (weight[added] == 0).all()
        elif "up" in name:
            assert (weight[added] != 0).all()
        else:
            torch.testing.assert_close(weight[added], old[name].mean().expand(hidden[1] - hidden[0]))


@given(source=st.lists(st.integers(0, 3), min_size=1, max_size=8), unit=st.integers(1, 3))
def test_any_index_map_moves_whole_units(source, unit):
    of = layout(ffn=4, unit=unit)
    old = weights(of)
    new = grown(growth(maps={"heads": IndexMap.take(source)}), of, old)
    units = old[READER].view(4, unit, -1)
    assert torch.equal(new[READER].view(len(source), unit, -1), units[source])


SLOTS = st.lists(st.integers(NEW, 3), min_size=1, max_size=9).filter(lambda source: any(slot != NEW for slot in source))


@given(hidden=SLOTS, heads=SLOTS, unit=st.integers(1, 3), copies=st.booleans())
def test_slots_are_moved_run_by_run_as_they_are_gathered(hidden, heads, unit, copies):
    of = layout(4, 4, unit)
    old = weights(of)
    layers = LayerMap((0, 1), donor=(1, 1)) if copies else LayerMap.same(2)
    change = growth(maps={"hidden": IndexMap.take(hidden), "heads": IndexMap.take(heads)}, layers=layers)
    results = []
    for short in (0, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reshape, "SHORT", short)
            moments = dict(apply_moment(change, of, old.get, "exp_avg"))
            results.append(
                {**grown(change, of, old), **{f"moment of {name}": value for name, value in moments.items()}}
            )
    one, other = results
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(hidden=SIZES, heads=SIZES, unit=st.integers(1, 3))
def test_no_value_is_drawn_that_is_not_used(hidden, heads, unit):
    of = layout(hidden[0], heads[0], unit)
    drawn: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshape, "draw", lambda *key: drawn.append(build.draw(*key)) or drawn[-1])
        maps = {"hidden": IndexMap.pad(*hidden), "heads": IndexMap.pad(*heads)}
        new = grown(growth(maps=maps), of, weights(of))
    before = sum(weight.numel() for weight in weights(of).values())
    assert sum(values.numel() for values in drawn) == sum(weight.numel() for weight in new.values()) - before
    together = torch.cat([values.flatten() for values in drawn]) if drawn else torch.zeros(0)
    assert len(together.unique()) == len(together)


def test_shares_act_on_weights_that_read_and_on_the_gradients_of_those_that_write():
    of = layout(ffn=2)
    old = weights(of)
    halves = IndexMap(np.array([0, 0, 1]), np.array([0.25, 0.75, 1.0]))
    change = growth(maps={"heads": halves})
    new = grown(change, of, old)
    torch.testing.assert_close(new[WRITER][:, 0] + new[WRITER][:, 1], old[WRITER][:, 0])
    assert torch.equal(new[READER][0], old[READER][0]) and torch.equal(new[READER][1], old[READER][0])
    for kind, power in {"exp_avg": 1, "exp_avg_sq": 2}.items():
        moments = dict(apply_moment(change, of, old.get, kind))
        assert torch.equal(moments[WRITER][:, 0], old[WRITER][:, 0])
        torch.testing.assert_close(moments[READER][:2], old[READER][[0, 0]] * torch.tensor([[0.25], [0.75]]) ** power)


@pytest.mark.parametrize(("hidden", "noise"), [(32, 0.0), (16, 0.5)])
@pytest.mark.parametrize("tied", [True, False])
def test_moments_after_copying_are_the_gradients_of_the_grown_model(tied, hidden, noise):
    """The rule for copies, checked by autograd on a real model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from espalier.grow.apply import grow_model
    from espalier.grow.width import fpi

    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    small = ModelSpec(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)
    change = fpi(small, small.changed(hidden_size=hidden, intermediate_size=40, num_attention_heads=8), noise)
    old = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small.to_config()))
    new = grow_model(old, [change], seed=0, std_of=lambda name, shape: 0.0)
    ids = torch.randint(0, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    for model in (old, new):
        model(ids, labels=ids).loss.backward()
    gradients = {name: weight.grad for name, weight in old.named_parameters()}
    mapped = dict(apply_moment(change, discover(small.to_config()), gradients.get, "exp_avg"))
    for name, weight in new.named_parameters():
        torch.testing.assert_close(mapped[name], weight.grad, rtol=1e-3, atol=1e-6, msg=name)


@given(hidden=SIZES, heads=SIZES, unit=st.integers(1, 3))
def test_the_mean_of_old_slots_is_written_to_new_ones_and_nothing_is_read_through_them(hidden, heads, unit):
    of = layout(hidden[0], heads[0], unit)
    old = weights(of)
    maps = {"hidden": IndexMap.pad(*hidden), "heads": IndexMap.pad(*heads)}
    new = grown(growth(maps=maps, fills={"writes_residual": "mean"}), of, old)[WRITER]
    rows, columns = old[WRITER].shape
    torch.testing.assert_close(new[rows:, :columns], old[WRITER].mean(0).expand(len(new) - rows, columns))
    assert not new[:, columns:].any()


def test_copied_rows_come_from_the_donor_and_what_is_read_from_the_layer_itself():
    of = layout(ffn=2)
    old = weights(of)
    layers = LayerMap((0, 1), donor=(1, 1))
    change = growth(maps={"heads": IndexMap.copies([0, 1, 0])}, layers=layers)
    new = grown(change, of, old)
    assert torch.equal(new[READER], torch.cat([old[READER], old["layers.1.up.weight"][:1]]))
    torch.testing.assert_close(new[WRITER][:, 0] + new[WRITER][:, 2], old[WRITER][:, 0])


def test_an_offset_is_part_of_what_a_norm_multiplies_by():
    of = dataclasses.replace(layout(), offsets={NORM: 1.0})
    old = weights(of)
    change = growth(
        maps={"hidden": IndexMap.pad(4, 6)}, factors={"scales_residual": 0.5}, fills={"scales_residual": "mean"}
    )
    new = grown(change, of, old)[NORM] + 1
    torch.testing.assert_close(new[:4], (old[NORM] + 1) * 0.5)
    torch.testing.assert_close(new[4:], new[:4].mean().expand(2))


def test_blocks_of_one_axis_move_each_by_its_own_role():
    blocks = (Block("heads", 2, 2), Block("kv_heads", 1, 2))
    of = Layout(SPEC, {"qkv": (Axis(blocks, "out"),)}, {"qkv": frozenset()}, "layers.")
    change = growth(maps={"heads": IndexMap.take([1, 0, 1]), "kv_heads": IndexMap.take([0, 0])})
    new = grown(change, of, {"qkv": torch.arange(6.0)})["qkv"]
    assert new.tolist() == [2, 3, 0, 1, 2, 3, 4, 5, 4, 5]


def test_random_slots_depend_on_seed_name_and_shape_alone():
    of = layout()
    old = weights(of)
    wider, widest = growth(maps={"heads": IndexMap.pad(6, 8)}), growth(maps={"heads": IndexMap.pad(6, 12)})
    one, other = grown(wider, of, old), grown(wider, of, {name: w + 1 for name, w in old.items()})
    assert torch.equal(one[READER][6:], other[READER][6:])
    assert not torch.equal(one[READER][6:], grown(wider, of, old, seed=1)[READER][6:])
    assert not torch.equal(one[READER][6:], one["layers.1.up.weight"][6:])
    assert not torch.equal(one[READER][6:], grown(widest, of, old)[READER][6:8])


def test_random_slots_have_the_standard_deviation_that_the_initialiser_states():
    of = layout()
    asked = []

    def std_of(name, shape):
        asked.append((name, shape))
        return 0.05

    change = growth(maps={"heads": IndexMap.pad(6, 4000)}, fills={"writes_residual": "zero"})
    new = dict(apply(change, of, weights(of).__getitem__, seed=0, std_of=std_of))
    assert asked == [(READER, (4000, 4)), ("layers.1.up.weight", (4000, 4))]
    assert new[READER][6:].std().item() == pytest.approx(0.05, rel=0.05)


def test_layers_come_from_where_the_layer_map_says_and_silent_ones_write_nothing():
    of = layout()
    old = weights(of)
    change = growth(layers=LayerMap((0, 1, 1), frozenset({2})), silent=frozenset({"writes_residual"}), maps={})
    new = grown(change, of, old)
    assert new.keys() == after(of, change).tensors.keys()
    assert torch.equal(new["layers.2.up.weight"], old["layers.1.up.weight"])
    assert torch.equal(new["layers.1.down.weight"], old["layers.1.down.weight"])
    assert not new["layers.2.down.weight"].any() and new["layers.2.down.weight"].shape == (4, 6)


def test_weights_are_multiplied_and_moments_divided_by_the_factor():
    of = layout()
    old = {name: weight.abs() for name, weight in weights(of).items()}
    change = growth(factors={"scales_residual": 4.0, "final_norm": 0.5})
    assert torch.equal(grown(change, of, old)[NORM], old[NORM] * 2)
    assert torch.equal(grown(change, of, old)[READER], old[READER])
    for kind, divisor in {"exp_avg": 2, "momentum_buffer": 2, "exp_avg_sq": 4}.items():
        moments = dict(apply_moment(change, of, old.get, kind))
        assert torch.equal(moments[NORM], old[NORM] / divisor)
        assert torch.equal(moments[READER], old[READER])


def test_moments_of_new_slots_and_of_silent_tensors_are_zero_and_the_step_is_kept():
    of = layout()
    old = {name: torch.ones_like(weight) for name, weight in weights(of).items()}
    change = growth(
        maps={"heads": IndexMap.pad(6, 8)},
        layers=LayerMap((0, 1, 1), frozenset({2})),
        silent=frozenset({"writes_residual"}),
    )
    moments = dict(apply_moment(change, of, old.get, "exp_avg_sq"))
    assert moments[READER][:6].all() and not moments[READER][6:].any()
    assert moments["layers.2.up.weight"][:6].all() and not moments["layers.2.down.weight"].any()
    steps = dict(apply_moment(change, of, lambda name: torch.tensor(7.0), "step"))
    assert steps.keys() == moments.keys() and set(map(float, steps.values())) == {7.0}


def test_weights_without_state_get_none():
    of = layout()
    moments = dict(apply_moment(growth(), of, {NORM: torch.ones(4)}.get, "exp_avg"))
    assert moments.keys() == {NORM}


@pytest.mark.parametrize(("kind", "shape"), [("row", (4,)), ("ax", (4, 6))])
def test_state_that_cannot_be_mapped_is_refused_by_name(kind, shape):
    with pytest.raises(RunError, match=f"{kind} of {WRITER}"):
        dict(apply_moment(growth(), layout(), {WRITER: torch.ones(shape)}.get, kind))


def test_a_growth_keeps_the_precision_of_what_it_is_given():
    of = layout()
    old = {name: weight.bfloat16() for name, weight in weights(of).items()}
    change = growth(maps={"heads": IndexMap.pad(6, 8)}, factors={"scales_residual": 0.3})
    assert {weight.dtype for weight in grown(change, of, old).values()} == {torch.bfloat16}


def test_the_layout_after_a_growth_is_the_one_that_the_grown_config_has():
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "num_hidden_layers": 2}
    small = ModelSpec(**sizes, num_attention_heads=4, num_key_value_heads=2)
    large = small.changed(hidden_size=24, num_hidden_layers=3)
    change = Growth("test", small, large, True, LayerMap((0, 1, 0)), maps={"hidden": IndexMap.pad(16, 24)})
    assert after(discover(small.to_config()), change).tensors == discover(large.to_config()).tensors
