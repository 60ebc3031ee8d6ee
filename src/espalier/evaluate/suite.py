"""The lm-eval tasks of a run: found by their names, built into what a model is asked, and brought to their results."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from espalier import files
from espalier.errors import DataError, RecipeError, UserError
from espalier.evaluate import lm_tasks
from espalier.evaluate.asked import read_tasks
from espalier.evaluate.harness import Harness, requests, response
from espalier.evaluate.items import Outcome, Scoring, best
from espalier.evaluate.lm_tasks.adapter import items_config
from espalier.infer.engine import Answer, Request
from espalier.run import log

ITEMS = "items:"
# Of a standard error without a formula. lm-eval's own 100,000 take minutes where the metric itself is slow.
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Document:
    """A document of a task with the instances that lm-eval made of it."""

    of: Task
    number: int
    instances: tuple[Instance, ...]

    @property
    def task(self) -> str:
        return self.of.task_name

    @cached_property
    def id(self) -> str:
        """Digest of the document, whatever the prompt that is made of it."""
        written = json.dumps(self.instances[0].doc, sort_keys=True, default=handle_non_serializable)
        return files.digest([self.task, self.number, written])[:16]

    def requests(self, scoring: Scoring) -> list[Request]:
        """What lm-eval asks for it, repetitions too; the task itself says how it is scored."""
        return requests(self._repeated)

    def judge(self, answers: Sequence[Answer]) -> Outcome:
        """The task's own scores, by metric and filter, of those metrics that are means over documents."""
        with guarded(self.task):
            scores = self._scores(answers)
        options = answers[: len(self._options)]
        logprobs = tuple(answer.logprob for answer in options)
        return Outcome(
            task=self.task,
            id=self.id,
            scores=scores,
            said=self._said(best(logprobs), options) if options else answers[0].text,
            gold=self._gold(options),
            chance=1 / len(options) if options else 0.0,
            prompt_tokens=answers[0].prompt_tokens,
            completion_tokens=sum(answer.completion_tokens for answer in answers),
            logprobs=logprobs,
        )

    def _scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        fresh = {id(instance): replace(instance, resps=[], filtered_resps={}) for instance in self.instances}
        for instance, answer in zip(self._repeated, answers, strict=True):
            fresh[id(instance)].resps.append(response(instance, answer))
        judged = self.of._instances = list(fresh.values())
        self.of.apply_filters()
        scores: dict[str, float] = {}
        for name in judged[0].filtered_resps:
            found = self.of.process_results(judged[0].doc, [instance.filtered_resps[name] for instance in judged])
            scores |= {label(metric, name): float(value) for metric, value in found.items() if self._is_mean(metric)}
        return scores

    @property
    def _repeated(self) -> list[Instance]:
        return [instance for instance in self.instances for _ in range(instance.repeats)]

    @cached_property
    def _options(self) -> Sequence[str]:
        return self.of.doc_to_choice(self.instances[0].doc) if self.of.OUTPUT_TYPE == "multiple_choice" else ()

    def _gold(self, options: Sequence[Answer]) -> str:
        target = self.of.doc_to_target(self.instances[0].doc)
        if self.of.multiple_input:  # the beginnings are the options, of which the text says the right one
            target = self.of.doc_to_text(self.instances[0].doc)
        return self._said(target, options) if isinstance(target, int) and 0 <= target < len(options) else str(target)

    def _said(self, place: int, options: Sequence[Answer]) -> str:
        """An option: what was scored of it, or its beginning where all go on alike."""
        return str(self._options[place]) if self.of.multiple_input else options[place].text

    def _is_mean(self, metric: str) -> bool:
        return self.of.aggregation().get(metric, mean) is mean


@dataclass(frozen=True)
class Suite:
    """tasks by their names, lm-eval's groups of them, and the documents of each task."""

    tasks: dict[str, Task]
    groups: dict[str, Any]
    documents: dict[str, list[Document]]

    @classmethod
    def load(
        cls,
        names: Sequence[str],
        include_path: Sequence[Path],
        harness: Harness,
        *,
        num_fewshot: int | None = None,
        chat: bool = False,
        unsafe_code: bool = False,
    ) -> Suite:
        """The tasks of these names, YAML files and items, with every prompt as lm-eval writes it for a whole run.

        So a document's examples are the same whichever documents are drawn. Raises `RecipeError` for a name that isn't
        known and for a task that needs what isn't there, `DataError` for one whose data or code can't be had.
        """
        manager, specs = _found(names, include_path)
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        with guarded(", ".join(names)):
            loaded = manager.load(specs)
        documents = {}
        for name, task in loaded["tasks"].items():
            _require_possible(name, task, unsafe_code)
            _set_shots(task, num_fewshot)
            with guarded(name):
                documents[name] = _built(task, harness, chat)
        return cls(loaded["tasks"], loaded["groups"], documents)

    def results(self, answered: Mapping[str, AbstractSet[int]], harness: Harness) -> dict[str, Any]:
        """lm-eval's own results over those documents of each task that are answered; `harness` is asked again."""
        chosen = {name: sorted(numbers) for name, numbers in answered.items() if numbers}
        for name, numbers in chosen.items():
            self._hand_in(name, numbers)
        some = {name: numbers for name, numbers in chosen.items() if len(numbers) < len(self.documents[name])}
        loaded = {"tasks": {name: self.tasks[name] for name in chosen}, "groups": self.groups}
        with guarded(", ".join(chosen)):
            return evaluate(harness, loaded, samples=some, bootstrap_iters=BOOTSTRAPS, confirm_run_unsafe_code=True)

    def _hand_in(self, name: str, numbers: Sequence[int]) -> None:
        """Have the evaluator take the instances that are there, numbered among the chosen documents, and build none."""
        task, documents = self.tasks[name], self.documents[name]
        task._instances = [
            replace(instance, resps=[], filtered_resps={}, metadata=(name, place, instance.repeats))
            for place, number in enumerate(numbers)
            for instance in documents[number].instances
        ]
        task.build_all_requests = _no_more

    def hashes(self, name: str) -> dict[str, Any]:
        """Digests that tell a task from another of its name, and its prompts from others."""
        config = self.tasks[name].config.to_dict(keep_callable=True)
        config.get("metadata", {}).pop("config_source", None)
        asked = [instance.args for document in self.documents[name] for instance in document.instances]
        return {
            "task": files.digest(
                [json.dumps(config, sort_keys=True, default=_source), [one.id for one in self.documents[name]]]
            ),
            "prompts": files.digest(json.dumps(asked, default=_source)),
            "version": self.tasks[name].VERSION,
            "num_fewshot": config.get("num_fewshot"),
        }


