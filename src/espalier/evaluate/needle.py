"""A needle in a haystack: how far back, and how deep in it, a model finds a fact that it was told once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated

from pydantic import Field

from espalier import files
from espalier.errors import DataError, RecipeError
from espalier.evaluate.ask import AskRecipe, ask
from espalier.evaluate.haystack import LANGUAGES, Language, sentences_of
from espalier.evaluate.items import Item
from espalier.evaluate.told import tell_and_save
from espalier.infer.engine import Engine, open_engine
from espalier.method import method
from espalier.run import Run

# What an answer may take: five digits, each a token at worst, and what may come before them.
ANSWER_TOKENS = 12
OPTIONS = 4
_Count = Callable[[str], int]
Depth = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[int, Field(gt=0)]


class NeedleRecipe(AskRecipe):
    """Which haystacks: every length with every depth.

    lengths    tokens of the prompt and its answer
    depths     where the needle lies: 0 at the beginning, 1 at the end
    needles    facts of one kind that are hidden, one of which is asked for; the others lie anywhere
    n          items of each length, depth and language
    languages  of hay and needles
    text       the user's own file as hay, instead of sentences about nothing
    """

    lengths: tuple[Length, ...] = Field(default=(512, 1024, 2048), min_length=1)
    depths: tuple[Depth, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    needles: int = Field(default=1, ge=1, le=8)
    n: int = Field(default=10, gt=0)
    languages: tuple[str, ...] = Field(default=("en",), min_length=1)
    text: Path | None = None


@method(needs="a model", costs="reading lengths × depths × n prompts")
def evaluate_needle(recipe: NeedleRecipe, run: Run) -> Path:
    """Ask for a fact hidden in long texts, by how long they are and how deep it lies."""
    if unknown := set(recipe.languages) - LANGUAGES.keys():
        raise RecipeError(
            "languages",
            found=", ".join(sorted(unknown)),
            expected=f"some of {', '.join(LANGUAGES)}",
            mend="Leave the others out.",
        )
    engine = open_engine(recipe, run)
    try:
        _require_context(recipe, engine)
        return tell_and_save(ask(needle_items(recipe, engine), recipe, run, engine), run)
    finally:
        engine.close()


def needle_items(recipe: NeedleRecipe, engine: Engine) -> dict[str, list[Item]]:
    """The items by task, a task a length; the same for the same recipe and the same way of counting tokens."""
    own = sentences_of(recipe.text) if recipe.text else None
    count = cache(engine.count)
    return {
        f"needle_{length}": [
            _item(recipe, language, length, depth, number, own, count)
            for language in recipe.languages
            for depth in recipe.depths
            for number in range(recipe.n)
        ]
        for length in recipe.lengths
    }


def _item(
    recipe: NeedleRecipe,
    name: str,
    length: int,
    depth: float,
    number: int,
    own: Sequence[str] | None,
    count: _Count,
) -> Item:
    """One haystack with its needles and its question."""
    draw = random.Random(files.digest([recipe.seed, recipe.needles, name, length, depth, number]))
    language = LANGUAGES[name]
    places = draw.sample(language.places, recipe.needles)
    numbers = draw.sample(range(10_000, 100_000), max(recipe.needles, OPTIONS))
    facts = [language.needle.format(place=place, number=told) for place, told in zip(places, numbers, strict=False)]
    depths = [depth, *(draw.random() for _ in facts[1:])]
    hay = _own(own, draw) if own else language.sentences(draw)
    question = language.question.format(place=places[0])
    options = [language.number.format(number=each) for each in numbers[:OPTIONS]]
    gold = options[0]
    draw.shuffle(options)
    return Item(
        task=f"needle_{length}",
        prompt=_filled(language, hay, list(zip(depths, facts, strict=True)), question, length - ANSWER_TOKENS, count),
        gold=gold,
        options=tuple(options),
        max_new_tokens=ANSWER_TOKENS,
        stop=("\n", ".", "。", ","),
        tags={"depth": f"{depth:g}", "length": str(length), "language": name},
    )


def _filled(
    language: Language,
    hay: Iterator[str],
    needles: Sequence[tuple[float, str]],
    question: str,
    room: int,
    count: _Count,
) -> str:
    """A prompt with as much hay as its tokens have room for, at most."""
    frame = count(_prompt(language, [], needles, question))
    if frame > room:
        raise RecipeError(
            "lengths",
            found=f"{room + ANSWER_TOKENS} tokens",
            expected=f"at least {frame + ANSWER_TOKENS}, for the question and what is hidden",
            mend="State longer ones, or fewer needles.",
        )
    sentences, used = [], frame
    for sentence in hay:
        used += count(language.between + sentence)
        if used > room:
            break
        sentences.append(sentence)
    else:
        raise DataError(
            "text",
            found=f"{used} tokens",
            expected=f"hay for {room + ANSWER_TOKENS}",
            mend="Name a longer file, or state shorter lengths.",
        )
    # Tokens of parts need not sum up to those of the whole.
    while sentences and count(_prompt(language, sentences, needles, question)) > room:
        sentences.pop()
    return _prompt(language, sentences, needles, question)


def _prompt(language: Language, sentences: Sequence[str], needles: Sequence[tuple[float, str]], question: str) -> str:
    """The hay with each needle at its depth, between what the model is told and what it is asked."""
    hay = list(sentences)
    for depth, needle in sorted(needles, reverse=True):
        hay.insert(round(depth * len(sentences)), needle)
    return f"{language.intro}\n\n{language.between.join(hay)}\n\n{question}"


def _own(sentences: Sequence[str], draw: random.Random) -> Iterator[str]:
    """All sentences of the user's text, from a drawn one on and around."""
    start = draw.randrange(len(sentences))
    return islice(cycle(sentences), start, start + len(sentences))


def _require_context(recipe: NeedleRecipe, engine: Engine) -> None:
    if engine.context is not None and max(recipe.lengths) > engine.context:
        raise RecipeError(
            "lengths",
            found=f"{max(recipe.lengths):,} tokens",
            expected=f"at most {engine.context:,}, the model's context",
            mend="Leave the longer ones out, or ask a model that reads more.",
        )
