"""How large a world is, in which languages, and how it is examined."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from espalier.recipe import Recipe


class WorldRecipe(Recipe):
    """A world of facts, the book that says them, and the items that ask for them.

    wordings     of each fact in the book, a language
    two_hop      share of the items that join two facts
    distractors  wrong answers of an item
    cue          planted on one option: "length" makes it longer, "overlap" names the subject in it, "letter" puts it
                 first; on the right one with the probability `strength`, else on any
    """

    seed: int = Field(default=0, ge=0, description="worlds whose seeds differ modulo 64 share no name")
    facts: int = Field(default=200, ge=40, le=4000)
    languages: tuple[Literal["en", "de", "fr", "zh"], ...] = Field(default=("en", "de", "zh"), min_length=1)
    wordings: int = Field(default=12, ge=1, le=18)
    items: int = Field(default=400, ge=1)
    two_hop: float = Field(default=0.25, ge=0, le=1)
    distractors: int = Field(default=3, ge=1, le=7)
    cue: Literal["none", "length", "overlap", "letter"] = "none"
    strength: float = Field(default=0.6, ge=0, le=1)

    @model_validator(mode="after")
    def _each_language_once(self) -> Self:
        if len(set(self.languages)) < len(self.languages):
            raise ValueError(f"languages {', '.join(self.languages)} where each can be only once")
        return self
