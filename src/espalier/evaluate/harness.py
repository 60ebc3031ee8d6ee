"""lm-eval's model over our engine, and the translation of what its tasks ask and are answered."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from espalier.errors import RecipeError
from espalier.infer.engine import Answer, Engine, Generate, Request, Score, answer_all
from espalier.run import log

KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "num_beams")
# It would fork a process a core for the bootstrap of a standard error.
os.environ.setdefault("DISABLE_MULTIPROC", "1")
# What the template makes of this tells one template from another.
PROBE = [{"role": "user", "content": "?"}]


class Harness(LM):
    """An engine as lm-eval's evaluator calls it, as in `simple_evaluate(Harness(engine), tasks=[...])`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._responses(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._responses(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._responses(requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it; an answer that is begun is to be gone on with."""
        if add_generation_prompt:
            return self.engine.chat(chat_history)
        *before, begun = chat_history
        return self.engine.chat(before) + begun["content"]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, shown by what it makes of a short conversation; None if it isn't applied."""
        return self.engine.chat(PROBE) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.engine.identity

    def _responses(self, instances: Sequence[Instance]) -> list[Any]:
        answers = answer_all(self.engine, requests(instances))
        return [response(instance, answer) for instance, answer in zip(instances, answers, strict=True)]


def requests(instances: Sequence[Instance]) -> list[Request]:
    """What a model is asked; an instance that comes again is sampled with the next seed."""
    seen: Counter[int] = Counter()
    found = []
    for instance in instances:
        found.append(_request(instance, seed=seen[id(instance)]))
        seen[id(instance)] += 1
    return found


def response(instance: Instance, answer: Answer) -> tuple[float, bool] | float | str:
    """An answer in the form in which lm-eval wants it."""
    match instance.request_type:
        case "loglikelihood":
            return answer.logprob, answer.greedy
        case "loglikelihood_rolling":
            return answer.logprob
        case _:
            return answer.text


def _request(instance: Instance, seed: int) -> Request:
    match instance.request_type:
        case "loglikelihood":
            prompt, continuation = instance.args
            return Score(prompt, continuation)
        case "loglikelihood_rolling":
            return Score("", instance.args[0])
        case _:
            prompt, told = instance.args
            return _generation(instance.task_name, prompt, normalize_gen_kwargs(told), seed)


def _generation(task: str, prompt: str, told: dict[str, Any], seed: int) -> Generate:
    if unknown := [key for key in told if key not in KNOWN or (key == "num_beams" and told[key] != 1)]:
        raise RecipeError(
            f"{task}: generation_kwargs.{unknown[0]}",
            found=repr(told[unknown[0]]),
            expected=f"settings among {', '.join(KNOWN)}, with one beam",
            mend="Change the task, or leave it out.",
        )
    temperature = float(told.get("temperature", 0.0))
    return Generate(
        prompt,
        max_new_tokens=told["max_gen_toks"],
        stop=tuple(stop for stop in told["until"] if stop),
        temperature=temperature,
        top_p=float(told.get("top_p", 1.0)) if temperature else 1.0,
        seed=seed if temperature else 0,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What lm-eval says goes to the run's log, and its bars and prints nowhere."""
    logger, handler = logging.getLogger("lm_eval"), _Log()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.handle(record)
