"""A world's files: the same each time, the book says what is asked for, and only what is true is right."""

from __future__ import annotations

import pytest

from espalier.data.sources import Quarantine, Source, read
from espalier.errors import RecipeError
from espalier.synth.world.recipe import WorldRecipe
from espalier.synth.world.schema import LANGUAGES, schema
from espalier.synth.world.write import BOOK, ENTITIES, FACTS, ITEMS, PARAPHRASES

FILES = (BOOK, ITEMS, PARAPHRASES, FACTS, ENTITIES)
ALL = {"languages": LANGUAGES, "facts": 120, "wordings": 6}


@pytest.fixture
def truth(rows):
    """`truth(folder)` gives the objects by (subject, relation), and each name's other names and kind."""

    def truth(folder):
        entities = {row["latin"]: row for row in rows(folder / ENTITIES)}
        return {(row["subject"], row["relation"]): row["object"] for row in rows(folder / FACTS)}, entities

    return truth


def spoken(entity: dict, language: str) -> str:
    return entity[schema().languages[language].script]


def test_the_same_recipe_writes_the_same_bytes_and_another_seed_other_ones(world):
    one, same, other = world(**ALL), world(**ALL), world(**ALL, seed=1)
    for name in FILES:
        assert (one / name).read_bytes() == (same / name).read_bytes() != (other / name).read_bytes()


def test_every_key_follows_from_the_facts_by_its_derivation_and_no_other_option_does(world, rows, truth):
    folder = world(**ALL)
    objects, entities = truth(folder)
    items = rows(folder / ITEMS)
    for item in items:
        language = item["tags"]["language"]
        told = {spoken(entity, language): name for name, entity in entities.items()}
        at = item["derivation"][0][0]
        assert spoken(entities[at], language) in item["prompt"]
        for subject, relation, end in item["derivation"]:
            assert subject == at and objects[subject, relation] == end
            at = end
        offered = [told[option.strip()] for option in item["options"]]
        assert told[item["gold"].strip()] == at and len(set(offered)) == 4
        assert {entities[name]["kind"] for name in offered} == {entities[at]["kind"]}
    assert {item["tags"]["hops"] for item in items} == {"1", "2"}
    assert {item["tags"]["language"] for item in items} == set(LANGUAGES)
    assert sum(item["tags"]["hops"] == "2" for item in items) == len(items) / 4


def test_the_book_says_each_fact_of_an_item_in_every_language_and_wording(world, rows, truth):
    folder = world(**ALL)
    _, entities = truth(folder)
    said = {name: [row["text"] for row in rows(folder / BOOK) if row["language"] == name] for name in LANGUAGES}
    for subject, relation, end in {tuple(fact) for item in rows(folder / ITEMS) for fact in item["derivation"]}:
        for name in LANGUAGES:
            s, o = spoken(entities[subject], name), spoken(entities[end], name)
            wordings = schema().languages[name].wordings(relation)
            found = {
                number for number, each in enumerate(wordings) if any(each.format(s=s, o=o) in t for t in said[name])
            }
            assert len(found) >= ALL["wordings"]


def test_no_wording_of_the_examination_is_in_the_book(world, rows):
    folder = world(**ALL | {"wordings": 18})
    book = "\n".join(row["text"] for row in rows(folder / BOOK))
    items, kept = rows(folder / ITEMS), rows(folder / PARAPHRASES)
    assert not [item["prompt"] for item in items if item["prompt"] in book]
    assert not [row["text"] for row in kept if row["text"] in book]
    assert {item["prompt"] + item["gold"] for item in items} <= {row["text"] for row in kept}


def test_training_reads_the_book(world, rows):
    folder = world(**ALL)
    quarantine = Quarantine()
    texts = [document.text for document in read(Source(path=str(folder / BOOK)), quarantine)]
    assert texts == [row["text"] for row in rows(folder / BOOK)] and not quarantine.counts


def test_more_items_than_the_facts_make_are_refused(world):
    with pytest.raises(RecipeError) as refused:
        world(facts=40, languages=("en",), items=500)
    assert (refused.value.found, refused.value.expected) == ("375 items of 1 hop", "at most 120, from 40 facts")


@pytest.mark.parametrize("wrong", [{"languages": ("en", "en")}, {"languages": ("tlh",)}, {"facts": 3}, {"seed": -1}])
def test_a_world_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"languages|facts|seed"):
        WorldRecipe(**wrong)


def test_the_command_writes_a_world(espalier, tmp_path):
    done = espalier("synth", "world", "facts=60", "languages=[fr]", "items=40", "--name=small")
    assert done.code == 0, done.err
    assert all((tmp_path / "runs" / "small" / name).is_file() for name in FILES) and "60 facts" in done.out
