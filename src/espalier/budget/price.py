"""Price: what a second on the hardware costs, and meters that tell how much electricity it really drew."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from espalier.budget.hardware import Hardware
from espalier.ledger import Rates

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


def rates(
    hardware: Hardware,
    *,
    pue: float = 1.0,
    usd_per_hour: float | None = None,
    watts: float | None = None,
    kgco2e_per_kwh: float | None = None,
) -> Rates:
    """The cost of a second on all of `hardware`: USD an hour, W, kg of CO2 equivalent a kWh.

    A figure that is stated takes the place of the row's. `pue`, the power usage effectiveness, is what the data
    centre draws for each watt of the machine, 1.0 outside one. Energy and carbon follow Patterson et al.,
    arXiv 2104.10350: kWh = hours x W / 1000 x PUE, kg = kWh x grid.
    """
    return Rates(
        usd_per_hour=hardware.usd_per_hour if usd_per_hour is None else usd_per_hour,
        watts=pue * (hardware.watts if watts is None else watts),
        kgco2e_per_kwh=hardware.kgco2e_per_kwh if kgco2e_per_kwh is None else kgco2e_per_kwh,
    )


class EnergyMeter(Protocol):
    """Energy since the meter was made. `measured` is False for an estimate. No PUE is in it."""

    measured: bool

    def read_kwh(self) -> float:
        """kWh drawn so far; never less than at the last reading."""
        ...


def best_meter(hardware: Hardware, *, powercap: Path = POWERCAP) -> EnergyMeter:
    """The processor's or the GPUs' own counters where this process may read them, else rated watts x time."""
    own = NvmlMeter.open(hardware.count) if hardware.kind == "cuda" else RaplMeter.open(powercap)
    return own or RatedMeter(hardware.watts)


class RatedMeter:
    """An estimate: the rated power, drawn all the time."""

    measured = False

    def __init__(self, watts: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._watts, self._clock, self._begin = watts, clock, clock()

    def read_kwh(self) -> float:
        return self._watts * (self._clock() - self._begin) / JOULES_PER_KWH


class RaplMeter:
    """The energy counters of the CPU packages (RAPL), in microjoules; whoever else uses the CPU is in them too.

    A counter starts anew at its maximum, on a busy server after some half an hour: read it more often than that.
    """

    measured = True

    def __init__(self, packages: list[Path]) -> None:
        self._ranges = {package: int((package / "max_energy_range_uj").read_text()) for package in packages}
        self._last = {package: _microjoules(package) for package in packages}
        self._total = 0

    @classmethod
    def open(cls, powercap: Path = POWERCAP) -> RaplMeter | None:
        """The meter of all packages below `powercap`; None when there are none or they may not be read."""
        try:
            # Other zones are parts of a package (core, dram) or the platform around it (psys).
            zones = sorted(powercap.glob("intel-rapl:*"))
            packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
            return cls(packages) if packages else None
        except OSError:
            return None

    def read_kwh(self) -> float:
        for package, last in self._last.items():
            now = self._last[package] = _microjoules(package)
            self._total += now - last if now >= last else now - last + self._ranges[package]
        return self._total / 1e6 / JOULES_PER_KWH


class NvmlMeter:
    """The energy counters of NVIDIA GPUs, in millijoules; the machine around them isn't in it."""

    measured = True

    def __init__(self, nvml: Any, devices: list[Any]) -> None:
        self._nvml, self._devices = nvml, devices
        self._begin = self._millijoules()

    @classmethod
    def open(cls, count: int) -> NvmlMeter | None:
        """The meter of the `count` visible GPUs; None without the `gpu` extra, a driver or such a counter."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
            return cls(nvml, [_device(nvml, name) for name in _visible(count)])
        except nvml.NVMLError:
            return None

    def read_kwh(self) -> float:
        return (self._millijoules() - self._begin) / 1e3 / JOULES_PER_KWH

    def _millijoules(self) -> int:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(device) for device in self._devices)


def _microjoules(package: Path) -> int:
    return int((package / "energy_uj").read_text())


def _visible(count: int) -> list[str]:
    """Numbers or UUIDs of the GPUs that CUDA shows to this process."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    return stated.split(",")[:count] if stated else [str(number) for number in range(count)]


def _device(nvml: Any, name: str) -> Any:
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)
