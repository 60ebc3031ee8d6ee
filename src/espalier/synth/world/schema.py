"""What a world may hold and how it is put into words: schema.yaml, read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import TypeAdapter

LANGUAGES = ("en", "de", "fr", "zh")


@dataclass(frozen=True)
class Kind:
    """Of entities; `endings` of names in Latin letters, and the same in Chinese characters."""

    share: float
    endings: dict[str, str]


@dataclass(frozen=True)
class Relation:
    """Between a kind of subject and a kind of object; a subject has one object."""

    subject: str
    object: str


@dataclass(frozen=True)
class Language:
    """How a language says things; the meaning of each field stands in schema.yaml."""

    script: Literal["latin", "han"]
    between: str
    inner: str
    hedge: str
    book: tuple[str, ...]
    held: dict[str, str]
    phrases: dict[str, str]
    says: dict[str, tuple[str, ...]]

    def phrase(self, relations: tuple[str, ...], subject: str) -> str:
        """What describes the end of a chain of relations that starts at a subject."""
        first, *rest = relations
        text = self.phrases[first].format(s=subject)
        for relation in rest:
            text = self.phrases[relation].format(s=self.inner.format(p=text))
        return text

    def wordings(self, relation: str) -> tuple[str, ...]:
        """The book's ways to say a fact, with {s} and {o} left open."""
        phrase = self.phrases[relation]
        # The subject may be the phrase's first word: only a letter of the phrase's own is made a capital.
        capital = phrase[0].upper() + phrase[1:]
        return (*self.says[relation], *(frame.replace("{p}", phrase).replace("{P}", capital) for frame in self.book))

    def held_out(self, wording: str, relations: tuple[str, ...], subject: str) -> tuple[str, str]:
        """An examination's sentence up to its answer, and what comes between them: a space, or nothing."""
        before = self.held[wording].format(p=self.phrase(relations, subject), o="")
        prompt = before.rstrip(" ")
        return prompt, before[len(prompt) :]


@dataclass(frozen=True)
class Schema:
    """Kinds, relations, syllables of names (Latin: Chinese) and languages, by name."""

    kinds: dict[str, Kind]
    relations: dict[str, Relation]
    syllables: dict[str, str]
    languages: dict[str, Language]


@cache
def schema() -> Schema:
    """The one that Espalier brings."""
    text = Path(__file__).with_name("schema.yaml").read_text(encoding="utf-8")
    return TypeAdapter(Schema).validate_python(yaml.safe_load(text))
