"""Paths to a shape: each can be grown, is as long as it says, and has the proportions of its paper."""

from itertools import pairwise

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier.budget import flops
from espalier.errors import RecipeError
from espalier.grow.progressive import GrowthRecipe
from espalier.grow.stages import PATHS, StagesRecipe, grow_stages
from espalier.run import Run

TARGET = {"hidden_size": 768, "num_hidden_layers": 24, "head_dim": 64, "tokens": 3e9}


@pytest.fixture
def write(tmp_path_factory):
    """The recipe that comes out, and its path."""

    def write(told=None, **values):
        recipe = StagesRecipe(**values)
        with Run.start(tmp_path_factory.mktemp("stages") / "run", recipe, tell=(told or []).append) as run:
            part = GrowthRecipe.model_validate(yaml.safe_load(grow_stages(recipe, run)))
        return part, [stage.spec for stage in part.path(recipe.vocab_size)]

    return write


def shares(part: GrowthRecipe) -> list[float]:
    return [duration.amount for duration in part.durations()]


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    style=st.sampled_from(list(PATHS)),
    layers=st.integers(2, 40),
    heads=st.integers(2, 16),
    groups=st.integers(1, 4),
    head_dim=st.sampled_from([16, 64]),
)
def test_every_path_leads_to_the_target_without_shrinking(write, style, layers, heads, groups, head_dim):
    values = {
        "num_hidden_layers": layers,
        "hidden_size": heads * groups * head_dim,
        "head_dim": head_dim,
        "num_attention_heads": heads * groups,
        "num_key_value_heads": groups,
    }
    part, specs = write(style=style, **values)
    assert sum(shares(part)) == pytest.approx(1, abs=1e-3)
    last = specs[-1]
    assert {key: getattr(last, key) for key in values} == values
    sizes = [flops.parameters(spec) for spec in specs]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_flm_has_the_paper_s_proportions(write):
    part, specs = write(style="flm", **TARGET | {"num_hidden_layers": 80, "hidden_size": 8192, "head_dim": 128})
    sizes = [flops.parameters(spec) for spec in specs]
    assert [size / sizes[-1] for size in sizes] == pytest.approx([16 / 101, 51 / 101, 1], rel=0.1)
    tokens = [share / flops.training_flops(spec, 256) for share, spec in zip(shares(part), specs, strict=True)]
    assert [each / sum(tokens) for each in tokens] == pytest.approx([0.788, 0.127, 0.085], rel=0.01)
    assert [stage.rate for stage in part.stages] == [1.0, 0.85, 0.5]
    assert part.schedule.at_growth == "segments"


def test_flm_saves_what_the_paper_says(write, tmp_path):
    told: list[str] = []
    recipe = StagesRecipe(style="flm", **TARGET | {"num_hidden_layers": 80, "hidden_size": 8192, "head_dim": 128})
    with Run.start(tmp_path / "run", recipe, tell=told.append) as run:
        grow_stages(recipe, run)
    assert float(told[0].split()[-4]) == pytest.approx(3.56, rel=0.1)


def test_msg_changes_one_dimension_at_a_time(write):
    part, specs = write(style="msg", **TARGET)
    changed = []
    for before, after in pairwise(specs):
        keys = {key for key in before.fields() if before.fields()[key] != after.fields()[key]}
        changed.append(keys - {"rms_norm_eps", "logits_scaling"})
    heads = {"num_attention_heads", "num_key_value_heads"}
    assert changed == [{"intermediate_size"}, {"num_hidden_layers"}, {"hidden_size"}, heads, {"num_hidden_layers"}]
    assert all(stage.width == stage.depth == "masked" for stage in part.stages[1:])
    assert (specs[0].num_hidden_layers, specs[0].hidden_size, specs[0].intermediate_size) == (6, 512, 512)


def test_stack_grows_once_and_when_the_formula_says(write):
    part, specs = write(style="stack", **TARGET | {"factor": 3})
    assert [spec.num_hidden_layers for spec in specs] == [8, 24]
    small, large = (flops.training_flops(spec, 256) for spec in specs)
    first = shares(part)[0] / small / (shares(part)[0] / small + shares(part)[1] / large)
    assert 0.05 < first <= 0.1
    assert part.stages[1].optimizer_state == "fresh" and part.schedule.at_growth == "fresh"


def test_a_target_without_anything_smaller_is_refused(write):
    with pytest.raises(RecipeError, match="nothing to grow from"):
        write(style="msg", num_hidden_layers=1, hidden_size=16, head_dim=16, intermediate_size=8)
