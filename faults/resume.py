"""The resume matrix at one rank: stopped at a checkpoint and taken up again, a run ends with the bits of a calm one."""

from __future__ import annotations

from functools import partial
from typing import Any

from faults import calls
from faults.sheet import Row
from faults.small import NAME, RECIPE, Setting, ends_with

OPTIMIZERS = ("muon", "adamw")
FROM = {"num_hidden_layers": 1, "hidden_size": 32, "duration": "640 tokens"}
DEEP, WIDE = {"num_hidden_layers": 2, "hidden_size": 32}, {"num_hidden_layers": 1, "hidden_size": 48}
INTO: dict[str, dict[str, Any]] = {
    "stack": {**DEEP, "depth": "stack"},
    "zero_pad": {**WIDE, "width": "zero_pad"},
    "masked": {**WIDE, "width": "masked", "ramp": 1.0},
    "fpi": {**WIDE, "hidden_size": 64, "width": "fpi"},
}
# Ten steps before the growth and ten after it; a masked growth's ramp is the whole stage but its last step.
STOPS = {"before the growth": 8, "right after it, inside a ramp": 12, "at the end": 20}


def matrix(setting: Setting) -> list[Row]:
    """Optimizer x operator x moment: killed right after a checkpoint is in place, and resumed."""
    cells = setting.some([(optimizer, operator) for optimizer in OPTIMIZERS for operator in INTO])
    tried, wrong = 0, []
    for optimizer, operator in cells:
        stages = [FROM, {**INTO[operator], "duration": "640 tokens"}]
        changes = {"stages": stages, "optimizer": {"name": optimizer}, "train": RECIPE["train"]}
        carry_out = partial(setting.small.carry_out, **changes)
        calm_runs = setting.folder("calm")
        calm = calls.watch(partial(carry_out, calm_runs), calm_runs)
        assert calm.result == 0, calm.error
        for moment, step in STOPS.items():
            runs = setting.folder("stopped")
            number = _in_place(calm.calls, f"checkpoint-{step}")
            assert calls.watch(partial(carry_out, runs), runs, at=number + 1).killed
            end = calls.forked(partial(carry_out, runs))
            tried += 1
            if end.result != 0 or ends_with(runs / NAME) != ends_with(calm_runs / NAME):
                wrong.append(f"{optimizer}, {operator}, {moment}: {end.error or 'other bits'}")
    of = f"{len(OPTIMIZERS)} optimizers x {len(INTO)} operators x {len(STOPS)} moments"
    what = f"resume matrix at one rank, {tried} cells: {of}"
    figure = f"{tried - len(wrong)} of {tried} cells bit-equal"
    all_cells = len(OPTIMIZERS) * len(INTO) * len(STOPS)
    return [Row("G3", what, figure, "100% of the cells", not wrong, "; ".join(wrong[:3]), trials=tried, of=all_cells)]


def _in_place(seen: list[calls.Call], name: str) -> int:
    """The number of the call that gives a folder its name, from 1."""
    return next(n for n, call in enumerate(seen, start=1) if call.name == "rename" and call.other.endswith(f"/{name}"))
