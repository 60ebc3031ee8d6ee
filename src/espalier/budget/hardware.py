"""Hardware: what a machine can do and what it costs, from a catalogue or from a short benchmark.

`here` is the machine at hand: measured once, remembered in home/hardware.json, priced anew from hardware.yaml each
time. Only `measure` imports torch.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from espalier import files, records
from espalier.errors import RecipeError
from espalier.method import method
from espalier.recipe import Recipe, load
from espalier.run import Run

SHIPPED = Path(__file__).with_name("hardware.yaml")
OWN = "hardware.yaml"  # in home: the user's figures
REMEMBERED = "hardware.json"  # in home: the last benchmark
USUAL_MFU = 0.3  # share of the matmul peak that training reaches, for prices before anything was measured
BFLOAT16_PAYS = 1.2  # a smaller gain in products is eaten by the casts of autocast
FIRST_SIZE, LAST_SIZE = 512, 16_384  # of the square matrices in the benchmark
COPY_NUMBERS = 64 * 2**20  # float32 numbers copied in the benchmark: 256 MiB, more than caches hold
MEASURED = ("peak_flops", "memory_bytes", "memory_bandwidth", "kernel_seconds")
TINY_SIZE, TINY_CALLS = 64, 200  # of the layer whose time is nothing but overhead, and calls of it in a row

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _both_dtypes(peaks: dict[str, float]) -> dict[str, float]:
    if set(peaks) != {"float32", "bfloat16"}:
        raise ValueError("a peak for float32 and one for bfloat16")
    return peaks


@dataclass(frozen=True)
class Hardware:
    """A machine, or the part of one that work is priced on: `count` cores of a CPU or `count` GPUs, together.

    peak_flops        FLOP/s of large matrix products, for float32 and for bfloat16
    memory_bytes      bytes of RAM, or of all GPUs' memory
    memory_bandwidth  B/s of a large copy, read and written bytes both counted
    watts             W under load
    usd_per_hour      USD an hour
    kgco2e_per_kwh    kg of CO2 equivalent a kWh of the grid
    busy_cores        cores that others used while it was measured: its figures are too low by as much
    kernel_seconds    s that an operator takes however little it computes; 0 where nobody measured it
    link_bandwidth    B/s that one device sends to another, one way; 0 for a device that stands alone
    sources           for each figure 'measured' or 'estimated' and a date, how, or 'stated' and by which file
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    kind: Literal["cpu", "cuda"]
    count: Annotated[int, Field(gt=0)]
    peak_flops: Annotated[dict[str, Amount], AfterValidator(_both_dtypes)]
    memory_bytes: Annotated[int, Field(gt=0)]
    memory_bandwidth: Amount
    watts: Amount
    usd_per_hour: Amount
    kgco2e_per_kwh: Amount
    sources: dict[str, str]
    busy_cores: Annotated[int, Field(ge=0)] = 0
    kernel_seconds: Amount = 0.0
    link_bandwidth: Amount = 0.0

    def part(self, devices: int) -> Hardware:
        """The row for `devices` GPUs of its kind, or for as many machines as this one if it is a CPU."""
        share = devices / (self.count if self.kind == "cuda" else 1)
        return replace(
            self,
            count=devices if self.kind == "cuda" else self.count * devices,
            peak_flops={dtype: peak * share for dtype, peak in self.peak_flops.items()},
            memory_bytes=round(self.memory_bytes * share),
            memory_bandwidth=self.memory_bandwidth * share,
            watts=self.watts * share,
            usd_per_hour=self.usd_per_hour * share,
        )


CHECKED = TypeAdapter(Hardware)  # made once: it takes milliseconds


class Grid(Recipe):
    """A region's electricity."""

    kgco2e_per_kwh: Amount
    source: str = "stated by the user"


