"""Kills of a whole growth run, taken up again until it is done: nothing lost, the same bits (F1, F2, F12).

A moment of a run is a file call: what a kill leaves is what the calls before it left, whenever it comes. So the seed
alone says when a run is killed, and each round of the suite kills it at the same moments.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from espalier import files
from espalier.run import METRICS
from espalier.train import checkpoint
from faults import calls
from faults.sheet import Row
from faults.small import NAME, Setting, ends_with

KILLS, CALLS = 100, 40
KINDS: tuple[calls.Fault, ...] = ("kill", "torn")


def random_kills(setting: Setting) -> list[Row]:
    """Killed at moments that are drawn, over and over; each time the run goes on from what is there."""
    small, dice = setting.small, setting.dice("random kills")
    calm, watched = ends_with(small.run), setting.folder("watched")
    whole = calls.watch(partial(small.carry_out, watched), watched).calls
    runs, log = setting.folder("killed"), Path(NAME, METRICS)
    logged = [call for call in whole if call.path == str(watched / log)]
    done, finished, lost, wrong = 0, 0, 0, list[str]()
    kills = max(1, min(KILLS, round(5 * KILLS * setting.share)))  # all of them with a fifth of everything
    while done < kills:
        before = _newest(runs / NAME)
        # Most calls are those of checkpoints; those of the log are spread over the steps.
        place, last = dice.choice([(runs, len(whole)), (runs / log, len(logged))])
        end = calls.watch(partial(small.carry_out, runs), place, at=dice.randint(1, last), fault=dice.choice(KINDS))
        if end.killed:
            done += 1
            lost += _newest(runs / NAME) < before
            continue
        finished += 1
        wrong += _unlike(calm, runs, end)
        runs = setting.folder("killed")
    wrong += _unlike(calm, runs, calls.forked(partial(small.carry_out, runs)))
    tried = f"SIGKILL at drawn moments of a run of 3 stages: {done} kills, {finished + 1} runs that came to their end"
    figure = f"{lost} committed steps lost; {len(wrong)} runs with differing bits"
    wanted = "0 differing bits, 0 steps lost"
    said = "a moment is a file call, any or one of the log of steps; half of those that come at a write cut it in two"
    why = "; ".join([*wrong, said])
    return [Row("G2", tried, figure, wanted, not lost and not wrong, why, trials=done, of=KILLS)]


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
        wrong += [f"{where}: {said}" for said in _unlike(calm, runs, end)]
    tried = f"SIGKILL at {len(numbers)} of the {len(whole.calls)} file calls of a run of 3 stages, then run to its end"
    why = "; ".join([*wrong, "a sample, evenly spread over the run"])
    figure = f"{len(wrong)} lost or with other bits"
    return [Row("G1", tried, figure, "0", not wrong, why, trials=len(numbers), of=len(whole.calls))]


def _unlike(calm: list[str], runs: Path, end: calls.End) -> list[str]:
    """What is wrong with the end of a run, in one line or none."""
    if end.result != 0:
        return [str(end.error)]
    return [] if ends_with(runs / NAME) == calm else ["other bits"]


def _newest(run: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    steps = (step for step in checkpoint.list_steps(run) if files.damage(run / f"checkpoint-{step}") is None)
    return next(steps, 0)
