"""Questions that test the format of a choice alone: which option is the word that was asked for?"""

from __future__ import annotations

import random

from pydantic import Field

from espalier.evaluate.questions import LETTERS, Question
from espalier.recipe import Recipe

_WORDS = (
    "apple bread candle door engine feather garden hammer island jacket kettle ladder mirror needle orange pencil "
    "queen river silver table uncle valley window yellow anchor basket castle dinner eagle forest guitar harbor "
    "insect jungle king lemon mountain number ocean paper rabbit school tiger umbrella village winter bottle circle"
)
WORDS = tuple(_WORDS.split())


class SyntheticRecipe(Recipe):
    """n questions with that many options each, the words drawn by the seed; phrase: how a {word} is asked for."""

    n: int = Field(default=400, ge=1)
    options: int = Field(default=4, ge=2, le=len(LETTERS))
    phrase: str = Field(default='Which option corresponds to "{word}"?', pattern=r"\{word\}")
    seed: int = 0


def synthetic(recipe: SyntheticRecipe) -> list[Question]:
    """The questions; every letter is right equally often."""
    draw = random.Random(recipe.seed)
    places = [number % recipe.options for number in range(recipe.n)]
    draw.shuffle(places)
    made = []
    for place in places:
        options = tuple(draw.sample(WORDS, recipe.options))
        made.append(Question(recipe.phrase.replace("{word}", options[place]), options, place))
    return made
