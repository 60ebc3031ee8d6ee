"""An engine that keeps its answers in a file: what was asked before isn't asked again, and costs nothing."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from espalier import files
from espalier.evaluate.items import read_rows
from espalier.infer.engine import Answer, Engine, Request
from espalier.ledger import Cost

ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Entry:
    """One line: the digest of what was asked of whom, and the answer."""

    request: str
    answer: Answer


class Kept:
    """Answers from the file at `path`, and by `engine` what isn't there yet; equal requests are asked once."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine, self.path = engine, path
        self.identity, self.context, self.exact = engine.identity, engine.context, engine.exact
        with path.open("a+b") as file:
            files.cut_torn_line(file)
        self._answers = {entry.request: replace(entry.answer, cost=Cost()) for entry in read_rows(Entry, path)}

    def answers(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, None]:
        """What is kept first, then what is new, which is on the disk before it is given."""
        places, new = self._places(requests)
        for key, numbers in places.items():
            if key in self._answers:
                yield from ((number, self._answers[key]) for number in numbers)
        with (
            contextlib.closing(self.engine.answers(list(new.values()))) as stream,
            self.path.open("a", encoding="utf-8") as file,
        ):
            keys = list(new)
            for index, answer in stream:
                key = keys[index]
                with files.disk_errors(self.path):
                    file.write(json.dumps(asdict(Entry(key, answer)), ensure_ascii=False) + "\n")
                    file.flush()
                self._answers[key] = replace(answer, cost=Cost())
                first, *others = places[key]
                yield first, answer
                yield from ((number, self._answers[key]) for number in others)

    def estimate(self, requests: Sequence[Request]) -> Cost:
        """What is new costs."""
        return self.engine.estimate(list(self._places(requests)[1].values()))

    def count(self, text: str) -> int:
        return self.engine.count(text)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        return self.engine.chat(messages)

    def close(self) -> None:
        self.engine.close()

    def _places(self, requests: Sequence[Request]) -> tuple[dict[str, list[int]], dict[str, Request]]:
        """Where each request stands, by its digest, and those that have no answer yet."""
        places = defaultdict(list)
        for number, request in enumerate(requests):
            places[self._key(request)].append(number)
        return places, {key: requests[numbers[0]] for key, numbers in places.items() if key not in self._answers}

    def _key(self, request: Request) -> str:
        return files.digest([self.identity, type(request).__name__, asdict(request)])
