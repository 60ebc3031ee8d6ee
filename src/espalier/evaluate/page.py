"""The page of an evaluation, or of several side by side: one file, drawn from what their run folders keep."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import files, page, records, units
from espalier.evaluate.evaluation import LOWER_IS_BETTER, Evaluation
from espalier.evaluate.intervals import Interval, binomial
from espalier.evaluate.items import Outcome
from espalier.ledger import RESOURCES, Cost
from espalier.page import Figure, View
from espalier.report import Row
from espalier.run import PAGE, RECIPE

if TYPE_CHECKING:
    from espalier.evaluate.compare import Difference

# From so many axes on a radar has a shape; with more than these its names have no room.
RADAR_AXES = range(3, 25)
# What the reader may set a score against as a model grows: resource, text of the button, title of the axis.
SPENT = (("flops", "FLOPs", "FLOPs so far"), ("tokens", "Tokens", "Training tokens"), ("usd", "Money", "Money spent"))
NUMBER = r"\d+(\.\d+)?"
MOST_WRONG = 12
MOST_VALUES = 24  # of a tag that scores are split by
LONGEST_TEXT = 160
COSTS = ("seconds", "flops", "usd", "kwh")


def write(folder: Path, html: str) -> Path:
    """Put a page into its run folder; its path."""
    path = folder / PAGE
    files.write_text(path, html)
    return path


def render(
    folder: Path,
    evaluations: Mapping[str, Evaluation],
    title: str,
    differences: Sequence[Difference] = (),
    spent: Mapping[str, Cost] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The page of a run on evaluations by their names, as HTML.

    differences  of the others from the first, where they are compared
    spent        by each one's time, where they are the same model as it grew
    """
    hues = page.HUES["validation"]
    models = {name: hues[number % len(hues)] for number, name in enumerate(evaluations)}
    radar = _radar(evaluations, models)
    return page.template("evaluate/evaluate.html").render(
        view=_view(folder, evaluations, title, notes),
        charts={
            "radar": radar,
            "scores": None if radar else _scores(evaluations, models),
            "differences": _differences(differences, models),
            "growth": _growth(evaluations, spent or {}),
        },
        axes=[axis for axis in SPENT if any(getattr(cost, axis[0]) for cost in (spent or {}).values())],
        models=models,
        rows=_rows(evaluations),
        differences=[_told(each) for each in differences],
        heat={name: found for name, each in evaluations.items() if (found := _heat(each.outcomes))},
        tags=_tags(evaluations),
        costs=list(_costs(evaluations)),
        wrong=list(_wrong(evaluations)),
        hashes=_hashes(evaluations),
    )


def text_of(metric: str, value: float) -> str:
    """A figure as people read it: shares in percent."""
    if not math.isfinite(value):
        return str(value)
    share = metric not in LOWER_IS_BETTER and -1 <= value <= 1
    return f"{100 * value:.1f}%" if share else units.significant(value, 4)


def between(metric: str, interval: Interval | None) -> str:
    """A 95% interval; nothing where there is none."""
    if interval is None:
        return ""
    if metric not in LOWER_IS_BETTER and -1 <= interval.value <= 1:
        return f"{100 * interval.low:.1f} – {100 * interval.high:.1f}%"
    return f"{text_of(metric, interval.low)} – {text_of(metric, interval.high)}"


def _view(folder: Path, evaluations: Mapping[str, Evaluation], title: str, notes: Sequence[str]) -> View:
    asked = sum(len(each.outcomes) for each in evaluations.values())
    tasks = {task for each in evaluations.values() for task in each.main_metrics}
    machine = {
        key: value for each in evaluations.values() for key, value in each.report.context.get("machine", {}).items()
    }
    return View(
        title=title,
        subtitle=f"{_counted(len(tasks), 'task')}, {_counted(asked, 'answer')}" if asked else "",
        made_at=f"Evaluated on {date.today()}",
        headline=_headline(evaluations),
        notes=list(notes),
        machine=machine,
        recipe=records.read_signed(folder / RECIPE),
    )


