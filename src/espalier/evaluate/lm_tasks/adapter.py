"""Items as lm-eval tasks: what a configuration says of them, and the scores that `ask` would give them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from espalier.errors import DataError
from espalier.evaluate.items import Item, option_scores, written_scores

IQ = "espalier_iq_"
VERSION = {"version": 1}
# What a user may state of the items, with `lm_eval --metadata` or in a YAML of their own.
STATED = ("n", "languages", "split", "shots", "lengths", "instruction", "seed")


class IqTask(ConfigurableTask):
    """A sub-task of the IQ evaluation; metadata may state what is in `STATED`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from espalier.evaluate.iq.tasks import TASKS

        task = TASKS[config["task"].removeprefix(IQ)]
        stated = {key: value for key, value in config["metadata"].items() if key in STATED}
        items = list(task.items(stated.pop("n", task.n), stated.pop("languages", task.languages[:1]), **stated))
        super().__init__(config=items_config(config["task"], items) | {"metadata": VERSION | config["metadata"]})


def items_config(task: str, items: Sequence[Item]) -> dict[str, Any]:
    """lm-eval's configuration of a task whose items have options all or none, and end at the same texts.

    Raises `DataError` where they don't.
    """
    if len({(bool(item.options), item.stop) for item in items}) > 1:
        raise DataError(
            f"items of {task}",
            found="some with options and some without, or different `stop`",
            expected="items of one kind in a task",
            mend="Give each kind a task of its own.",
        )
    rows = [{"prompt": item.prompt, "gold": item.gold, "options": list(item.options)} for item in items]
    return {
        "task": task,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "num_fewshot": 0,
        "process_results": scores,
        "metadata": VERSION,
        **(_chosen() if items[0].options else _written(items)),
    }


def scores(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Those of `ask`: of (log-probability, greedy) for each option, or of one text."""
    if doc["options"]:
        return option_scores(doc["options"], doc["gold"], [logprob for logprob, _ in results])
    return written_scores(doc["gold"], results[0])


def _chosen() -> dict[str, Any]:
    return {"output_type": "multiple_choice", "doc_to_choice": "options", "metric_list": _means("acc", "acc_norm")}


def _written(items: Sequence[Item]) -> dict[str, Any]:
    longest = max(item.max_new_tokens for item in items)
    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": list(items[0].stop), "max_gen_toks": longest, "do_sample": False},
        "metric_list": _means("exact_match"),
    }


def _means(*metrics: str) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]
