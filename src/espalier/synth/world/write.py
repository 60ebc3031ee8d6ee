"""Write a world: what is true in it, a book to learn it from, and an examination that shows who has learnt it.

book.jsonl         sections of text, for data.sources=[runs/NAME/book.jsonl]
items.jsonl        the examination, for `espalier evaluate items` and `espalier evaluate test_taking`
paraphrases.jsonl  every fact, and every two that join, in the examination's wordings
facts.jsonl        subject, relation, object
entities.jsonl     what has a name: kind, and the name in both scripts
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from espalier import files
from espalier.method import method
from espalier.run import Run
from espalier.synth.world.facts import chains, contradictions, invent
from espalier.synth.world.items import examination
from espalier.synth.world.recipe import WorldRecipe
from espalier.synth.world.schema import schema
from espalier.synth.world.texts import book, paraphrases

BOOK, ITEMS, PARAPHRASES, FACTS, ENTITIES = (
    "book.jsonl",
    "items.jsonl",
    "paraphrases.jsonl",
    "facts.jsonl",
    "entities.jsonl",
)


@method(paper="arXiv 2406.02394", costs="seconds; no model is asked")
def write_world(recipe: WorldRecipe, run: Run) -> Path:
    """Invent a domain that nobody can have read of: facts, a book in several languages, and an examination.

    The same recipe writes the same bytes. Raises `RecipeError` when more items are wanted than the facts make.
    """
    words = schema()
    world = invent(words, recipe.seed, recipe.facts)
    facts = world.facts
    assert not (wrong := contradictions(words, facts)), wrong
    items = examination(words, world, recipe)
    sections = book(words, facts, recipe.languages, recipe.wordings, recipe.seed)
    _write(
        run.folder / FACTS, (dict(zip(("subject", "relation", "object"), fact.triple, strict=True)) for fact in facts)
    )
    _write(run.folder / ENTITIES, map(asdict, world.entities))
    _write(run.folder / BOOK, sections)
    _write(run.folder / PARAPHRASES, paraphrases(words, [*chains(facts, 1), *chains(facts, 2)], recipe.languages))
    _write(run.folder / ITEMS, items)
    run.tell(
        f"{len(facts)} facts about {len(world.entities)} things, {len(sections):,} sections "
        f"({sum(len(row['text'].encode()) for row in sections) / 1e6:.2f} MB), {len(items)} items."
    )
    return run.folder


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
