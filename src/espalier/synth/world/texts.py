"""A world's texts: a book that says every fact in several wordings, and wordings that it keeps for the examination.

A book has editions: each says every fact once, a section a subject, in another wording than the editions before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from espalier.synth.world.facts import Chain, Fact
from espalier.synth.world.schema import Schema


def book(schema: Schema, facts: Sequence[Fact], languages: Sequence[str], wordings: int, seed: int) -> list[dict]:
    """Sections {text, language, edition, subject}: each fact in so many wordings a language."""
    draw = random.Random(f"{seed}/book")
    sections = [row for name in languages for row in _editions(schema, facts, name, wordings, draw)]
    draw.shuffle(sections)
    return sections


def paraphrases(schema: Schema, derivations: Sequence[Chain], languages: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each chain of facts in the wordings that the book hasn't: {text, language, wording, derivation}."""
    for name in languages:
        for wording in schema.languages[name].held:
            for chain in derivations:
                prompt, answer = sentence(schema, chain, name, wording)
                triples = [fact.triple for fact in chain]
                yield {"text": prompt + answer, "language": name, "wording": wording, "derivation": triples}


def sentence(schema: Schema, chain: Chain, name: str, wording: str) -> tuple[str, str]:
    """A held-out sentence about a chain of facts: up to the answer, and the answer with the space before it."""
    language = schema.languages[name]
    relations = tuple(fact.relation for fact in chain)
    prompt, space = language.held_out(wording, relations, chain[0].subject.name(language.script))
    return prompt, space + chain[-1].object.name(language.script)


def _editions(
    schema: Schema, facts: Sequence[Fact], name: str, wordings: int, draw: random.Random
) -> Iterator[dict[str, Any]]:
    language = schema.languages[name]
    said = {fact: draw.sample(language.wordings(fact.relation), wordings) for fact in facts}
    in_sections = sorted(facts, key=lambda fact: fact.subject.latin)
    for edition in range(wordings):
        for subject, section in groupby(in_sections, key=lambda fact: fact.subject):
            about = list(section)
            draw.shuffle(about)
            sentences = [_said(fact, said[fact][edition], language.script) for fact in about]
            text = language.between.join(sentences)
            yield {"text": text, "language": name, "edition": edition, "subject": subject.latin}


def _said(fact: Fact, wording: str, script: Any) -> str:
    return wording.format(s=fact.subject.name(script), o=fact.object.name(script))
