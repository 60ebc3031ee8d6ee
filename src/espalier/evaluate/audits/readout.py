"""What a model chooses among options, read in more ways than by the letter that it would write.

"Listening to the Wise Few", arXiv 2410.02343: some attention heads select an option and copy it, and in a model that
can't follow the format of letters they know more than the logits tell. A head's choice is the option whose token has
the largest product of its key with the query of the prompt's last token (QK-score), or the largest attention weight.
Which head to read is chosen by a few questions, and everything is told of the others.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from espalier import files
from espalier.budget import hardware, price
from espalier.data import tokenizer
from espalier.errors import DataError, ModelError
from espalier.evaluate.audits.audit import Audit, Plan, read_heads, write_heads
from espalier.evaluate.audits.heads import Vectors, attention_layers
from espalier.evaluate.audits.reading import Reader, Token
from espalier.evaluate.audits.synthetic import SyntheticRecipe, synthetic
from espalier.evaluate.items import SAMPLES, write_outcomes
from espalier.evaluate.questions import CLOZE, LETTERED, Question, read_questions
from espalier.evaluate.told import tell_and_save
from espalier.folder import ModelFolder
from espalier.method import method
from espalier.model import build
from espalier.recipe import Recipe
from espalier.run import Run
from espalier.train.device import Device

HEADS = "mcq_head.json"


class ReadoutRecipe(Recipe):
    """A model folder, the questions, and how they are read.

    questions     JSON lines of question, options, answer, and perhaps context and tags; or how many to generate
    extra         wrong options at the end of every question, never shuffled, such as "None of the above"
    limit         most questions, drawn by the seed
    also          what is read beside the letters' logits and the QK-scores: attention weights, which want the eager
                  kernel, and the probability of the options' texts, which wants a pass an option
    template      of the prompt, with {options}
    cloze         of the prompt without options, after which an option's text is scored
    token         which token of an option's line stands for the option: the one that ends the line, the last of the
                  text, the letter's, or the mean over the text
    vectors       queries and keys after the model's own norm of them, where it has one, or as they were projected
    validation    share of the questions by which heads are chosen
    heads         the mcq_head.json of another run: its heads are read, none is chosen
    permutations  random orders in which the options are shown besides the given one
    silence       how many of the best heads are silenced in the causal check, at most a quarter of all
    """

    model: Path
    questions: Path | SyntheticRecipe = SyntheticRecipe()
    extra: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=2)
    also: tuple[Literal["attention", "options"], ...] = ("attention", "options")
    template: str = LETTERED
    cloze: str = CLOZE
    token: Token = "eol"
    vectors: Vectors = "normed"
    validation: float = Field(default=0.05, gt=0, lt=1)
    heads: Path | None = None
    permutations: int = Field(default=1, ge=0)
    silence: int = Field(default=10, ge=0)
    seed: int = 0
    dtype: Literal["auto", "float32"] = Field(default="float32", description="auto: that of the weights")
    threads: int | None = Field(default=None, gt=0, description="of the CPU; those that are free if not stated")

    @model_validator(mode="after")
    def _templates(self) -> Self:
        for key, template, blocks in (("template", self.template, 1), ("cloze", self.cloze, 0)):
            if template.count("{options}") != blocks or "{question}" not in template:
                raise ValueError(f"{key} wants {{question}}, and {{options}} {'once' if blocks else 'nowhere'}")
        return self


@method(
    paper="arXiv 2410.02343",
    needs="a model folder of a decoder with ordinary attention",
    costs="a forward pass for each question and order, and one for each option",
    status="proven",
)
def evaluate_readout(recipe: ReadoutRecipe, run: Run) -> Path:
    """Read a model's choices from its attention heads, its letters and its options' probabilities, side by side."""
    folder = ModelFolder.open(recipe.model)
    task, questions = _questions(recipe)
    reader = _open(folder, recipe, run)
    given = read_heads(recipe.heads, reader) if recipe.heads else None
    run.charge("load")
    plan = Plan(
        task,
        validation=recipe.validation,
        given=given,
        fixed=len(recipe.extra),
        permutations=recipe.permutations,
        options="options" in recipe.also,
        silence=recipe.silence,
        seed=recipe.seed,
    )
    audit = Audit(reader, questions, plan)
    report = audit.report(str(recipe.model))
    report.context["model"] = folder.fingerprint()
    write_outcomes(run.folder / SAMPLES, audit.outcomes())
    write_heads(run.folder / HEADS, audit.best(), reader)
    run.charge("evaluate", flops=2.0 * reader.model.num_parameters() * audit.tokens)
    run.tell(audit.table())
    return tell_and_save(report, run)


def _questions(recipe: ReadoutRecipe) -> tuple[str, list[Question]]:
    """Their name, and as many as the limit says, drawn by the seed, with the extra options."""
    if isinstance(recipe.questions, SyntheticRecipe):
        task, found = "synthetic", synthetic(recipe.questions)
    else:
        task, found = recipe.questions.stem, read_questions(recipe.questions)
    random.Random(recipe.seed).shuffle(found)
    return task, [_with_extra(question, recipe.extra) for question in found[: recipe.limit]]


def _with_extra(question: Question, extra: tuple[str, ...]) -> Question:
    try:
        return question.with_options(extra)
    except ValueError as error:
        raise DataError(
            f"extra, with {question.question[:60]!r}",
            found=str(error),
            expected="at most 24 options, no two of them equal",
            mend="Change extra=..., or leave the question out.",
        ) from None


def _open(folder: ModelFolder, recipe: ReadoutRecipe, run: Run) -> Reader:
    """The model, where it is to be read."""
    row = hardware.here(home=files.home())
    run.price(price.rates(row))
    words = tokenizer.load(folder.path)
    model = build.load(folder, dtype="auto" if recipe.dtype == "auto" else torch.float32)
    rows, ids = model.get_input_embeddings().num_embeddings, tokenizer.id_count(words)
    if ids > rows:
        raise ModelError(
            str(folder.path),
            found=f"a tokenizer of {ids} ids and an embedding of {rows} rows",
            expected="a row for every id",
            mend="Use the tokenizer that the model was trained with.",
        )
    attention: Literal["eager", "sdpa"] = "eager" if "attention" in recipe.also else "sdpa"
    device = Device(kind=row.kind, threads=recipe.threads or hardware.free_cores(), attention=attention)
    device.prepare()
    device.place(model)
    return Reader(model, attention_layers(model), words, recipe.template, recipe.cloze, recipe.token, recipe.vectors)
