"""Held-out loss of a model folder on any text: nats a token, and bits a byte to compare between vocabularies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from espalier import files
from espalier.budget import flops, hardware, price
from espalier.data.prepare import VALIDATION, DataRecipe, prepare
from espalier.evaluate.items import SAMPLES, Outcome, write_outcomes
from espalier.evaluate.told import tell_and_save
from espalier.folder import ModelFolder
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import Run

if TYPE_CHECKING:
    from espalier.train.validate import HeldOut


class LossRecipe(Recipe):
    """model: a model folder; data: whose held-out split to take; eval_tokens: how much of it."""

    model: Path
    data: DataRecipe = DataRecipe()
    eval_tokens: int = Field(default=262_144, gt=0)
    per_device_eval_batch_size: int = Field(default=8, gt=0)


# What the held-out text is called as a task.
TASK = "held-out"


@method(needs="a model folder with its tokenizer", costs="a forward pass over eval_tokens")
def evaluate_loss(recipe: LossRecipe, run: Run) -> Path:
    """Measure the loss on held-out text, in nats a token and bits a byte."""
    from espalier.data import pack, tokenizer
    from espalier.data.stream import Stream
    from espalier.model import build
    from espalier.train.device import Device
    from espalier.train.objectives import NextToken
    from espalier.train.validate import validate

    folder = ModelFolder.open(recipe.model)
    row = hardware.here(home=files.home())
    run.price(price.rates(row))
    dataset = prepare(recipe.data, home=files.home(), tell=run.tell)
    words = tokenizer.load(folder.path)
    folder.spec.require_vocabulary(tokenizer.id_count(words), where=str(folder.path))
    tokens = pack.tokenize(dataset, VALIDATION, folder.path, home=files.home(), tell=run.tell)
    stream = Stream(
        tokens,
        sequence_length=recipe.data.sequence_length,
        seed=0,
        attend=recipe.data.attend,
        eos_id=tokenizer.eos_id(folder.path),
    )
    run.charge("data")
    device = Device(kind=row.kind, threads=hardware.free_cores(), compute="float32")
    device.prepare()
    model = build.load(folder)
    device.place(model)
    result = validate(
        model,
        stream,
        tokenizer.byte_lengths(words),
        NextToken(),
        device,
        rows=max(recipe.eval_tokens // recipe.data.sequence_length, 1),
        micro_rows=recipe.per_device_eval_batch_size,
    )
    run.charge("evaluate", flops=result.tokens * flops.forward_flops(folder.spec, recipe.data.sequence_length))
    report = Report(str(recipe.model), context={"data": dataset.fingerprint(), "model": folder.fingerprint()})
    report.add(TASK, "loss", result.loss, stderr=result.stderr, n=result.tokens, note="nats a token")
    report.add(TASK, "bpb", result.bpb, n=result.tokens, note="bits a byte")
    # Batches are the same text only where data, vocabulary and rows are.
    asked = [dataset.fingerprint(), folder.tokenizer_fingerprint(), recipe.data.model_dump(mode="json")]
    write_outcomes(run.folder / SAMPLES, _outcomes(result, [*asked, recipe.per_device_eval_batch_size]))
    run.tell(f"{recipe.model}: loss {result.loss:.4f} ± {result.stderr:.4f} nats a token, {result.bpb:.4f} bits a byte")
    return tell_and_save(report, run)


def _outcomes(result: HeldOut, asked: list[Any]) -> Iterator[Outcome]:
    """A batch is an item, and the mean of their scores is the figure: so two models can be compared batch by batch."""
    nats, tokens, text_bytes = zip(*result.batches, strict=True)
    per_token, per_byte = (len(nats) / max(sum(each), 1) for each in (tokens, text_bytes))
    for number, loss in enumerate(nats):
        scores = {"loss": loss * per_token, "bpb": loss / math.log(2) * per_byte}
        name = files.digest([*asked, len(nats), number])[:16]
        yield Outcome(TASK, name, scores, "", "", 0.0, tokens[number], 0)
