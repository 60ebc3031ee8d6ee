"""Asking a model: two kinds of request, one kind of answer, whoever answers.

A model folder answers in this process (`local`), anything behind an OpenAI-compatible URL, vLLM too, over HTTP
(`remote`). Who asks knows neither: `open_engine` chooses by the recipe.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from espalier.errors import DataError
from espalier.infer.recipe import EngineRecipe
from espalier.ledger import Cost
from espalier.run import Run


@dataclass(frozen=True)
class Generate:
    """Write on after a prompt; greedily at temperature 0.

    stop  texts at the first of which the answer is cut off
    """

    prompt: str
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Say how probable a continuation is after a prompt.

    Spaces that end the prompt count as the continuation's, both are tokenized together, and an empty prompt is one
    end-of-text token, as in lm-eval: in this process what is longer than the context loses its beginning, and where
    there is no prompt it is scored in windows; a server refuses it.
    """

    prompt: str
    continuation: str


Request = Generate | Score


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    text      what was written, or the continuation that was scored
    tokens    its tokens: ids, or pieces of text where a server doesn't tell ids; ids of what ended it are among them
    logprobs  of each, in nats; none where a server doesn't tell them
    greedy    whether each was the most probable one
    cost      what it took besides time: FLOPs in this process, money at a server
    """

    text: str
    tokens: tuple[int, ...] | tuple[str, ...]
    logprobs: tuple[float, ...]
    greedy: bool
    prompt_tokens: int
    completion_tokens: int
    finish: Literal["stop", "length", "scored"]
    cost: Cost = field(default_factory=Cost)

    @property
    def logprob(self) -> float:
        """Of the whole text, in nats."""
        return sum(self.logprobs)


class Engine(Protocol):
    """Whoever answers.

    identity  what tells one model from another: a folder's fingerprint, or a URL and a name
    context   most tokens of a prompt and its answer; None where a server doesn't tell
    exact     whether `count` knows the model's tokens, or estimates their number
    """

    identity: str
    context: int | None
    exact: bool

    def answers(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, None]:
        """(index of the request, answer) in the order in which they are done; closing the iterator ends the work."""
        ...

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        ...

    def estimate(self, requests: Sequence[Request]) -> Cost:
        """What answering would cost, before it is done: of generations the longest that they may become."""
        ...

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as the model's own template writes it, up to where the model is to go on."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


def open_engine(recipe: EngineRecipe, run: Run) -> Engine:
    """The engine that a recipe names; its seconds are priced as the run's."""
    if recipe.url:
        from espalier.infer.remote import Remote

        return Remote.open(recipe, run)
    from espalier.infer.local import Local

    return Local.open(recipe, run)


def require_unicode(text: str) -> str:
    """The text; `DataError` for one that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            "prompt", found=f"{text[:60]!r}", expected="valid Unicode", mend="Repair the item, or leave it out."
        ) from None
    return text


def answer_all(engine: Engine, requests: Sequence[Request]) -> list[Answer]:
    """The answers in the order of their requests."""
    found = dict(engine.answers(requests))
    return [found[number] for number in range(len(requests))]
