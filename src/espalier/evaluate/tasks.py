"""Tasks of lm-eval, built in or the user's own, over any of our engines: its prompts, its metrics, its result file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from espalier import files
from espalier.errors import ResourceError
from espalier.evaluate.ask import AskRecipe, ask
from espalier.evaluate.items import SAMPLES, read_outcomes
from espalier.evaluate.kept import ANSWERS, Kept
from espalier.evaluate.told import tell_and_save
from espalier.infer.engine import Engine, open_engine
from espalier.method import method
from espalier.report import Row
from espalier.run import Run

if TYPE_CHECKING:
    from espalier.evaluate.harness import Harness
    from espalier.evaluate.suite import Suite


class TasksRecipe(AskRecipe):
    """Which tasks, and how they are put to the model.

    tasks         names of tasks and groups, patterns such as mmlu_*, YAML files, or items:FILE of our own items
    include_path  folders of the user's YAML tasks, which are programs: their !function tags and templates run
    num_fewshot   examples before a question, where the task doesn't forbid them; the task's own number if not stated
    template      "chat" writes questions as the model's template writes a conversation
    unsafe_code   whether tasks may run what the model writes
    scoring       is the task's own
    """

    POSITIONAL: ClassVar[str] = "tasks"

    tasks: tuple[str, ...] = Field(min_length=1)
    include_path: tuple[Path, ...] = ()
    num_fewshot: int | None = Field(default=None, ge=0)
    template: Literal["none", "chat"] = "none"
    unsafe_code: Literal["refuse", "run"] = "refuse"
    scoring: Literal["options"] = "options"

    @field_validator("tasks", "include_path", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """A single one needs no brackets."""
        return (value,) if isinstance(value, str | Path) else value


@method(
    needs="a model folder or a URL; lm-eval (pip install 'espalier[tasks]'); the tasks' data on the disk or a network",
    costs="a forward pass for each option of each document, or what is written",
)
def evaluate_tasks(recipe: TasksRecipe, run: Run) -> Path:
    """Run lm-eval tasks, built in or one's own, over our engine."""
    require_lm_eval()
    return run_tasks(recipe, run, open_engine(recipe, run))


def require_lm_eval() -> None:
    """Raise `ResourceError` where lm-eval isn't installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError(
            "evaluate tasks", found="no lm_eval", expected="it installed", mend="Run pip install 'espalier[tasks]'."
        )


def run_tasks(recipe: TasksRecipe, run: Run, engine: Engine) -> Path:
    """As `evaluate_tasks`, with an engine that is open; closes it."""
    from espalier.evaluate.harness import Harness, quiet
    from espalier.evaluate.suite import Suite

    kept = Kept(engine, run.folder / ANSWERS)
    harness = Harness(kept)
    try:
        run.tell("Reading the tasks and writing their prompts.")
        with quiet():
            suite = Suite.load(
                recipe.tasks,
                recipe.include_path,
                harness,
                num_fewshot=recipe.num_fewshot,
                chat=recipe.template == "chat",
                unsafe_code=recipe.unsafe_code == "run",
            )
        report = ask(suite.documents, recipe, run, kept)
        with quiet():
            results = suite.results(_answered(suite, run), harness)
        _write_results(results, recipe, run, harness)
        report.rows = _rows(results)
        report.context |= _context(results, recipe, harness)
        for name, told in report.context["tasks"].items():
            told |= suite.hashes(name)
    finally:
        kept.close()
    return tell_and_save(report, run)


def _answered(suite: Suite, run: Run) -> dict[str, set[int]]:
    """The numbers of the documents of each task that were answered, in this run's process or in an earlier one."""
    done = {outcome.id for outcome in read_outcomes(run.folder / SAMPLES)}
    return {
        name: {document.number for document in documents if document.id in done}
        for name, documents in suite.documents.items()
    }


def _rows(results: dict[str, Any]) -> list[Row]:
    """A row for each task or group, metric and filter."""
    from espalier.evaluate.suite import label

    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            stderr = float(error) if isinstance(error, int | float) else None
            rows.append(Row(task, label(metric, filter_name), float(value), stderr, values.get("sample_len")))
    return rows


def _context(results: dict[str, Any], recipe: TasksRecipe, harness: Harness) -> dict[str, Any]:
    """What must be the same for two results to be comparable, and what helps to read them."""
    template = harness.chat_template(recipe.template == "chat")
    return {
        "backend": "url" if recipe.url else "local",
        "lm_eval": importlib.metadata.version("lm_eval"),
        "template": template and files.digest(template),
        "higher_is_better": results["higher_is_better"],
        "groups": results["group_subtasks"],
    }


def _write_results(results: dict[str, Any], recipe: TasksRecipe, run: Run, harness: Harness) -> None:
    """lm-eval's own result file, results_TIME.json, as its command line writes it."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lm_eval.utils import handle_non_serializable, hash_string

    from espalier.evaluate.suite import BOOTSTRAPS

    told = {"pretrained": recipe.model, "url": recipe.url, "identity": harness.engine.identity}
    tracker = GeneralConfigTracker()
    tracker.log_experiment_args("espalier", told, None, harness.chat_template(recipe.template == "chat"), True)
    tracker.total_evaluation_time_seconds = str(run.ledger.total.seconds)
    samples = results.pop("samples")
    results["config"] = {
        "model": "espalier",
        "model_args": told,
        "limit": recipe.limit,
        "bootstrap_iters": BOOTSTRAPS,
        "random_seed": DEFAULT_RANDOM_SEED,
        "numpy_seed": DEFAULT_OTHER_SEED,
        "fewshot_seed": DEFAULT_OTHER_SEED,
    }
    results["date"] = time.time()
    results |= {f"{name}_version": importlib.metadata.version(name) for name in ("lm_eval", "transformers")}
    results["task_hashes"] = {
        task: hash_string("".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in each))
        for task, each in samples.items()
    }
    text = json.dumps(results | asdict(tracker), indent=2, default=handle_non_serializable, ensure_ascii=False)
    files.write_text(run.folder / f"results_{datetime.now().isoformat().replace(':', '-')}.json", text + "\n")
