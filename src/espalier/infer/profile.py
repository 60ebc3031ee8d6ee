"""Measuring how long a model takes to read a prompt and to write after it: `espalier budget profile`.

Lengths are forced: a generation goes on to its last token whatever it says, so random tokens serve as well as text
(the protocol of arXiv 2305.02440). One generation has the times of all lengths up to its own in it.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
import transformers
from pydantic import Field
from rich.progress import track
from transformers import PreTrainedModel

from espalier import files, units
from espalier.budget import hardware, price
from espalier.budget.inference import PROFILE, Cell, Query, RuntimeProfile
from espalier.folder import ModelFolder
from espalier.method import method
from espalier.model import build
from espalier.recipe import Recipe
from espalier.run import Run

Clock = Callable[[], float]


class ProfileRecipe(Recipe):
    """What to measure: prompts and generations that the model has no positions for are left out."""

    model: Path
    prompts: tuple[int, ...] = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)
    generated: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    repeats: int = Field(default=10, gt=0, description="of each prompt, if the time allows it")
    seconds: float = Field(default=60.0, gt=0, description="after which no further prompt is begun")


@method(
    paper="arXiv 2305.02440",
    needs="a model folder; a machine that does nothing else",
    costs="the seconds asked for",
)
def profile(recipe: ProfileRecipe, run: Run) -> Path:
    """Measure how long the model takes to read prompts and to write after them, and fit a price for any query."""
    folder = ModelFolder.open(recipe.model)
    row = hardware.here(home=files.home())
    run.price(price.rates(row))
    torch.set_num_threads(hardware.free_cores())
    model = build.load(folder, dtype="auto").to(row.kind)
    prompts, lengths = grid(recipe.prompts, recipe.generated, folder.spec.max_position_embeddings)
    run.charge("load")
    cells = measure(model, prompts, lengths, repeats=recipe.repeats, seconds=recipe.seconds)
    run.charge("profile")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    made = RuntimeProfile.of(folder.path.name, folder.spec, row, versions, cells)
    made.save(run.folder / PROFILE)
    best = made.fits["minimum"]
    (shortest, least), (longest, most) = best.first[0], best.first[-1]
    run.tell(
        f"{units.duration(least)} to read {shortest} token, {units.duration(most)} to read {longest}, and"
        f" {units.duration(best.token.per_token)} for each further one (R² {best.token.r2:.4f}; with the context's"
        f" length {best.context.r2:.4f})"
    )
    if longest < prompts[-1]:
        run.tell(f"There was no time for prompts of more than {longest} tokens: raise seconds to measure them.")
    return run.folder / PROFILE


def grid(prompts: Sequence[int], generated: Sequence[int], positions: int) -> tuple[list[int], list[int]]:
    """The prompt lengths and the generated lengths, ascending, that fit into `positions` together.

    One token is always among the generated, since F(p) is T(p, 1), and half of the positions are left to prompts.
    """
    lengths = sorted({1, *(length for length in generated if length <= positions // 2)})
    return sorted({1, *(prompt for prompt in prompts if prompt <= positions - lengths[-1])}), lengths


def measure(
    model: PreTrainedModel,
    prompts: Sequence[int],
    lengths: Sequence[int],
    *,
    repeats: int,
    seconds: float = float("inf"),
    clock: Clock = time.perf_counter,
) -> list[Cell]:
    """The times of every prompt length with every generated length, by `clock`.

    Rounds go over all prompts, so that what disturbs the machine for a while doesn't fall on one of them. After
    `seconds` no further prompt is begun; prompts that were never reached have no cell.
    """
    generation_times(model, prompts[0], lengths, clock)  # the first run loads kernels and fills caches
    end = time.monotonic() + seconds
    found: dict[Query, list[float]] = defaultdict(list)
    rounds = list(product(range(repeats), prompts))
    for _, prompt in track(rounds, "measuring", transient=True, disable=not sys.stdout.isatty()):
        if found and time.monotonic() > end:
            break
        for length, took in zip(lengths, generation_times(model, prompt, lengths, clock), strict=True):
            found[Query(prompt, length)].append(took)
    return [Cell(query, tuple(times)) for query, times in found.items()]


@torch.inference_mode()
def generation_times(model: PreTrainedModel, prompt: int, lengths: Sequence[int], clock: Clock) -> list[float]:
    """Seconds until each of the ascending `lengths` of tokens is written after a random prompt, greedily, batch 1."""
    ids = torch.randint(model.config.vocab_size, (1, prompt), device=model.device)
    cache, times = None, []
    begin = _now(model, clock)
    for written in range(1, lengths[-1] + 1):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        if written in lengths:
            times.append(_now(model, clock) - begin)
    return times


def _now(model: PreTrainedModel, clock: Clock) -> float:
    """The time at which the model's device has done all that it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return clock()
