"""Planning from shape to shape: which operators, in which order, and what is refused."""

import subprocess
import sys

import pytest

from espalier.errors import ModelError
from espalier.grow.operators import DEPTH, WIDTH, plan_growth, recorded


def test_width_comes_before_depth_and_leads_to_the_stated_shape(spec):
    after = spec.changed(hidden_size=48, num_attention_heads=8, num_hidden_layers=5)
    growths = plan_growth(spec, after, depth="identity")
    assert [growth.operator for growth in growths] == ["zero_pad", "identity"]
    assert growths[0].before == spec and growths[1].before == growths[0].after
    assert growths[1].after == after.changed(rms_norm_eps=spec.rms_norm_eps / 2)


def test_only_what_changes_is_planned(spec):
    assert plan_growth(spec, spec) == []
    deeper = plan_growth(spec, spec.changed(num_hidden_layers=6), depth="stack")
    assert [growth.operator for growth in deeper] == ["stack"]
    wider = plan_growth(spec, spec.changed(intermediate_size=48))
    assert [growth.operator for growth in wider] == ["zero_pad"]


def test_a_corrected_epsilon_alone_is_no_growth(spec):
    assert plan_growth(spec.changed(rms_norm_eps=1e-3), spec) == []


def test_stages_follow_one_another_from_what_came_out(spec, make, grow, input_ids):
    from espalier.grow.preserve import check

    stages = [spec.changed(hidden_size=32), spec.changed(hidden_size=48, num_hidden_layers=4)]
    model, shape = make(spec), spec
    for stage in stages:
        growths = plan_growth(shape, stage, depth="identity")
        larger = grow(model, *growths)
        assert check(model, larger, input_ids).relative_difference <= 1e-5
        model, shape = larger, growths[-1].after
    assert model.config.rms_norm_eps == pytest.approx(spec.rms_norm_eps / 2)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_stage_that_shrinks_is_refused_by_name(key, spec):
    larger = spec.changed(hidden_size=48, intermediate_size=80, num_hidden_layers=6)
    with pytest.raises(ModelError, match=f"^{key}: .*a stage that shrinks"):
        plan_growth(larger, larger.changed(**{key: getattr(spec, key)}))


def test_every_operator_is_a_value_that_can_be_written_down(spec):
    import json

    wide, deep = ("hidden_size", 48), ("num_hidden_layers", 6)
    for name, build, size, target in [
        *((name, build, *wide) for name, build in WIDTH.items()),
        *((name, build, *deep) for name, build in DEPTH.items()),
    ]:
        record = build(spec, spec.changed(**{size: target})).record()
        assert json.loads(json.dumps(record)) == record
        assert record["operator"] == name and record["changed"][size] == [getattr(spec, size), target]


@pytest.mark.parametrize("width", [*WIDTH])
@pytest.mark.parametrize("depth", [*DEPTH])
def test_a_record_says_what_was_done(spec, width, depth):
    growths = plan_growth(spec, spec.changed(hidden_size=48, num_hidden_layers=6), width=width, depth=depth)
    again = recorded(spec, [growth.record() for growth in growths])
    assert [growth.identity() for growth in again] == [growth.identity() for growth in growths]
    assert recorded(spec, [{"operator": "upcycle", "exact": True}]) == []
    assert recorded(growths[0].after, [growths[0].record()]) == [], "begun from another shape"


def test_planning_needs_no_torch():
    code = "import sys, espalier.grow.operators; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
