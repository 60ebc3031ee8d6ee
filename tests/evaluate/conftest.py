"""An engine whose answers a test writes itself, and a run in which it is asked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import pytest

from espalier.infer.engine import Answer, Generate, Request
from espalier.ledger import Cost


class Scripted:
    """Writes what `write` says of a prompt, scores what `score` says of a prompt and a continuation.

    A character is a token; a request costs a cent.
    """

    identity, context, exact = "scripted", None, True

    def __init__(
        self,
        write: Callable[[str], str] = lambda prompt: "",
        score: Callable[[str, str], float] = lambda prompt, continuation: 0.0,
    ) -> None:
        self.write, self.score = write, score
        self.asked: list[Request] = []

    def answers(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, None]:
        # From the end, as any order is allowed.
        for number in reversed(range(len(requests))):
            request = requests[number]
            self.asked.append(request)
            if isinstance(request, Generate):
                text = self.write(request.prompt)
                end = min((text.find(stop) for stop in request.stop if stop in text), default=len(text))
                told = (text[:end], (), "stop")
            else:
                told = (request.continuation, (self.score(request.prompt, request.continuation),), "scored")
            text, logprobs, finish = told
            tokens = tuple(map(ord, text))
            yield number, Answer(text, tokens, logprobs, True, len(request.prompt), len(text), finish, Cost(usd=0.01))

    def count(self, text: str) -> int:
        return len(text)

    def estimate(self, requests: Sequence[Request]) -> Cost:
        return Cost(usd=0.01) * len(requests)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)

    def close(self) -> None:
        pass


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted
