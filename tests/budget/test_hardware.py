"""The catalogue and the user's figures over it, the benchmark, and what is remembered of it."""

import importlib
import json
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict, fields, replace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espalier import budget
from espalier.budget import hardware
from espalier.errors import RecipeError
from espalier.run import Run

# What every row of the catalogue states; a GPU also states how fast its link is. Only a benchmark finds the rest.
MEASURED = {"busy_cores", "kernel_seconds"}
FIGURES = {field.name for field in fields(hardware.Hardware)} - {"name", "kind", "count", "sources", *MEASURED}
STATED = {"cpu": FIGURES - {"link_bandwidth"}, "cuda": FIGURES}


def own(home, text):
    (home / "hardware.yaml").write_text(text)
    return home


@pytest.fixture
def row(tmp_path):
    return hardware.catalogue(tmp_path)["vcpu"]


@pytest.fixture
def measured(monkeypatch, row):
    """A stand-in for the benchmark, and the list of its calls."""
    calls = []

    def measure(**arguments):
        calls.append(arguments)
        return replace(row, name="a bench", count=4)

    monkeypatch.setattr(hardware, "measure", measure)
    return calls


def test_every_figure_in_the_catalogue_says_where_it_comes_from_and_when(tmp_path):
    for key, row in hardware.catalogue(tmp_path).items():
        assert set(row.sources) == STATED[row.kind], key
        for source in row.sources.values():
            assert re.match(r"(measured|estimated) \d{4}-\d\d(-\d\d)?: \w+", source), (key, source)


def test_every_row_has_positive_figures(tmp_path):
    for key, row in hardware.catalogue(tmp_path).items():
        assert all(row.peak_flops.values()), key
        assert all(getattr(row, figure) for figure in STATED[row.kind]), key


def test_the_figures_of_every_row_are_plausible(tmp_path):
    """Wide bounds, in which a wrong prefix or unit would stand out."""
    for key, row in hardware.catalogue(tmp_path).items():
        float32, bfloat16 = row.peak_flops["float32"], row.peak_flops["bfloat16"]
        assert 1 <= bfloat16 / float32 <= 32, key
        assert 2 <= bfloat16 / row.memory_bandwidth <= 500, f"{key}: FLOPs a byte"
        assert 1 / 1000 <= row.memory_bytes / row.memory_bandwidth <= 2, f"{key}: seconds to read the memory"
        assert 1 / 100 <= row.link_bandwidth / row.memory_bandwidth <= 1 / 3 or row.kind == "cpu", key
        assert 1e9 <= bfloat16 / row.watts <= 5e12, f"{key}: FLOP/J"
        assert 0.01 <= row.usd_per_hour / row.watts * 100 <= 3, f"{key}: USD an hour for 100 W"


@pytest.mark.parametrize(
    ("figure", "order"),
    [
        ("peak_flops", "t4 a10 a40 l40 l40s"),
        ("peak_flops", "v100-32g a100-40g h100-80g mi300x b200"),
        ("peak_flops", "vcpu laptop-cpu epyc-9654 xeon-8480"),
        ("memory_bytes", "t4 v100-32g a100-40g a100-80g h200 b200 mi300x"),
        ("memory_bandwidth", "vcpu laptop-cpu l4 a10 a40 l40s v100-32g a100-40g a100-80g h100-80g h200 mi300x b200"),
        ("memory_bandwidth", "rtx-3090 rtx-4090 rtx-5090"),
        ("link_bandwidth", "t4 a40 v100-32g a800-80g a100-80g mi300x h100-80g b200"),
        ("usd_per_hour", "t4 l4 l40s a100-40g a100-80g h100-80g h200 b200"),
    ],
)
def test_devices_stand_in_the_order_that_their_makers_give_them(tmp_path, figure, order):
    rows = [hardware.catalogue(tmp_path)[key] for key in order.split()]
    figures = [row.peak_flops["bfloat16"] if figure == "peak_flops" else getattr(row, figure) for row in rows]
    assert figures == sorted(set(figures))


def test_the_users_figures_lie_over_the_shipped_ones_and_say_so(tmp_path):
    before = hardware.catalogue(tmp_path)
    after = hardware.catalogue(
        own(tmp_path, "hardware: {h100-80g: {usd_per_hour: 1.9, peak_flops: {float32: 6e13, bfloat16: 4e14}}}")
    )
    changed = after.pop("h100-80g")
    base = before.pop("h100-80g")
    assert after == before
    assert changed.usd_per_hour == 1.9
    assert changed.peak_flops == {"float32": 6e13, "bfloat16": 4e14}
    stated = f"stated in {tmp_path / 'hardware.yaml'}"
    assert changed.sources == base.sources | {"usd_per_hour": stated, "peak_flops": stated}