def _headline(evaluations: Mapping[str, Evaluation]) -> list[Figure]:
    """The score of each of several; of a single one its parts too."""
    figures = []
    for name, each in evaluations.items():
        if each.overall:
            score, chance = each.overall
            note = f"95%: {between('score', each.overall_interval)}; chance {text_of('score', chance)}"
            figures.append(Figure("Score" if len(evaluations) == 1 else name, f"{100 * score:.1f}%", note))
        else:
            figures += [
                Figure(_named(name, row, evaluations), text_of(row.metric, row.value), row.note)
                for row in each.report.rows[:3]
            ]
    if len(evaluations) == 1:
        [each] = evaluations.values()
        items = f"{units.count(len(each.outcomes))} answers" if each.outcomes else "everything in it"
        figures.append(Figure("Cost", units.money(each.spent.usd), f"{items}, {units.duration(each.spent.seconds)}"))
    return figures


def _named(name: str, row: Row, evaluations: Mapping[str, Evaluation]) -> str:
    return row.metric if len(evaluations) == 1 else f"{name}: {row.metric}"


def _radar(evaluations: Mapping[str, Evaluation], models: Mapping[str, str]) -> dict[str, Any] | None:
    """An axis a task that all have, or a group where tasks are too many; a polygon a model, and one of chance."""
    tasks = {name: each.shares() for name, each in evaluations.items()}
    groups = {name: each.groups() for name, each in evaluations.items()}
    for found in (tasks, groups):
        axes = [axis for axis in next(iter(found.values())) if all(axis in each for each in found.values())]
        if len(axes) in RADAR_AXES:
            return _drawn_radar(evaluations, models, found, axes)
    return None


def _drawn_radar(
    evaluations: Mapping[str, Evaluation],
    models: Mapping[str, str],
    found: Mapping[str, Mapping[str, tuple[float, float]]],
    axes: Sequence[str],
) -> dict[str, Any]:
    chances = [[each[axis][1] for each in found.values()] for axis in axes]
    return {
        "axes": axes,
        "chance": [sum(each) / len(each) for each in chances],
        "models": [
            {
                "name": name,
                "hue": hue,
                "values": [found[name][axis][0] for axis in axes],
                "told": [_told_score(name, evaluations[name], axis, *found[name][axis]) for axis in axes],
            }
            for name, hue in models.items()
        ],
    }


def _scores(evaluations: Mapping[str, Evaluation], models: Mapping[str, str]) -> dict[str, Any] | None:
    """A dot and its interval a task and model, beside chance."""
    rows = [
        {
            "name": task,
            "hue": models[name],
            "value": score,
            **_ends(evaluations[name], task, score),
            "chance": chance,
            "told": _told_score(name, evaluations[name], task, score, chance),
        }
        for task in dict.fromkeys(task for each in evaluations.values() for task in each.shares())
        for name in models
        if task in evaluations[name].shares()
        for score, chance in [evaluations[name].shares()[task]]
    ]
    return {"x": _percent_axis(0, 1), "title": "Score", "zero": None, "rows": _named_once(rows)} if rows else None


