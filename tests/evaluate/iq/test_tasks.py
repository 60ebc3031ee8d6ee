"""Every item can be answered from its prompt alone, and what is trained on says nothing about what is tested on."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.evaluate.intervals import binomial
from espalier.evaluate.iq.alphabets import LETTERS, SYMBOLS, half
from espalier.evaluate.iq.phrases import PHRASES
from espalier.evaluate.iq.tasks import GROUPS, TASKS, UNMEASURED

SPLITS = ("train", "test")
EVERY = [(name, language) for name, task in TASKS.items() for language in task.languages]
longer = st.integers(0, 12)


def first(task: str, n: int, *languages: str, **told):
    return list(TASKS[task].items(n, languages or ("en",), **told))


@pytest.mark.parametrize(("task", "language"), EVERY)
@settings(max_examples=25)
@given(data=st.data())
def test_an_oracle_that_knows_the_rule_is_always_right(solve, task, language, data):
    told = {
        "split": data.draw(st.sampled_from(SPLITS)),
        "instruction": data.draw(st.sampled_from(["induction", "guided"])),
        "seed": data.draw(st.integers(0, 10**6)),
        "shots": data.draw(st.none() | st.integers(1, 8)),
    }
    if TASKS[task].lengths != UNMEASURED:
        least = TASKS[task].shortest + data.draw(longer)
        told["lengths"] = (least, least + data.draw(longer))
    for item in first(task, 2, language, **told):
        assert solve(task, item.prompt, language) == item.gold.strip()


@pytest.mark.parametrize("task", TASKS)
def test_a_random_answerer_stays_inside_its_interval_around_chance(task):
    # A fair answerer leaves a 95% interval at one seed in twenty; at this one it is inside for every task.
    draw = random.Random(3)
    items = first(task, 300)
    guesses = [draw.choice(item.options) if item.options else str(draw.random()) for item in items]
    right = sum(guess == item.gold for guess, item in zip(guesses, items, strict=True))
    assert sum(item.chance for item in items) / len(items) in binomial(right, len(items))


@pytest.mark.parametrize("task", TASKS)
def test_no_option_and_no_place_is_favoured(task):
    items = [item for item in first(task, 600) if item.options]
    places = [item.options.index(item.gold) / (len(item.options) - 1) for item in items]
    assert not items or sum(places) / len(places) == pytest.approx(0.5, abs=0.08)
    for label in {item.tags["label"] for item in items if "label" in item.tags}:
        share = sum(item.tags["label"] == label for item in items) / len(items)
        assert share == pytest.approx(0.5, abs=0.08)


def drawn(split: str) -> set[str]:
    """All names and words of a split, in all languages."""
    found: set[str] = set()
    for said in PHRASES.values():
        for each in ("names", "places", "things", "words", "filler", "praise", "blame"):
            found |= set(half(getattr(said, each), split))
        found |= set(itertools.chain(*half(said.topics, split)))
    return found


def test_the_halves_have_nothing_in_common():
    assert not drawn("train") & drawn("test")
    letters = {split: set(itertools.chain(*(half(each, split) for each in LETTERS.values()))) for split in SPLITS}
    assert not letters["train"] & letters["test"]
    for each in (*LETTERS.values(), SYMBOLS):
        assert len(set(each)) == len(each)


@pytest.mark.parametrize(("task", "language"), EVERY)
def test_no_train_item_holds_a_word_a_name_or_a_letter_for_testing(task, language):
    text = "\n".join(item.prompt + item.gold for item in first(task, 40, language, split="train"))
    # What is always said is neither: labels, rules, sentences with their gaps.
    said = [part for sentence in fixed(language) for part in re.split(r"\{\w+\}", sentence) if part.strip()]
    for always in sorted([*said, "Input:", "Output:"], key=len, reverse=True):
        text = text.replace(always, "\0")
    words = {word for word in drawn("test") if len(word) > 1}
    assert not [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    if task in ("head_and_tail", "full_repeating", "head_slicing", "replace_lowercase"):
        assert not set(text.lower()) & set(half(LETTERS[language], "test"))


def fixed(language: str) -> list[str]:
    """The sentences of a language."""
    said = dataclasses.asdict(PHRASES[language]).values() if language in PHRASES else ()
    return [value for value in said if isinstance(value, str)]


@pytest.mark.parametrize("task", TASKS)
def test_an_item_depends_on_its_own_number_only(task):
    languages = TASKS[task].languages
    many = first(task, 12, *languages)
    assert first(task, 5, *languages) == many[:5]
    assert first(task, 12, *languages) == many
    alone = first(task, 2, languages[0])
    assert many[0] == alone[0] and (many[len(languages)] == alone[1] if len(languages) < 12 else True)
    assert [item.tags["language"] for item in many] == list(itertools.islice(itertools.cycle(languages), 12))


@pytest.mark.parametrize("task", TASKS)
def test_another_seed_or_split_is_another_item_and_no_item_comes_twice(task):
    items = first(task, 100)
    assert len({item.id for item in items}) == 100
    for other in (first(task, 100, seed=1), first(task, 100, split="train")):
        assert not {item.id for item in items} & {item.id for item in other}


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.shots])
def test_as_many_examples_as_asked_for(task):
    [item] = first(task, 1, shots=2)
    classes = len(item.options) or 1
    mark = "\nAnswer:" if item.options else "\nOutput:"
    assert item.prompt.count(mark) == 2 * classes + 1
    assert item.prompt.endswith(mark)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.lengths != UNMEASURED])
def test_longer_is_longer(task):
    short, long = ([len(item.prompt + item.gold) for item in first(task, 20, lengths=(n, n))] for n in (6, 40))
    assert max(short) < min(long)


@pytest.mark.parametrize("task", ["single_supporting_fact", "two_supporting_facts"])
def test_the_last_place_of_a_story_is_seldom_the_answer(task):
    items = first(task, 200)
    last = [max(item.options, key=item.prompt.rindex) == item.gold for item in items]
    assert sum(last) / len(last) < 0.5


def test_an_answer_has_room_whatever_the_tokenizer():
    for task, language in EVERY:
        for item in first(task, 5, language):
            assert item.max_new_tokens > len(item.gold.encode())


def test_the_sizes_are_the_papers():
    assert sum(task.n for task in TASKS.values() if task.group == "pattern mining") == 300
    assert {task.group for task in TASKS.values()} == set(GROUPS)
    assert TASKS["counting"].n == 148


@pytest.mark.parametrize("language", PHRASES)
def test_no_word_is_a_part_of_another(language):
    said = PHRASES[language]
    for values in (said.words, said.places, said.names):
        assert not [(a, b) for a, b in itertools.permutations(values, 2) if a in b]
    assert len(said.praise) == len(said.blame)
