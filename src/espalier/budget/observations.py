"""Observations: what a finished training run came to, read from a table or from run folders.

A law of loss is fitted on these. Losses of different text or vocabularies can't be compared, so run folders that
differ in their data or tokenizer are refused.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from espalier import files, records
from espalier.budget.plan import Plan
from espalier.errors import DataError, RunError
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import FINAL, PLAN, RESULTS, stored_recipe

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Observation(Recipe):
    """One training run: the model's parameters, the tokens it was trained on, its held-out loss in nats a token."""

    parameters: Positive
    tokens: Positive
    loss: Positive


class About(Recipe):
    """What losses are of: text and tokenizer, in words or as a digest, and where the figures come from."""

    data: str = ""
    tokenizer: str = ""
    source: str = ""


Row = TypeVar("Row", bound=Recipe)


def read_table(path: Path, kind: type[Row]) -> list[Row]:
    """The rows of a CSV or JSONL file as `kind`; other columns are passed over, and an empty cell is none.

    Raises `DataError` with the line of the first row that can't be taken.
    """
    rows = []
    for number, values in _lines(path):
        known = {key: value for key, value in values.items() if key in kind.model_fields and value not in ("", None)}
        try:
            rows.append(kind.model_validate(known))
        except ValidationError as error:
            complaint = error.errors()[0]
            column = ".".join(map(str, complaint["loc"]))
            raise DataError(
                f"{path}:{number}: {column}",
                found="nothing" if complaint["type"] == "missing" else repr(complaint["input"]),
                expected="a column of that name" if complaint["type"] == "missing" else complaint["msg"].lower(),
                mend=f"Columns are {', '.join(kind.model_fields)}; correct the row or leave it out.",
            ) from None
    return rows


def read_runs(folder: Path) -> tuple[list[Observation], About]:
    """An observation of every finished run in `folder`, and what they have in common.

    parameters are those of the last stage, tokens those of all stages. Raises `RunError` when two runs differ in
    their data or tokenizer, and when no run is finished.
    """
    runs = [path.parent for path in sorted(folder.glob(f"*/{RESULTS}")) if (path.parent / PLAN).exists()]
    if not runs:
        raise RunError(
            str(folder),
            found="no finished run",
            expected="a folder of run folders with plan.json and results.json",
            mend="Name the folder that `espalier run` was given as --runs.",
        )
    first, *others = ((run, _trained_on(run)) for run in runs)
    for run, about in others:
        _require_same(first[0], first[1], run, about)
    return [_observation(run) for run in runs], first[1].model_copy(
        update={"source": f"{len(runs)} runs in {folder.name}"}
    )


def text_digest(data: dict[str, Any]) -> str:
    """What `About.data` says of a run's text: a digest of its recipe's `data`, as JSON holds it."""
    return files.digest(data)[:16]


def _lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line from 1, values) of every row."""
    text = files.read_text(path, expected="a CSV or JSONL file", mend="Name a file with a row for each training run.")
    if path.suffix == ".csv":
        return enumerate(csv.DictReader(text.splitlines()), start=2)
    return [(n, _object(path, n, line)) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DataError(
            f"{path}:{number}",
            found=repr(line[:40]),
            expected="a JSON object on every line",
            mend='Write lines like {"parameters": 1e6, "tokens": 2e7, "loss": 3.2}, or name the file .csv.',
        )
    return values


def _trained_on(run: Path) -> About:
    data = stored_recipe(run)["data"]
    return About(data=text_digest(data), tokenizer=files.sha256(run / FINAL / "tokenizer.json")[:16])


def _require_same(first: Path, one: About, run: Path, other: About) -> None:
    for key in ("data", "tokenizer"):
        if getattr(one, key) != getattr(other, key):
            raise RunError(
                str(run),
                found=f"another {key} than {first.name} has",
                expected="runs whose losses can be compared: one text, one tokenizer",
                mend="Keep runs on other text in another folder.",
            )


def _observation(run: Path) -> Observation:
    stages = Plan.from_json(records.read(run / PLAN, None)["plan"]).stages
    results = Report.load(run / RESULTS)
    return Observation(
        parameters=stages[-1].parameters,
        tokens=results.context["tokens"],
        loss=results.value("held-out", "loss"),
    )