class Listing(Recipe):
    """The form of hardware.yaml. Rows may be partial in the user's file, so they are checked after merging."""

    region: str = ""
    grid: dict[str, Grid] = Field(default_factory=dict)
    here: dict[str, Any] = Field(default_factory=dict)
    hardware: dict[str, dict[str, Any]] = Field(default_factory=dict)


class BenchRecipe(Recipe):
    """How long to measure."""

    seconds: float = Field(default=3.0, gt=0, description="seconds of benchmark, set-up not counted")


def catalogue(home: Path) -> dict[str, Hardware]:
    """The known hardware by key: what is shipped, with the user's figures in home/hardware.yaml on top."""
    shipped, own = load(Listing, SHIPPED), _own(home)
    grid = _grid(shipped, own, home)
    rows = {}
    for key in shipped.hardware | own.hardware:
        row = {"kgco2e_per_kwh": grid.kgco2e_per_kwh, **shipped.hardware.get(key, {})}
        row["sources"] = {"kgco2e_per_kwh": grid.source, **row.get("sources", {})}
        rows[key] = _stated(row, own.hardware.get(key, {}), home, f"hardware.{key}")
    return rows


def here(*, home: Path) -> Hardware:
    """The machine at hand, measured once and again when its processor, GPUs, cores or torch change.

    A measurement on a busy machine serves this time and isn't remembered.
    """
    machine = _machine()
    hardware = _remembered(home, machine)
    if hardware is None:
        hardware = measure(home=home)
        if not hardware.busy_cores:
            remember(hardware, home)
    priced = {**asdict(hardware), **_prices(hardware.name, hardware.kind, hardware.count, home)}
    priced["sources"] = hardware.sources | priced["sources"]
    return _stated(priced, _own(home).here, home, "here")


def named(key: str, *, home: Path) -> Hardware:
    """The row of the catalogue, or for "here" the machine at hand; an unknown key is refused with the nearest."""
    if key == "here":
        return here(home=home)
    rows = catalogue(home)
    if key not in rows:
        near = difflib.get_close_matches(key, ["here", *rows], n=1, cutoff=0.4)
        raise RecipeError(
            "hardware",
            found=repr(key),
            expected=f"here, or one of {', '.join(rows)}",
            mend=f"Did you mean {near[0]!r}?" if near else f"Choose one, or add a row to {home / OWN}.",
        )
    return rows[key]


def remember(hardware: Hardware, home: Path) -> None:
    """Keep a benchmark of this machine for later calls of `here`."""
    with files.disk_errors(home):
        files.make_folder(home)
    records.write(home / REMEMBERED, {"machine": _machine(), "hardware": asdict(hardware)})


def compute_dtype(hardware: Hardware) -> Literal["bfloat16", "float32"]:
    """The dtype to do products in: bfloat16 where it is clearly faster than float32."""
    peak = hardware.peak_flops
    return "bfloat16" if peak["bfloat16"] > BFLOAT16_PAYS * peak["float32"] else "float32"


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def free_cores(sample_seconds: float = 0.3) -> int:
    """Cores that nobody uses now, from a sample of `sample_seconds` in which this process sleeps.

    The idle time of the cores that this process may run on, summed and rounded; at least 1, at most OMP_NUM_THREADS.
    """
    usage = psutil.cpu_times_percent(interval=sample_seconds, percpu=True)
    idle = sum(usage[core].idle + usage[core].iowait for core in os.sched_getaffinity(0)) / 100
    return max(1, min(round(idle), _thread_limit()))


