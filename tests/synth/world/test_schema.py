"""Every language says everything, and nothing that the examination says is said by the book."""

from __future__ import annotations

import string
from typing import get_args

import pytest

from espalier.synth.world.recipe import WorldRecipe
from espalier.synth.world.schema import schema

NAMES = sorted(schema().languages)


def fields(text: str) -> list[str]:
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


def test_recipes_name_the_languages_that_are_there():
    offered = get_args(get_args(WorldRecipe.model_fields["languages"].annotation)[0])
    assert sorted(offered) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_language_has_words_for_every_relation(name):
    language = schema().languages[name]
    assert set(language.phrases) == set(language.says) == set(schema().relations)
    assert all(fields(phrase) == ["s"] for phrase in language.phrases.values())
    assert all(fields(said) == ["o", "s"] for each in language.says.values() for said in each)
    assert all(held.endswith("{o}") and fields(held) == ["o", "p"] for held in language.held.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_fact_has_as_many_wordings_as_a_recipe_may_ask_for(name):
    most = next(bound.le for bound in WorldRecipe.model_fields["wordings"].metadata if hasattr(bound, "le"))
    for relation in schema().relations:
        wordings = schema().languages[name].wordings(relation)
        assert len(set(wordings)) == len(wordings) == most
        assert all(fields(wording) == ["o", "s"] for wording in wordings)


def test_a_syllable_is_one_character_and_a_character_one_syllable():
    syllables = schema().syllables
    assert len(set(syllables.values())) == len(syllables)
    assert all(isinstance(latin, str) and len(latin) == 2 and len(han) == 1 for latin, han in syllables.items())


def test_relations_join_kinds_that_are_there_and_some_facts_lead_on_to_others():
    relations = schema().relations.values()
    kinds = {relation.subject for relation in relations} | {relation.object for relation in relations}
    assert kinds == set(schema().kinds)
    assert {relation.object for relation in relations} & {relation.subject for relation in relations}


def test_a_phrase_within_a_phrase_reads_as_its_language_has_it():
    chain = ("found_by", "born_in")
    phrases = {name: schema().languages[name].phrase(chain, "X") for name in NAMES}
    assert phrases == {
        "de": "die Stadt, in der die Person, die X entdeckt hat, geboren wurde",
        "en": "the town where the person who discovered X was born",
        "fr": "la ville natale de la personne qui a découvert X",
        "zh": "发现X的人出生的城镇",
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_begins_a_sentence_keeps_its_letters(name):
    for relation in schema().relations:
        for wording in schema().languages[name].wordings(relation):
            assert "xY" in wording.format(s="xY", o="zW") and "zW" in wording.format(s="xY", o="zW")