def label(metric: str, filter_name: str) -> str:
    """A metric and its filter, where it has one, as one name."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _found(names: Sequence[str], include_path: Sequence[Path]) -> tuple[TaskManager, list[str | dict[str, Any]]]:
    """lm-eval's index of tasks, and what it is to load of them."""
    for folder in include_path:
        if not folder.is_dir():
            raise RecipeError(
                "include_path", found=str(folder), expected="a folder of YAML tasks", mend="Name one that is there."
            )
    yaml = [Path(name) for name in names if name.endswith((".yaml", ".yml")) and Path(name).is_file()]
    listed = [name for name in names if not name.startswith(ITEMS) and Path(name) not in yaml]
    paths = [lm_tasks.PATH, *include_path, *(path.parent for path in yaml)]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not _complete(manager, listed):  # lm-eval's own are thousands of files
        manager = TaskManager(include_path=paths)
    specs: list[str | dict[str, Any]] = []
    for name in names:
        if name.startswith(ITEMS):
            tasks = read_tasks(Path(name.removeprefix(ITEMS)))
            specs += [items_config(task, items) for task, items in tasks.items()]
        elif name in listed:
            specs += manager.match_tasks([name]) or _unknown(name, manager)
        else:
            specs.append(name)
    return manager, specs


def _complete(manager: TaskManager, names: Sequence[str]) -> bool:
    """Whether an index has all these names and all that its groups are made of."""
    members = [
        member
        for entry in manager.task_index.values()
        if entry.name in manager.all_groups
        for member in entry.cfg.get("task") or ()
    ]
    return all(isinstance(name, str) and manager.match_tasks([name]) for name in (*names, *members))


def _unknown(name: str, manager: TaskManager) -> list[str]:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
    raise RecipeError(
        "tasks",
        found=repr(name),
        expected="a task or group of lm-eval, of include_path or of Espalier, a YAML file, or items:FILE",
        mend=f"Did you mean {' or '.join(map(repr, near))}?" if near else "List lm-eval's with `lm-eval ls tasks`.",
    )


@contextlib.contextmanager
def guarded(where: str) -> Iterator[None]:
    """Turn any error into a `DataError`: a task is other people's code and data, in which anything may go wrong."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.error("%s", where, exc_info=error)
        away = isinstance(error, ConnectionError) or "offline" in str(error).lower()
        raise DataError(
            f"tasks: {where}",
            found=" ".join(f"{type(error).__name__}: {error}".split())[:200],
            expected="its dataset on the disk or within reach" if away else "a task whose data and code can be used",
            mend="Load it once with a network, HF_HUB_OFFLINE and HF_DATASETS_OFFLINE unset."
            if away
            else "Mend the task; the run's log has the traceback.",
        ) from None


def _require_possible(name: str, task: Task, unsafe_code: bool) -> None:
    if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
        raise RecipeError(
            f"tasks: {name}",
            found="a task that runs what the model writes",
            expected="leave to do so",
            mend="Set unsafe_code=run where nothing can be harmed, or leave the task out.",
        )
    if getattr(task, "MULTIMODAL", False):
        raise RecipeError(
            f"tasks: {name}", found="pictures or sounds", expected="text alone", mend="Leave the task out."
        )
    for metric, aggregation in task.aggregation().items():
        if not callable(aggregation):  # lm-eval would tell when all is asked and paid for
            raise DataError(
                f"tasks: {name}",
                found=f"no aggregation of {metric}",
                expected="one that lm-eval knows, such as mean",
                mend="Mend the task's metric_list.",
            )


def _set_shots(task: Task, num_fewshot: int | None) -> None:
    """lm-eval's rule: the recipe's number counts where the task doesn't forbid examples; its seed is lm-eval's."""
    own = task.get_config("num_fewshot")
    if own is None or (own and num_fewshot is not None):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _built(task: Task, harness: Harness, chat: bool) -> list[Document]:
    task.build_all_requests(
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        chat_template=harness.apply_chat_template if chat else None,
        tokenizer_name=harness.tokenizer_name if chat else "",
    )
    return list(_documents(task))


def _no_more(**_: Any) -> None:
    """In the place of a task's `build_all_requests`."""


def _documents(task: Task) -> Iterator[Document]:
    by_number: dict[int, list[Instance]] = {}
    for instance in task.instances:
        by_number.setdefault(instance.doc_id, []).append(instance)
    for number, instances in by_number.items():
        yield Document(task, number, tuple(sorted(instances, key=lambda instance: instance.idx)))


def _source(value: object) -> str:
    """A function by its source, which is the same in every process; anything else as it is written."""
    if not callable(value):
        return str(handle_non_serializable(value))
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", type(value).__qualname__)
