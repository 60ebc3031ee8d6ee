"""The probe: speeds of the very shape, measured once and kept."""

import pytest

from espalier.train import probe as module
from espalier.train.objectives import NextToken
from espalier.train.probe import Speed, probe
from espalier.train.recipe import OptimizerRecipe


@pytest.fixture
def measured(monkeypatch) -> list[int]:
    """One entry for each micro-batch that was timed."""
    passes = []
    original = module.backward
    monkeypatch.setattr(module, "backward", lambda *args: passes.append(1) or original(*args))
    return passes


@pytest.fixture
def speed_of(spec, device, tmp_path):
    def speed_of(changed=None, rows: int = 2, length: int = 16, **optimizer) -> Speed:
        shape = spec.changed(**changed) if changed else spec
        told = {"micro_rows": rows, "sequence_length": length, "home": tmp_path}
        return probe(shape, module.Parametrization(), OptimizerRecipe(**optimizer), NextToken(), device, **told)

    return speed_of


def test_a_speed_is_measured_once_for_what_it_depends_on(speed_of, measured):
    first = speed_of()
    passes = len(measured)
    assert first.per_token > 0 and first.per_update > 0 and first.ready > 0
    assert speed_of() == first
    assert len(measured) == passes
    others = [speed_of({"num_hidden_layers": 1}), speed_of(rows=1), speed_of(length=8), speed_of(name="adamw")]
    assert len(measured) == 5 * passes
    assert len({first, *others}) == 5


def test_a_wider_model_takes_longer(speed_of):
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16}
    assert speed_of(wide).per_token > speed_of().per_token


def test_an_update_s_time_is_spread_over_its_tokens():
    speed = Speed(per_token=2.0, per_update=100.0, ready=9.0)
    assert speed.seconds_per_token(50) == 4.0
    assert speed.seconds_per_token(100) == 3.0
