"""Rates from a hardware row, and energy meters on a made-up machine."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.budget import price
from espalier.budget.hardware import Hardware

CPU = Hardware("x", "cpu", 2, {"float32": 1e11, "bfloat16": 2e11}, 8 * 10**9, 1e10, 50.0, 0.1, 0.5, {})
GPU = replace(CPU, kind="cuda")
RANGE = 1_000_000
positive = st.floats(0, 1e6)


def zone(powercap, name, label, microjoules):
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(label + "\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    turn(powercap, name, microjoules)


def turn(powercap, name, microjoules):
    (powercap / name / "energy_uj").write_text(f"{microjoules}\n")


class FakeNvml:
    """Two GPUs and the counters of their drivers, in mJ."""

    class NVMLError(Exception):
        pass

    def __init__(self, counters):
        self.counters = counters

    def nvmlInit(self):
        if self.counters is None:
            raise self.NVMLError("no driver")

    def nvmlDeviceGetHandleByIndex(self, index):
        return list(self.counters)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.counters[handle]


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml({"GPU-a": 500, "GPU-b": 7000})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_rates_are_the_rows_own_figures():
    rates = price.rates(CPU)
    assert (rates.usd_per_hour, rates.watts, rates.kgco2e_per_kwh) == (0.1, 50.0, 0.5)
    assert rates.measured == ("seconds",)


@given(positive, positive, positive, st.floats(1, 3))
def test_stated_rates_take_the_place_of_the_rows_even_when_zero(usd, watts, grid, pue):
    rates = price.rates(CPU, usd_per_hour=usd, watts=watts, kgco2e_per_kwh=grid, pue=pue)
    assert (rates.usd_per_hour, rates.watts, rates.kgco2e_per_kwh) == (usd, pue * watts, grid)


def test_pue_raises_energy_and_carbon_but_not_money():
    plain, centre = (price.rates(CPU, pue=pue).cost(3600) for pue in (1.0, 1.5))
    assert plain.kwh == pytest.approx(0.05)
    assert (centre.kwh, centre.kgco2e, centre.usd) == pytest.approx((1.5 * plain.kwh, 1.5 * plain.kgco2e, plain.usd))


def test_flm_101b_draws_40_mwh():
    a800 = price.rates(replace(GPU, watts=400.0), kgco2e_per_kwh=0.64)
    cost = a800.cost(1.01e5 * 3600)
    assert (cost.kwh / 1000, cost.kgco2e / 1000) == pytest.approx((40, 26), rel=0.03)


def test_a_rated_meter_is_watts_times_seconds_and_no_measurement():
    now = SimpleNamespace(seconds=100.0)
    meter = price.RatedMeter(50.0, clock=lambda: now.seconds)
    assert meter.read_kwh() == 0
    now.seconds += 7200
    assert meter.read_kwh() == pytest.approx(0.1)
    assert not meter.measured


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, RANGE - 1), st.integers(0, RANGE - 1)), max_size=10))
def test_packages_are_summed_over_every_wrap(tmp_path_factory, steps):
    powercap = tmp_path_factory.mktemp("powercap")
    counters = [900_000, 10]
    for package, counter in enumerate(counters):
        zone(powercap, f"intel-rapl:{package}", f"package-{package}", counter)
    meter = price.best_meter(CPU, powercap=powercap)
    assert meter.measured
    drawn = 0
    for step in steps:
        for package, microjoules in enumerate(step):
            drawn += microjoules
            counters[package] = (counters[package] + microjoules) % RANGE
            turn(powercap, f"intel-rapl:{package}", counters[package])
        assert meter.read_kwh() == pytest.approx(drawn / 3.6e12)
    assert meter.read_kwh() == pytest.approx(drawn / 3.6e12)


def test_parts_of_a_package_and_the_platform_are_not_counted_twice(tmp_path):
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "psys",
        "intel-rapl-mmio:0": "package-0",  # the same counter once more
    }
    for name, label in zones.items():
        zone(tmp_path, name, label, 0)
    meter = price.best_meter(CPU, powercap=tmp_path)
    for name in zones:
        turn(tmp_path, name, 360_000)
    assert meter.read_kwh() == pytest.approx(1e-7)


@pytest.mark.parametrize("missing", ["everything", "packages", "counter"])
def test_without_readable_counters_the_rated_watts_are_taken(tmp_path, missing):
    if missing != "everything":
        zone(tmp_path, "intel-rapl:0", "psys" if missing == "packages" else "package-0", 0)
    if missing == "counter":
        (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    meter = price.best_meter(CPU, powercap=tmp_path / "absent" if missing == "everything" else tmp_path)
    assert isinstance(meter, price.RatedMeter)
    assert not meter.measured


def test_a_gpus_counter_is_read_from_where_it_stands(nvml):
    meter = price.best_meter(replace(GPU, count=2))
    assert meter.measured
    assert meter.read_kwh() == 0
    nvml.counters["GPU-a"] += 3_600_000
    nvml.counters["GPU-b"] += 3_600_000
    assert meter.read_kwh() == pytest.approx(0.002)


@pytest.mark.parametrize("visible", ["1", "GPU-b", "1,0"])
def test_only_visible_gpus_are_metered(nvml, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = price.best_meter(replace(GPU, count=1))
    nvml.counters["GPU-a"] += 10**9
    nvml.counters["GPU-b"] += 3_600_000
    assert meter.read_kwh() == pytest.approx(0.001)


@pytest.mark.parametrize("module", [None, FakeNvml(None)], ids=["not installed", "no driver"])
def test_without_nvml_the_rated_watts_of_a_gpu_are_taken(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert isinstance(price.best_meter(GPU), price.RatedMeter)