def test_a_region_changes_the_carbon_of_every_row_and_nothing_else(tmp_path):
    before = hardware.catalogue(tmp_path)
    after = hardware.catalogue(own(tmp_path, "region: fr"))
    assert {row.kgco2e_per_kwh for row in before.values()} == {0.48}
    assert {row.kgco2e_per_kwh for row in after.values()} == {0.05}
    assert all("France" in row.sources["kgco2e_per_kwh"] for row in after.values())
    assert {key: (row.watts, row.usd_per_hour) for key, row in after.items()} == {
        key: (row.watts, row.usd_per_hour) for key, row in before.items()
    }


def test_a_region_can_be_added(tmp_path):
    home = own(tmp_path, "region: roof\ngrid: {roof: {kgco2e_per_kwh: 0.03, source: 'stated: our panels'}}")
    row = hardware.catalogue(home)["vcpu"]
    assert (row.kgco2e_per_kwh, row.sources["kgco2e_per_kwh"]) == (0.03, "stated: our panels")


def test_a_complete_row_can_be_added(tmp_path, row):
    values = asdict(row) | {"name": "ours", "watts": 77.0}
    home = own(tmp_path, json.dumps({"hardware": {"ours": values}}))
    assert hardware.catalogue(home)["ours"].watts == 77


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("region: mars", "region", "'mars'"),
        ("hardware: {vcpu: {wats: 5}}", "hardware.vcpu.wats", "an unknown figure"),
        ("hardware: {vcpu: {watts: -5}}", "hardware.vcpu.watts", "-5"),
        ("hardware: {vcpu: {watts: .inf}}", "hardware.vcpu.watts", "inf"),
        ("here: {peak_flops: {bfloat16: 9}}", "here.peak_flops", "{'bfloat16': 9}"),
        ("hardware: {mine: {watts: 5}}", "hardware.mine.name", "nothing"),
        ("hardwares: {}", "hardwares", "unknown key 'hardwares'"),
        ("here: {count: 0}", "here.count", "0"),
    ],
)
def test_a_wrong_figure_is_refused_by_file_and_place(tmp_path, measured, text, where, found):
    home = own(tmp_path, text)
    hardware.remember(hardware.measure(), home)
    with pytest.raises(RecipeError) as refusal:
        hardware.here(home=home)
    assert str(home / "hardware.yaml") in refusal.value.where
    assert refusal.value.where.endswith(where)
    assert refusal.value.found == found


def test_measure_finds_speed_memory_and_price_of_this_machine(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(hardware, "free_cores", lambda: threads + 1)
    row = hardware.measure(seconds=0.02, home=tmp_path)
    assert row.kind == "cpu"
    assert row.count == hardware.available_cores()
    assert row.memory_bytes == psutil.virtual_memory().total
    # A core does between 1 and 1000 GFLOP/s in large products, and copies at 0.1 to 1000 GB/s.
    assert all(1e9 < peak < 1e12 * row.count for peak in row.peak_flops.values())
    assert 1e8 < row.memory_bandwidth < 1e12
    assert torch.get_num_threads() == threads
    # An operator takes between 100 ns and 1 ms to start, whatever the load.
    assert 1e-7 < row.kernel_seconds < 1e-3
    for figure in ("peak_flops", "memory_bytes", "memory_bandwidth", "kernel_seconds"):
        assert re.match(r"measured \d{4}-\d\d-\d\d on \d+ of \d+ cores", row.sources[figure])
        assert f" on {threads + 1} of " in row.sources[figure]
    assert all(row.sources[figure].startswith("estimated") for figure in ("watts", "usd_per_hour", "kgco2e_per_kwh"))


def test_the_cores_of_a_cpu_are_priced_together(tmp_path, row, monkeypatch):
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None)
    prices = hardware._prices("some CPU", "cpu", 6, tmp_path)
    assert (prices["watts"], prices["usd_per_hour"]) == pytest.approx((6 * row.watts, 6 * row.usd_per_hour))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A800-SXM4-80GB", "a800-80g"),
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090"),
        ("NVIDIA Quite New", "gpu"),
        ("NVIDIA A10G", "a10"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA RTX A4000", "gpu"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-PCIE-40GB", "a100-40g"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_gpus_are_priced_by_the_row_that_fits_their_name(tmp_path, name, key):
    row = hardware.catalogue(tmp_path)[key]
    prices = hardware._prices(name, "cuda", 8, tmp_path)
    assert (prices["watts"], prices["usd_per_hour"]) == (8 * row.watts, 8 * row.usd_per_hour)
    assert prices["link_bandwidth"] == row.link_bandwidth, "of each device"


@pytest.mark.parametrize(("key", "count", "devices"), [("h100-80g", 1, 8), ("h100-80g", 4, 1), ("laptop-cpu", 8, 1)])
def test_a_part_of_a_row_has_its_share_of_everything_that_adds_up(tmp_path, key, count, devices):
    row = replace(hardware.catalogue(tmp_path)[key], count=count, kernel_seconds=1e-6)
    part = row.part(devices)
    share = devices if row.kind == "cpu" else devices / count
    assert part.peak_flops == pytest.approx({dtype: share * peak for dtype, peak in row.peak_flops.items()})
    for figure in ("memory_bytes", "memory_bandwidth", "watts", "usd_per_hour"):
        assert getattr(part, figure) == pytest.approx(share * getattr(row, figure))
    assert (part.kernel_seconds, part.link_bandwidth) == (row.kernel_seconds, row.link_bandwidth)
    assert part.count == (devices if row.kind == "cuda" else devices * count)
    assert row.part(count if row.kind == "cuda" else 1) == row


def test_hardware_is_found_by_its_key_and_the_machine_at_hand_by_here(tmp_path, measured):
    assert hardware.named("l4", home=tmp_path) == hardware.catalogue(tmp_path)["l4"]
    assert hardware.named("here", home=tmp_path).name == "a bench"
    with pytest.raises(RecipeError, match="Did you mean 'l4"):
        hardware.named("l5", home=tmp_path)
    with pytest.raises(RecipeError, match=r"Choose one, or add a row to .*hardware\.yaml"):
        hardware.named("#", home=tmp_path)


def test_this_machine_is_measured_once(tmp_path, measured):
    first = hardware.here(home=tmp_path / "new")
    assert hardware.here(home=tmp_path / "new") == first
    assert first.name == "a bench"
    assert len(measured) == 1


@pytest.mark.parametrize("change", ["cpu", "cores", "gpus", "visible", "torch"])
def test_another_machine_is_measured_again(tmp_path, measured, monkeypatch, change):
    hardware.here(home=tmp_path)
    machine = hardware._machine() | {change: "another"}
    monkeypatch.setattr(hardware, "_machine", lambda: machine)
    hardware.here(home=tmp_path)
    hardware.here(home=tmp_path)
    assert len(measured) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"machine": {}}', "null"])
