"""The probe: speeds of the very shape, measured once and kept."""

import time
from types import SimpleNamespace

import pytest
import torch

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


class Queue:
    """A device that begins to work when it is waited for, as a GPU is still at work when a call returns."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def synchronize(self) -> None:
        seconds, self.seconds = self.seconds, 0.0
        time.sleep(seconds)


def test_what_is_timed_is_the_device_s_work_and_not_what_came_before(monkeypatch):
    queue = Queue()
    monkeypatch.setattr(torch, "cuda", queue)
    queue.seconds = 0.2

    def work() -> None:
        queue.seconds += 0.05

    assert 0.05 <= module._timed(work, "cuda") < 0.15


def test_every_part_of_a_probe_waits_for_the_device(speed_of, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: waited.append(1))
    speed_of()
    assert len(waited) == 2 * 2 * 4, "before and after a pass and an update, of four"


def test_another_gpu_of_the_machine_is_another_speed(monkeypatch):
    names = SimpleNamespace(get_device_name=lambda: "NVIDIA H100")
    monkeypatch.setattr(torch, "cuda", names)
    assert module._model_of("cuda") == "NVIDIA H100" != module._model_of("cpu")


def test_a_speed_is_kept_for_the_processor_that_it_was_measured_on(speed_of, measured, monkeypatch):
    speed_of()
    passes = len(measured)
    monkeypatch.setattr(module, "_model_of", lambda kind: f"another {kind}")
    speed_of()
    assert len(measured) == 2 * passes


def test_an_update_s_time_is_spread_over_its_tokens():
    speed = Speed(per_token=2.0, per_update=100.0, ready=9.0)
    assert speed.seconds_per_token(50) == 4.0
    assert speed.seconds_per_token(100) == 3.0
