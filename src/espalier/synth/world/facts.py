"""The facts of a world: invented names, each of one kind, and relations that give each subject one object."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Literal

from espalier.synth.world.schema import Schema

# A root belongs to one world of so many: worlds whose seeds differ modulo this share no name.
WORLDS = 64
# At least so many entities of each kind, so that a question always has wrong answers.
FEWEST = 8


@dataclass(frozen=True)
class Entity:
    """One thing: its kind, and its name in both scripts."""

    kind: str
    latin: str
    han: str

    def name(self, script: Literal["latin", "han"]) -> str:
        return self.latin if script == "latin" else self.han


@dataclass(frozen=True)
class Fact:
    """A subject, a relation, and the one object that the subject has by it."""

    subject: Entity
    relation: str
    object: Entity

    @property
    def triple(self) -> tuple[str, str, str]:
        return (self.subject.latin, self.relation, self.object.latin)


Chain = tuple[Fact, ...]


@dataclass(frozen=True)
class World:
    """What there is, and what is true of it; not every thing need be in a fact."""

    entities: tuple[Entity, ...]
    facts: tuple[Fact, ...]


def invent(schema: Schema, seed: int, count: int) -> World:
    """A world of so many facts, drawn from all that its entities have by the schema's relations."""
    draw = random.Random(f"{seed}/facts")
    roots = _roots(schema, seed)
    entities = {
        name: _entities(schema, name, islice(roots, max(FEWEST, math.ceil(kind.share * count))), draw)
        for name, kind in schema.kinds.items()
    }
    everything = [
        Fact(subject, name, draw.choice(entities[relation.object]))
        for name, relation in schema.relations.items()
        for subject in entities[relation.subject]
    ]
    draw.shuffle(everything)
    return World(tuple(entity for each in entities.values() for entity in each), tuple(everything[:count]))


def chains(facts: Sequence[Fact], hops: int) -> list[Chain]:
    """Facts in a row, each about the object of the one before."""
    about: dict[Entity, list[Fact]] = defaultdict(list)
    for fact in facts:
        about[fact.subject].append(fact)
    found: list[Chain] = [(fact,) for fact in facts]
    for _ in range(hops - 1):
        found = [(*chain, fact) for chain in found for fact in about[chain[-1].object]]
    return found


def reached(facts: Sequence[Fact], subject: Entity, relations: Sequence[str]) -> set[Entity]:
    """All that follows: the ends of a chain of relations that starts at a subject."""
    ends = {subject}
    for relation in relations:
        ends = {fact.object for fact in facts if fact.relation == relation and fact.subject in ends}
    return ends


def contradictions(schema: Schema, facts: Sequence[Fact]) -> list[str]:
    """What is wrong with a world: two objects where there is one, a wrong kind, a name of two things."""
    found: list[str] = []
    objects: dict[tuple[Entity, str], Entity] = {}
    named: dict[str, Entity] = {}
    for fact in facts:
        relation = schema.relations[fact.relation]
        if (fact.subject.kind, fact.object.kind) != (relation.subject, relation.object):
            found.append(f"{fact.triple}: {fact.subject.kind} and {fact.object.kind}")
        if objects.setdefault((fact.subject, fact.relation), fact.object) != fact.object:
            found.append(f"{fact.triple}: it is {objects[fact.subject, fact.relation].latin} as well")
        for entity in (fact.subject, fact.object):
            for name in (entity.latin, entity.han):
                if named.setdefault(name, entity) != entity:
                    found.append(f"{name}: a {entity.kind} and a {named[name].kind}")
    return found


def _roots(schema: Schema, seed: int) -> Iterator[tuple[str, ...]]:
    """Three different syllables at a time, no root twice."""
    draw, syllables, seen = random.Random(f"{seed}/names"), list(schema.syllables), set()
    while True:
        root = tuple(draw.sample(syllables, 3))
        if sha256("".join(root).encode()).digest()[0] % WORLDS == seed % WORLDS and root not in seen:
            seen.add(root)
            yield root


def _entities(schema: Schema, kind: str, roots: Iterable[tuple[str, ...]], draw: random.Random) -> list[Entity]:
    """Of one kind: in a world its names end alike."""
    latin, han = draw.choice(list(schema.kinds[kind].endings.items()))
    return [
        Entity(kind, ("".join(root) + latin).capitalize(), "".join(schema.syllables[each] for each in root) + han)
        for root in roots
    ]
