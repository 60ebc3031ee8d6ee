"""Kills of a whole growth run, taken up again until it is done: nothing lost, the same bits (F1, F2, F12)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from espalier import files
from espalier.train import checkpoint
from faults import calls
from faults.sheet import Row
from faults.small import NAME, Setting, ends_with

KILLS, CALLS = 100, 40


def random_kills(setting: Setting) -> list[Row]:
    """Killed after random times, over and over; each time the run goes on from what is there."""
    small, dice = setting.small, setting.dice("random kills")
    calm, runs = ends_with(small.run), setting.folder("killed")
    seconds = calls.forked(partial(small.carry_out, setting.folder("timed"))).seconds
    done = finished = lost = differing = 0
    kills = max(2, min(KILLS, round(4 * KILLS * setting.share)))  # all of them with a quarter of everything
    while done < kills:
        before = _newest(runs / NAME)
        end = calls.forked(partial(small.carry_out, runs), kill_after=dice.uniform(0.02, seconds))
        if end.killed:
            done += 1
            lost += _newest(runs / NAME) < before
            continue
        finished += 1
        differing += ends_with(runs / NAME) != calm
        runs = setting.folder("killed")
    assert calls.forked(partial(small.carry_out, runs)).result == 0
    differing += ends_with(runs / NAME) != calm
    tried = f"SIGKILL at random moments of a run of 3 stages: {done} kills, {finished + 1} runs that came to their end"
    figure = f"{lost} committed steps lost; {differing} runs with differing bits"
    return [Row("G2", tried, figure, "0 differing bits, 0 steps lost", not lost + differing)]


def call_kills(setting: Setting) -> list[Row]:
    """Killed at file calls spread over a run from its start to its end, growths, export and page among them."""
    small, calm, wrong = setting.small, ends_with(setting.small.run), []
    whole = calls.watch(partial(small.carry_out, setting.folder("watched")), setting.place / "watched")
    numbers = setting.some(range(1, len(whole.calls) + 1), share=CALLS / len(whole.calls))
    for number in numbers:
        runs = setting.folder("killed")
        assert calls.watch(partial(small.carry_out, runs), runs, at=number).killed
        where = f"call {number} ({whole.calls[number - 1].name})"
        end = calls.forked(partial(small.carry_out, runs))
        if end.result != 0:
            wrong.append(f"{where}: {end.error}")
        elif ends_with(runs / NAME) != calm:
            wrong.append(f"{where}: other bits")
    tried = f"SIGKILL at {len(numbers)} of the {len(whole.calls)} file calls of a run of 3 stages, then run to its end"
    why = "; ".join([*wrong, "a sample, evenly spread over the run"])
    return [Row("G1", tried, f"{len(wrong)} lost or with other bits", "0", not wrong, why)]


def _newest(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    steps = (step for step in checkpoint.list_steps(run) if files.damage(run / f"checkpoint-{step}") is None)
    return next(steps, 0)