def measure(*, seconds: float = 3.0, home: Path | None = None) -> Hardware:
    """Benchmark this machine for about `seconds`; money, watts and carbon come from the catalogue in `home`.

    On a GPU, the first one is measured, and its figures multiplied by the number of visible ones. On a CPU
    the products run on the cores that are free, and `sources` says how many those were.
    """
    import torch

    cores = free_cores()
    kind: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        peaks = {dtype: _product_rate(torch, kind, dtype, 0.4 * seconds) for dtype in ("float32", "bfloat16")}
        bandwidth = _copy_rate(torch, kind, 0.15 * seconds)
        overhead = _tiny_seconds(torch, kind, 0.05 * seconds)
    finally:
        torch.set_num_threads(threads)
    if kind == "cuda":
        count = devices = torch.cuda.device_count()
        name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
        on = f"one of {count} GPUs"
    else:
        count, devices = available_cores(), 1
        name, memory = _cpu_model(), psutil.virtual_memory().total
        on = f"{cores} of {count} cores"
    how = f"measured {date.today()} on {on} with torch {torch.__version__}"
    prices = _prices(name, kind, count, home or files.home())
    prices["sources"] |= dict.fromkeys(MEASURED, how)
    return Hardware(
        name=name,
        kind=kind,
        count=count,
        peak_flops={dtype: peak * devices for dtype, peak in peaks.items()},
        memory_bytes=memory * devices,
        memory_bandwidth=bandwidth * devices,
        busy_cores=count - cores if kind == "cpu" else 0,
        kernel_seconds=overhead,
        **prices,
    )


@method(needs="a machine that does nothing else", costs="the seconds asked for, and torch's start")
def bench(recipe: BenchRecipe, run: Run) -> Hardware:
    """Measure this machine's matrix products and memory, and remember them for every later plan."""
    hardware = measure(seconds=recipe.seconds)
    remember(hardware, files.home())
    run.charge("bench")
    peaks = ", ".join(f"{dtype} {peak / 1e9:,.0f} GFLOP/s" for dtype, peak in hardware.peak_flops.items())
    copies, least = hardware.memory_bandwidth / 1e9, hardware.kernel_seconds * 1e6
    run.tell(f"{hardware.name}: {peaks}, copies {copies:,.1f} GB/s, {least:,.1f} µs at least an operator")
    return hardware


def _product_rate(torch: Any, device: str, dtype: str, seconds: float) -> float:
    """FLOP/s: the best of square products, doubled in size until one takes a twentieth of `seconds`."""
    best, size = 0.0, FIRST_SIZE
    left, right, out = _matrices(torch, device, dtype, size)
    _timed(torch, torch.mm, left, right, out=out)  # the first product loads the libraries
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        took = _timed(torch, torch.mm, left, right, out=out)
        best = max(best, 2 * size**3 / took)
        if took < seconds / 20 and size < LAST_SIZE:
            size *= 2
            left, right, out = _matrices(torch, device, dtype, size)
    return best


def _matrices(torch: Any, device: str, dtype: str, size: int) -> list[Any]:
    # Random, since a GPU that multiplies constants draws less power and runs faster than it can in earnest.
    return [torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(3)]


def _copy_rate(torch: Any, device: str, seconds: float) -> float:
    """B/s, read and written: the best of repeated copies."""
    source = torch.ones(COPY_NUMBERS, device=device)
    target = torch.ones_like(source)
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        best = max(best, 2 * source.nbytes / _timed(torch, target.copy_, source))
    return best


def _tiny_seconds(torch: Any, device: str, seconds: float) -> float:
    """Seconds an operator: the best rate of a layer called on one token, so small that only overhead is left."""
    layer = torch.nn.Linear(TINY_SIZE, TINY_SIZE, device=device)
    token = torch.ones(1, TINY_SIZE, device=device)

    def calls() -> None:
        for _ in range(TINY_CALLS):
            layer(token)

    best, end = float("inf"), time.perf_counter() + seconds
    with torch.inference_mode():
        calls()  # the first ones load the libraries
        while best == float("inf") or time.perf_counter() < end:
            best = min(best, _timed(torch, calls) / TINY_CALLS)
    return best


