"""Changed recipes (FAULTS F10): a run that is broken off is taken up with one key changed, key after key."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from tests.keys import another, leaves

from espalier import changes, pipeline, recipe, records
from espalier.errors import RunError
from espalier.pipeline import PretrainRecipe
from espalier.run import FINAL, RECIPE, Run
from faults import calls
from faults.sheet import Row
from faults.small import NAME, Setting, fresh, silent

STATED = ["expected={loss: 2, low: 1, high: 3}"]  # a section that is left out by default
STOP = 12  # steps, after the first growth


def changed_recipes(setting: Setting) -> list[Row]:
    """Whether anything goes unnoticed, and whether what is said to be safe is."""
    stopped = setting.folder("stopped")
    carry_out = partial(setting.small.carry_out, stopped)
    whole = calls.watch(partial(setting.small.carry_out, setting.folder("calm")), setting.place / "calm")
    assert calls.watch(carry_out, stopped, at=_in_place(whole.calls, f"checkpoint-{STOP}") + 1).killed
    begun = recipe.load(PretrainRecipe, stopped / "recipe.yaml", STATED)
    records.write_signed(stopped / NAME / RECIPE, recipe.dump(begun))
    overrides = {key: another(begun, key, annotation) for key, annotation in leaves(PretrainRecipe)}
    return [_noticed(setting, begun, stopped, overrides), _safe(setting, begun, stopped, overrides)]


def _noticed(setting: Setting, begun: PretrainRecipe, stopped: Path, overrides: dict[str, str]) -> Row:
    """Every key once: the run refuses it by its name, or takes it over, says so and has it on record."""
    counts, silently = Counter[str](), []
    some = setting.some(list(overrides), share=5)  # all of them with a fifth of everything
    for key in some:
        folder, told = fresh(stopped / NAME, setting.place / "taken-up"), list[str]()
        now = recipe.parse(PretrainRecipe, recipe.dump(begun), [overrides[key]], where=key)
        (change,) = changes.between(begun.model_dump(mode="json"), now)
        counts[change.resume] += 1
        try:
            Run.take_up(folder, now, tell=told.append).close()
            noticed = change.key in "".join(told) and change.key in (folder / "changes.jsonl").read_text()
        except RunError as refused:
            noticed = change.key in refused.found and recipe.load(PretrainRecipe, folder / RECIPE) == begun
        if not noticed:
            silently.append(key)
    classes = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return Row(
        "F10",
        f"one key of the recipe changed on resume: {len(some)} of the {len(overrides)} keys of its schema ({classes})",
        f"100% have a class; {len(silently)} taken up without a word",
        "100% classified; 0 silent effects",
        not silently,
        ", ".join(silently),
        trials=len(some),
        of=len(overrides),
    )


def _safe(setting: Setting, begun: PretrainRecipe, stopped: Path, overrides: dict[str, str]) -> Row:
    """Each key that is said to be safe, changed by itself: the run ends with the bits of a calm one."""
    keys = [key for key in overrides if recipe.resume_class(PretrainRecipe, key) == "safe"]
    some, wrong = setting.some(keys), []
    calm = (setting.small.run / FINAL / "model.safetensors").read_bytes()
    for key in some:
        runs = fresh(stopped, setting.place / "safe")
        name = json.loads(overrides[key].partition("=")[2]) if key == "name" else NAME
        shutil.move(runs / NAME, runs / name) if name != NAME else None
        go_on = partial(pipeline.main, runs / "recipe.yaml", [*STATED, overrides[key]], runs=runs, dry_run=False)
        end = calls.forked(partial(go_on, tell=silent))
        if end.result != 0 or (runs / name / FINAL / "model.safetensors").read_bytes() != calm:
            wrong.append(f"{key}: {end.error or 'other bits'}")
    return Row(
        "F10",
        f"a key of the class safe changed on resume at step {STOP}: {len(some)} of {len(keys)} keys, a run each",
        f"{len(some) - len(wrong)} of {len(some)} end with the bits of a calm run",
        "all",
        not wrong,
        "; ".join(wrong),
        trials=len(some),
        of=len(keys),
    )


def _in_place(seen: list[calls.Call], name: str) -> int:
    """The number of the call that gives a folder its name, from 1."""
    return next(n for n, call in enumerate(seen, start=1) if call.name == "rename" and call.other.endswith(f"/{name}"))
