"""A world's examination: questions of one and two hops in wordings that its book hasn't, and cues if they are wanted.

Wrong answers are right answers to other questions of the same relation, drawn as often as they are right there. So a
name that is an option is no likelier to be right than another, and who knows no fact does no better than chance.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from espalier.errors import RecipeError
from espalier.synth.world.facts import Chain, Entity, World, chains
from espalier.synth.world.recipe import WorldRecipe
from espalier.synth.world.schema import Schema
from espalier.synth.world.texts import sentence


def examination(schema: Schema, world: World, recipe: WorldRecipe) -> list[dict[str, Any]]:
    """Rows {task, prompt, gold, options, tags, derivation}; `RecipeError` when there are fewer to ask."""
    draw = random.Random(f"{recipe.seed}/items")
    two = round(recipe.items * recipe.two_hop)
    rows = [
        row
        for hops, wanted in ((1, recipe.items - two), (2, two))
        for row in _rows(schema, world, hops, wanted, recipe, draw)
    ]
    draw.shuffle(rows)
    return rows


def _rows(
    schema: Schema, world: World, hops: int, wanted: int, recipe: WorldRecipe, draw: random.Random
) -> list[dict[str, Any]]:
    """So many items whose answer is so many facts away."""
    derivations = chains(world.facts, hops)
    languages = [(name, wording) for name in recipe.languages for wording in schema.languages[name].held]
    if wanted > len(derivations) * len(languages):
        raise RecipeError(
            "items",
            found=f"{wanted} items of {hops} hop{'s' * (hops > 1)}",
            expected=f"at most {len(derivations) * len(languages)}, from {len(world.facts)} facts",
            mend="Ask for fewer items, or for more facts or languages.",
        )
    answers = _answers(derivations)
    asked = draw.sample([(chain, *language) for language in languages for chain in derivations], wanted)
    # Each place is as often right as any other; what was drawn is in no order.
    return [
        _row(
            schema,
            chain,
            name,
            wording,
            _distractors(chain, answers, world, recipe.distractors, draw),
            number % (recipe.distractors + 1),
            recipe,
            draw,
        )
        for number, (chain, name, wording) in enumerate(asked)
    ]


def _row(
    schema: Schema,
    chain: Chain,
    name: str,
    wording: str,
    wrong: Sequence[Entity],
    place: int,
    recipe: WorldRecipe,
    draw: random.Random,
) -> dict[str, Any]:
    language = schema.languages[name]
    prompt, right = sentence(schema, chain, name, wording)
    space = right.removesuffix(chain[-1].object.name(language.script))
    options = [right, *(space + entity.name(language.script) for entity in wrong)]
    subject = chain[0].subject.name(language.script)
    additions = {"length": language.hedge, "overlap": f"（{subject}）" if language.script == "han" else f" ({subject})"}
    gold, options = _with_cue(options, place, additions, recipe, draw)
    return {
        "task": f"world-{recipe.seed}",
        "prompt": prompt,
        "gold": gold,
        "options": options,
        "tags": {
            "language": name,
            "hops": str(len(chain)),
            "relation": "/".join(_relations(chain)),
            "wording": wording,
            "cue": recipe.cue,
        },
        "derivation": [fact.triple for fact in chain],
    }


def _with_cue(
    options: list[str], place: int, additions: dict[str, str], recipe: WorldRecipe, draw: random.Random
) -> tuple[str, list[str]]:
    """The right option, which is given first, and all of them with it in its place, unless the cue moves them."""
    marked = 0 if draw.random() < recipe.strength else draw.randrange(len(options))
    told = list(options)
    told[marked] += additions.get(recipe.cue, "")
    order = told[1:]
    order.insert(place, told[0])
    if recipe.cue == "letter":
        order.remove(told[marked])
        order.insert(0, told[marked])
    return told[0], order


def _distractors(
    chain: Chain, answers: dict[tuple[str, ...], list[Entity]], world: World, count: int, draw: random.Random
) -> list[Entity]:
    """Other answers to the same question of other subjects; where those are too few, others of the kind."""
    right = chain[-1].object
    rivals = answers[_relations(chain)]
    others = [entity for entity in world.entities if entity.kind == right.kind]
    drawn = [*draw.sample(rivals, len(rivals)), *draw.sample(others, len(others))]
    return [entity for entity in dict.fromkeys(drawn) if entity != right][:count]


def _answers(derivations: Sequence[Chain]) -> dict[tuple[str, ...], list[Entity]]:
    """What is right, by the relations that are asked for; as often as it is right."""
    found: dict[tuple[str, ...], list[Entity]] = defaultdict(list)
    for chain in derivations:
        found[_relations(chain)].append(chain[-1].object)
    return found


def _relations(chain: Chain) -> tuple[str, ...]:
    return tuple(fact.relation for fact in chain)