def _timed(torch: Any, work: Callable[..., Any], *inputs: Any, **more: Any) -> float:
    """Seconds that `work` takes, on the GPU too."""
    begin = time.perf_counter()
    work(*inputs, **more)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _prices(name: str, kind: str, count: int, home: Path) -> dict[str, Any]:
    """Money, watts, carbon and links of `count` cores or devices, from the row of the catalogue that fits the name."""
    rows = catalogue(home)
    if kind == "cpu":
        row = rows["laptop-cpu" if psutil.sensors_battery() else "vcpu"]
    else:
        fitting = [key for key in rows if all(_says(name, part) for part in key.split("-"))]
        row = rows[max(fitting, key=len, default="gpu")]
    figures = {"watts", "usd_per_hour", "kgco2e_per_kwh", "link_bandwidth"} & row.sources.keys()
    return {
        "watts": row.watts * count / row.count,
        "usd_per_hour": row.usd_per_hour * count / row.count,
        "kgco2e_per_kwh": row.kgco2e_per_kwh,
        "link_bandwidth": row.link_bandwidth,
        "sources": {figure: row.sources[figure] for figure in figures},
    }


def _says(name: str, part: str) -> bool:
    """Whether a device's name has the part of a key: "a10" is in "NVIDIA A10G", not in "NVIDIA A100"."""
    return re.search(rf"(?<![0-9a-z]){part}(?![0-9])", name.lower()) is not None


def _own(home: Path) -> Listing:
    """The user's figures; an empty listing when there are none."""
    return load(Listing, home / OWN) if (home / OWN).exists() else Listing()


def _grid(shipped: Listing, own: Listing, home: Path) -> Grid:
    """The electricity of the region that the user states, else of the world."""
    grids, region = shipped.grid | own.grid, own.region or shipped.region
    if region not in grids:
        raise RecipeError(
            f"{home / OWN}: region",
            found=repr(region),
            expected=f"one of {', '.join(grids)}",
            mend=f"Choose one, or state grid: {{{region}: {{kgco2e_per_kwh: ...}}}}.",
        )
    return grids[region]


def _stated(row: dict[str, Any], own: dict[str, Any], home: Path, place: str) -> Hardware:
    """A row with the user's figures put over it, checked; their source is the user's file."""
    sources = row["sources"] | dict.fromkeys(own, f"stated in {home / OWN}") | own.get("sources", {})
    try:
        return CHECKED.validate_python({**row, **own, "sources": sources})
    except ValidationError as error:
        complaint = error.errors()[0]
        unknown, missing = (complaint["type"] == kind for kind in ("unexpected_keyword_argument", "missing"))
        known = ", ".join(field.name for field in fields(Hardware))
        raise RecipeError(
            f"{home / OWN}: {place}.{'.'.join(map(str, complaint['loc']))}",
            found="an unknown figure" if unknown else "nothing" if missing else repr(complaint["input"]),
            expected=f"one of {known}" if unknown else complaint["msg"].removeprefix("Value error, "),
            mend="Correct the file; a new row needs every figure.",
        ) from None


def _remembered(home: Path, machine: dict[str, Any]) -> Hardware | None:
    """The last benchmark, if it was of this machine and can be read."""
    try:
        kept = records.parse((home / REMEMBERED).read_text(encoding="utf-8"), REMEMBERED)
        return CHECKED.validate_python(kept["hardware"]) if kept["machine"] == machine else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _machine() -> dict[str, Any]:
    """What a benchmark depends on, read without torch."""
    drivers = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "gpus": [_field(path, "Model") for path in drivers],
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "torch": importlib.metadata.version("torch"),
    }


def _cpu_model() -> str:
    return _field(Path("/proc/cpuinfo"), "model name") or platform.machine()


def _field(path: Path, name: str) -> str:
    """The first `name : value` of a file of the kernel, "" without one (Arm's cpuinfo has no model name)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _thread_limit() -> int:
    """OMP_NUM_THREADS, of a list the first; OpenMP ignores what isn't a positive number, and so do we."""
    stated = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(stated) if stated.isdecimal() and int(stated) else available_cores()
