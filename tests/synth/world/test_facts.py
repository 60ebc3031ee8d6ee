"""Facts never contradict each other, whatever the seed, and two worlds have no name in common."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.synth.world.facts import WORLDS, chains, contradictions, invent, reached
from espalier.synth.world.schema import schema

seeds = st.integers(0, 10**9)


def names(seed: int, count: int) -> set[str]:
    return {name for entity in invent(schema(), seed, count).entities for name in (entity.latin, entity.han)}


@settings(max_examples=10)
@given(seeds, st.integers(40, 300))
def test_facts_never_contradict_each_other(seed, count):
    facts = invent(schema(), seed, count).facts
    assert contradictions(schema(), facts) == []
    assert len(facts) == len(set(facts)) == count


def test_worlds_of_neighbouring_seeds_share_no_name():
    worlds = [names(seed, 60) for seed in range(WORLDS // 2)]
    assert len(set().union(*worlds)) == sum(map(len, worlds))


def test_the_largest_world_has_names_enough():
    facts = invent(schema(), 5, 4000).facts
    assert len(facts) == 4000 and contradictions(schema(), facts) == []


def test_the_same_seed_is_the_same_world():
    assert invent(schema(), 7, 100) == invent(schema(), 7, 100) != invent(schema(), 8, 100)


@pytest.fixture
def facts():
    return list(invent(schema(), 0, 100).facts)


def test_a_second_object_is_a_contradiction(facts):
    fact = facts[0]
    other = next(each.object for each in facts if each.object.kind == fact.object.kind and each.object != fact.object)
    assert "as well" in contradictions(schema(), [*facts, replace(fact, object=other)])[0]


def test_an_object_of_another_kind_is_a_contradiction(facts):
    assert contradictions(schema(), [replace(facts[0], object=facts[0].subject), *facts[1:]])


@pytest.mark.parametrize("script", ["latin", "han"])
def test_one_name_for_two_things_is_a_contradiction(facts, script):
    first = facts[0]
    namesake = replace(first.object, **{script: first.subject.name(script)})
    assert contradictions(schema(), [replace(first, object=namesake)])


@given(seeds)
@settings(max_examples=10)
def test_what_is_reached_is_where_the_chain_ends(seed):
    facts = invent(schema(), seed, 60).facts
    for hops in (1, 2):
        for chain in chains(facts, hops):
            assert all(first.object == second.subject for first, second in pairwise(chain))
            relations = [fact.relation for fact in chain]
            assert reached(facts, chain[0].subject, relations) == {chain[-1].object}
    assert len(chains(facts, 1)) == len(facts)