def _named_once(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which only the first of those of one name has it."""
    named = [False, *(one["name"] == other["name"] for one, other in pairwise(rows))]
    return [{**row, "name": "" if again else row["name"]} for row, again in zip(rows, named, strict=True)]


def _ends(each: Evaluation, task: str, score: float) -> dict[str, float]:
    sure = each.interval(each.row(task)) or Interval(score, score, score)
    return {"low": sure.low, "high": sure.high}


def _told_score(name: str, each: Evaluation, axis: str, score: float, chance: float) -> list[str]:
    """What is known of a task's score, or of a group's."""
    lines = [f"{name}: {text_of('score', score)}", axis, f"chance {text_of('score', chance)}"]
    if axis not in each.main_metrics:
        return lines
    row = each.row(axis)
    sure = each.interval(row)
    return lines + ([f"95%: {between(row.metric, sure)}"] if sure else []) + ([f"{row.n:,} items"] if row.n else [])


def _differences(differences: Sequence[Difference], models: Mapping[str, str]) -> dict[str, Any] | None:
    """A dot and its interval a task and model, around the baseline: of main metrics that are shares, else of losses."""
    main: dict[tuple[str, str], Difference] = {}
    for each in differences:
        if not each.lower_is_better:
            main.setdefault((each.run, each.task), each)
    shown = list(main.values()) or [each for each in differences if each.low is not None]
    if not shown:
        return None
    ends = [end for each in shown for end in (each.low, each.high, each.change) if end is not None]
    low, high = min(0.0, *ends), max(0.0, *ends)
    room = 0.02 + 0.05 * (high - low) if main else 0.002 + 0.05 * (high - low)
    order = {task: place for place, task in enumerate(dict.fromkeys(each.task for each in shown))}
    return {
        "x": _axis(low - room, high + room, (lambda at: f"{100 * at:+g}") if main else (lambda at: f"{at:+.4g}")),
        "title": "Points; to the right is better" if main else "Difference; to the left is better",
        "zero": "baseline",
        "rows": _named_once(
            [
                {
                    "name": each.task if main else f"{each.task}, {each.metric}",
                    "hue": models.get(each.run, ""),
                    "value": each.change,
                    "low": each.change if each.low is None else each.low,
                    "high": each.change if each.high is None else each.high,
                    "chance": None,
                    "told": [f"{each.run}: {_signed(each)}", f"{each.task}, {each.metric}", *_sureness(each)],
                }
                for each in sorted(shown, key=lambda each: order[each.task])
            ]
        ),
    }


def _sureness(each: Difference) -> list[str]:
    lines = (
        [] if each.low is None or each.high is None else [f"95%: {_span(each, each.low)} to {_span(each, each.high)}"]
    )
    return lines + ([f"{each.n:,} items in both"] if each.n else [])


def _told(each: Difference) -> dict[str, str]:
    """A difference as texts for the table."""
    return {
        "run": each.run,
        "task": each.task,
        "metric": each.metric,
        "before": text_of(each.metric, each.before),
        "after": text_of(each.metric, each.after),
        "change": _signed(each),
        "between": ""
        if each.low is None or each.high is None
        else f"{_span(each, each.low)} to {_span(each, each.high)}",
        "n": "–" if each.n is None else f"{each.n:,}",
        "chance": _chance(each.chance),
        "corrected": _chance(each.corrected),
        "sure": "yes" if each.sure else "no",
    }


def _signed(each: Difference) -> str:
    return _span(each, each.change)


def _span(each: Difference, value: float) -> str:
    """With its sign: in points where it is of shares."""
    text = f"{value:+.4f}" if each.lower_is_better else f"{100 * value:+.1f}"
    return text.replace("-", "−")


def _chance(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _growth(evaluations: Mapping[str, Evaluation], spent: Mapping[str, Cost]) -> dict[str, Any] | None:
    """A line a task and one of their mean, against what the model had cost by each of its stages."""
    stages = [(name, evaluations[name], cost) for name, cost in spent.items()]
    if len(stages) < 2:
        return None
    shares = [each.shares() for _, each, _ in stages]
    tasks = [task for task in shares[0] if all(task in each for each in shares)]
    lines: list[tuple[str, list[tuple[float, Interval | None]]]]
    if tasks:
        lines = [
            (task, [(each.shares()[task][0], each.interval(each.row(task))) for _, each, _ in stages]) for task in tasks
        ]
        if len(tasks) > 1:
            overall = [each.overall_interval for _, each, _ in stages]
            lines.insert(0, ("overall", [(sure.value, sure) for sure in overall if sure]))
        metric, axis = "score", _percent_axis(0, 1)
    else:
        metric = stages[0][1].report.rows[0].metric
        rows = [next(row for row in each.report.rows if row.metric == metric) for _, each, _ in stages]
        lines = [(metric, [(row.value, each.interval(row)) for row, (_, each, _) in zip(rows, stages, strict=True)])]
        axis = page.loss_axis(
            [end for _, sure in lines[0][1] for end in ((sure.low, sure.high) if sure else ())]
            + [row.value for row in rows]
        )
    hues = [""] + page.HUES["validation"] if len(lines) > 1 else [""]
    return {
        "axes": {
            name: {"title": title, **page.linear_axis(0, max(getattr(cost, name) for cost in spent.values()), name)}
            for name, _, title in SPENT
            if any(getattr(cost, name) for cost in spent.values())
        },
        "y": axis,
        "title": "Score" if tasks else metric,
        "lines": [
            {
                "name": name,
                "hue": hues[number] if number < len(hues) else f"{hues[1 + (number - 1) % 7]} dotted",
                "points": [
                    {
                        **vars(cost),
                        "value": value,
                        "band": [sure.low, sure.high] if sure else None,
                        "told": [
                            f"{name}: {text_of(metric, value)}",
                            stage,
                            *([f"95%: {between(metric, sure)}"] if sure else []),
                            units.amount(cost.flops, "flops"),
                            units.amount(cost.tokens, "tokens"),
                            units.money(cost.usd),
                        ],
                    }
                    for (value, sure), (stage, _, cost) in zip(points, stages, strict=True)
                ],
            }
            for number, (name, points) in enumerate(lines)
        ],
    }


def _rows(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """The table of results: a row a task and metric, a cell a model."""
    by_key = [{(row.task, row.metric): row for row in each.report.rows} for each in evaluations.values()]
    keys = dict.fromkeys(key for rows in by_key for key in rows)
    return [
        {
            "task": task,
            "metric": metric,
            "note": next((rows[task, metric].note for rows in by_key if (task, metric) in rows), ""),
            "chance": _chance_told(task, metric, evaluations.values()),
            "n": _range([row.n for rows in by_key if (row := rows.get((task, metric))) and row.n]),
            "cells": [
                {"value": text_of(metric, row.value), "between": between(metric, each.interval(row))} if row else None
                for rows, each in zip(by_key, evaluations.values(), strict=True)
                for row in [rows.get((task, metric))]
            ],
        }
        for task, metric in keys
    ]


def _chance_told(task: str, metric: str, evaluations: Any) -> str:
    known = [chance for each in evaluations if (chance := each.chance_of(task, metric)) is not None]
    return text_of(metric, known[0]) if known else "–"


def _range(numbers: Sequence[int]) -> str:
    ends = sorted({min(numbers), max(numbers)}) if numbers else []
    return " – ".join(f"{end:,}" for end in ends) or "–"


def _right(outcome: Outcome) -> float:
    """An outcome's score by the metric that its task reports first."""
    return next(iter(outcome.scores.values()))


def _heat(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Scores by depth and length, of items that have both: a needle's place in how much hay."""
    cells: dict[tuple[float, float], list[float]] = defaultdict(list)
    for outcome in outcomes:
        if all(re.fullmatch(NUMBER, outcome.tags.get(tag, "")) for tag in ("depth", "length")):
            cells[float(outcome.tags["depth"]), float(outcome.tags["length"])].append(_right(outcome))
    if not cells:
        return None
    depths, lengths = (sorted({key[place] for key in cells}) for place in (0, 1))
    return {
        "lengths": [units.count(length) for length in lengths],
        "rows": [
            {"depth": f"{depth:.0%}", "cells": [_cell(cells.get((depth, length))) for length in lengths]}
            for depth in depths
        ],
    }


def _cell(scores: list[float] | None) -> dict[str, Any] | None:
    if not scores:
        return None
    share = sum(scores) / len(scores)
    return {"share": round(share, 4), "text": f"{share:.0%}", "title": f"{sum(scores):g} of {len(scores)}"}


def _tags(evaluations: Mapping[str, Evaluation]) -> dict[str, list[dict[str, Any]]]:
    """By tag, such as the language: a row a value, a cell a model."""
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name, each in evaluations.items():
        shares = each.shares()
        for outcome in each.outcomes:
            if outcome.task in shares:
                for tag, value in outcome.tags.items():
                    found[tag][value][name].append(_right(outcome))
    shown = found.keys() - ({"depth", "length"} if found.keys() >= {"depth", "length"} else set())  # see `_heat`
    return {
        tag: [
            {"value": value, "cells": [_share_cell(by_model.get(name)) for name in evaluations]}
            for value, by_model in sorted(values.items(), key=lambda pair: _numeric(pair[0]))
        ]
        for tag, values in found.items()
        if tag in shown and 1 < len(values) <= MOST_VALUES
    }


def _numeric(text: str) -> tuple[float, str]:
    """Numbers in their order, before words in theirs."""
    return (float(text), "") if re.fullmatch(NUMBER, text) else (float("inf"), text)


def _share_cell(scores: list[float] | None) -> dict[str, str] | None:
    if not scores:
        return None
    sure = binomial(sum(scores), len(scores))
    return {"value": text_of("share", sure.value), "between": between("share", sure)}


def _costs(evaluations: Mapping[str, Evaluation]) -> Iterator[dict[str, Any]]:
    """What asking and training cost: in all, an item, and a point above chance."""
    for name, each in evaluations.items():
        for what, cost, items in (("evaluating", each.spent, len(each.outcomes)), ("training", each.trained, 0)):
            if cost:
                yield {
                    "name": f"{name}, {what}",
                    "cells": [_amount(cost, resource) for resource in COSTS],
                    "item": _few(cost * (1 / items), ("seconds", "usd")) if items else "–",
                    "point": _few(cost * (1 / each.points), ("flops", "usd")) if each.points > 0 else "–",
                }


def _few(cost: Cost, resources: Sequence[str]) -> str:
    return ", ".join(units.amount(getattr(cost, name), name) for name in resources if getattr(cost, name)) or "–"


def _amount(cost: Cost, resource: str) -> str:
    assert resource in RESOURCES
    value = getattr(cost, resource)
    return units.amount(value, resource) if value else "–"


def _wrong(evaluations: Mapping[str, Evaluation]) -> Iterator[dict[str, str]]:
    """A few wrong answers of each model, from as many tasks as there is room for."""
    room = max(MOST_WRONG // len(evaluations), 3)
    for name, each in evaluations.items():
        by_task: dict[str, list[Outcome]] = defaultdict(list)
        for outcome in each.outcomes:
            if outcome.task in each.shares() and not _right(outcome):
                by_task[outcome.task].append(outcome)
        turns = (outcome for turn in zip_longest(*by_task.values()) for outcome in turn if outcome)
        for _, outcome in zip(range(room), turns, strict=False):
            tags = ", ".join(f"{tag} {value}" for tag, value in outcome.tags.items())
            yield {
                "model": name,
                "task": outcome.task,
                "gold": _short(outcome.gold),
                "said": _short(outcome.said) or "(nothing)",
                "tags": tags,
            }


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


def _hashes(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """Every digest that the results carry, a row a name, a cell a model."""
    found = [dict(_digests(each.report.context)) for each in evaluations.values()]
    names = dict.fromkeys(name for each in found for name in each)
    return [{"name": name, "cells": [each.get(name, "") for each in found]} for name in names]


def _digests(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _digests(inner, (*path, str(key)))
    elif isinstance(value, str) and (path == ("model",) or re.fullmatch("[0-9a-f]{12,64}", value)):
        yield " ".join(path).removeprefix("tasks "), value


def _percent_axis(low: float, high: float) -> dict[str, Any]:
    return _axis(low, high, lambda at: f"{round(100 * at, 6):g}%")


def _axis(low: float, high: float, write: Callable[[float], str]) -> dict[str, Any]:
    axis = page.linear_axis(low, high, "")
    return {**axis, "ticks": [(at, write(at).replace("-", "−") if at else "0") for at, _ in axis["ticks"]]}


def _counted(n: int, thing: str) -> str:
    return f"{units.count(n)} {thing}" + ("" if n == 1 else "s")