def test_a_damaged_memory_is_measured_again(tmp_path, measured, content):
    first = hardware.here(home=tmp_path)
    (tmp_path / "hardware.json").write_text(content)
    assert hardware.here(home=tmp_path) == first
    assert len(measured) == 2


def test_a_new_price_needs_no_new_measurement(tmp_path, measured):
    hardware.here(home=tmp_path)
    own(tmp_path, "region: fr\nhere: {usd_per_hour: 0, watts: 65}")
    row = hardware.here(home=tmp_path)
    assert (row.usd_per_hour, row.watts, row.kgco2e_per_kwh) == (0, 65, 0.05)
    assert row.sources["watts"].startswith("stated in")
    assert len(measured) == 1


@given(st.floats(1e9, 1e15), st.floats(0.1, 10))
def test_bfloat16_is_chosen_where_it_is_clearly_faster(float32, ratio):
    row = hardware.Hardware("x", "cpu", 1, {"float32": float32, "bfloat16": ratio * float32}, 1, 1, 1, 1, 1, {})
    assert hardware.compute_dtype(row) == ("bfloat16" if ratio > 1.2 else "float32")


Usage = namedtuple("Usage", "idle iowait")


@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.data())
def test_free_cores_are_the_idle_ones_that_we_may_use(percents, data):
    ours = data.draw(st.sets(st.integers(0, len(percents) - 1), min_size=1))
    limit = data.draw(st.sampled_from(["", "1", "2", "3,2", "many", "0"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil, "cpu_times_percent", lambda **_: [Usage(percent, 0) for percent in percents])
        patch.setattr(hardware.os, "sched_getaffinity", lambda _: ours)
        patch.setenv("OMP_NUM_THREADS", limit)
        free = hardware.free_cores()
    idle = sum(percents[core] for core in ours) / 100
    allowed = {"1": 1, "2": 2, "3,2": 3}.get(limit, len(ours))
    assert 1 <= free <= allowed
    assert free == 1 or free == allowed or abs(free - idle) <= 0.5


def test_cores_that_wait_for_the_disk_are_free(monkeypatch):
    monkeypatch.setattr(psutil, "cpu_times_percent", lambda **_: [Usage(0, 100), Usage(50, 50)])
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert hardware.free_cores() == 2


def test_a_real_sample_finds_at_least_one_core():
    assert 1 <= hardware.free_cores(0.05) <= hardware.available_cores()


def test_bench_measures_charges_and_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))
    module, _, function = budget.METHODS["bench"].partition(":")
    bench = getattr(importlib.import_module(f"espalier.budget.{module}"), function)
    told = []
    run = Run.start(tmp_path / "run", hardware.BenchRecipe(seconds=0.02), tell=told.append)
    try:
        row = bench(run.recipe, run)
    finally:
        run.close()
    assert run.ledger.spent(kind="bench").seconds > 0
    assert "GFLOP/s" in told[-1]
    monkeypatch.setattr(hardware, "measure", None)
    assert hardware.here(home=tmp_path / "home") == row


def test_budget_is_imported_without_torch():
    modules = ", ".join(f"espalier.budget.{name}" for name in ("hardware", "flops", "memory", "price"))
    script = f"import sys, {modules}; sys.exit(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
