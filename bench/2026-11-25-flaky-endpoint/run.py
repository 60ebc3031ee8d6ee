"""Two thousand calls to a server of which 30% fail: is any lost, doubled or wrong, do deadline and budget hold?

    python bench/2026-11-25-flaky-endpoint/run.py

The server is that of the tests, on this machine: its model is a hash, so every answer can be checked, and it counts
what it answered. Half of the calls score a continuation, half write. Each seed is asked four times: without a cap on
money, once more from the cache, with a cap that isn't enough, and with a deadline that often isn't, as many runs after
each other as it takes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests" / "infer"))

import stub  # noqa: E402

from espalier.errors import BudgetError, RunError  # noqa: E402
from espalier.infer.engine import Answer, Generate, Request, Score  # noqa: E402
from espalier.infer.recipe import EngineRecipe  # noqa: E402
from espalier.infer.remote import Remote  # noqa: E402
from espalier.ledger import Cap  # noqa: E402
from espalier.recipe import Recipe  # noqa: E402
from espalier.run import Run  # noqa: E402

CALLS, SHARE, SEEDS = 2000, 0.3, (0, 1, 2)
HASTE = 10.0
SETTINGS = {
    "concurrency": 16,
    "timeout_seconds": 2.0,
    "deadline_seconds": 60.0,
    "usd_per_million_prompt_tokens": 1000.0,
    "usd_per_million_completion_tokens": 5000.0,
}


def requests() -> list[Request]:
    texts = [f"Text number {number}" for number in range(CALLS)]
    return [Score(text, " and so on") if n % 2 else Generate(text, max_new_tokens=8) for n, text in enumerate(texts)]


def right(request: Request, answer: Answer) -> bool:
    """Whether an answer is the model's own."""
    model = stub.Model()
    if isinstance(request, Score):
        tokens, logprobs, greedy = model.score(request.prompt, request.continuation)
        return (answer.tokens, answer.logprobs, answer.greedy) == (tokens, logprobs, greedy)
    return answer.text == "".join(model.write(request.prompt, request.max_new_tokens))


class Watched(Remote):
    """Notes how long each answer took, from its first try."""

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self.took: list[float] = []

    async def _ask(self, *told: Any) -> Answer:
        began = time.monotonic()
        try:
            return await super()._ask(*told)
        finally:
            self.took.append(time.monotonic() - began)


def asked(server: stub.Stub, folder: Path, usd: float = math.inf, **settings: float) -> dict[str, Any]:
    """Ask all requests under a cap, with changed settings; what came of it."""
    before = server.answered.copy()
    faults, came = server.faults.total(), server.came.total()
    recipe = EngineRecipe(model="hash", url=server.url, remote=SETTINGS | settings)
    with Run.start(folder, Recipe(), cap=Cap(usd=usd), tell=lambda line: None) as run:
        engine = Watched.open(recipe, run)
        answers: list[tuple[int, Answer]] = []
        began, ended = time.monotonic(), "all asked"
        try:
            for answer in engine.answers(requests()):
                answers.append(answer)
        except (BudgetError, RunError) as error:
            ended = str(error)
        seconds = time.monotonic() - began
        engine.close()
    every = requests()
    counts = Counter(number for number, _ in answers)
    served = server.answered - before
    return {
        "ended": ended,
        "answers": len(answers),
        "lost": CALLS - len(counts),
        "doubled": sum(count - 1 for count in counts.values()) + sum(count - 1 for count in served.values()),
        "wrong": sum(not right(every[number], answer) for number, answer in answers),
        "answered_by_server": served.total(),
        "requests": server.came.total() - came,
        "faults": server.faults.total() - faults,
        "longest_seconds": max(engine.took, default=0.0),
        "usd": sum(answer.cost.usd for _, answer in answers),
        "cap": usd if math.isfinite(usd) else None,
        "seconds": seconds,
    }


def one(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place, stub.Stub(faults=SHARE, seed=seed) as server:
        os.environ["ESPALIER_HOME"] = f"{place}/home"
        free = asked(server, Path(place) / "free")
        kinds = dict(server.faults)
        again = asked(server, Path(place) / "again")
        os.environ["ESPALIER_HOME"] = f"{place}/another"
        capped = asked(server, Path(place) / "capped", free["usd"] / 2)
        os.environ["ESPALIER_HOME"] = f"{place}/third"
        hasty = [asked(server, Path(place) / "hasty0", deadline_seconds=HASTE)]
        while hasty[-1]["ended"] != "all asked":
            hasty.append(asked(server, Path(place) / f"hasty{len(hasty)}", deadline_seconds=HASTE))
    return {"seed": seed, "kinds": kinds, "free": free, "again": again, "capped": capped, "hasty": together(hasty)}


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of runs that went on where the one before ended: the last one has all answers."""
    added = ("answered_by_server", "requests", "faults", "usd", "seconds")
    return {
        **runs[-1],
        **{name: sum(run[name] for run in runs) for name in added},
        "longest_seconds": max(run["longest_seconds"] for run in runs),
        "wrong": sum(run["wrong"] for run in runs),
        "doubled": sum(run["answered_by_server"] for run in runs) - CALLS,
        "runs": len(runs),
    }


def main() -> None:
    results = []
    for seed in SEEDS:
        results.append(one(seed))
        print(results[-1], flush=True)
    (HERE / "result.json").write_text(json.dumps({"settings": SETTINGS, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
