"""Methods: a card read from the source says what the loaded function says, and a wrong name is answered."""

import difflib
import inspect
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import method
from espalier.errors import RecipeError
from espalier.recipe import Recipe

CARDS = list(method.cards())


@pytest.fixture(params=CARDS, ids=lambda card: card.full_name)
def card(request):
    return request.param


def test_a_card_says_what_the_loaded_function_says(card):
    function = card.load()
    assert function.method == {key: getattr(card, key) for key in ("paper", "needs", "costs", "status")}
    assert card.summary == inspect.getdoc(function).split("\n")[0]
    assert card.summary.endswith(".")
    assert function.__module__ == card.module and function.__name__ == card.function
    assert card.status in ("preview", "proven")


def test_a_method_is_a_function_of_a_recipe_and_a_run(card):
    parameters = list(inspect.signature(card.load()).parameters)
    assert parameters == ["recipe", "run"]
    assert issubclass(card.recipe(), Recipe) and card.recipe() is not Recipe
    assert card.recipe().__doc__


def test_a_card_is_found_by_its_name(card):
    assert method.find(card.full_name) == card
    assert card.full_name == f"{card.verb}.{card.name}"


def test_names_are_told_apart_and_every_verb_with_methods_is_listed():
    names = [card.full_name for card in CARDS]
    assert len(set(names)) == len(names) > 0
    listed = {verb for verb in method.VERBS if sys.modules[f"espalier.{verb}"].METHODS}
    assert listed == {card.verb for card in CARDS}


@given(st.sampled_from(CARDS), st.integers(0, 30), st.sampled_from("abcxyz"))
@settings(deadline=None, max_examples=25)
def test_a_name_with_a_slip_is_answered_with_the_nearest(card, place, letter):
    name = card.full_name
    place %= len(name)
    slip = name[:place] + letter + name[place + 1 :]
    if slip == name:
        return
    with pytest.raises(RecipeError) as refused:
        method.find(slip)
    assert repr(slip) in refused.value.found
    nearest = difflib.get_close_matches(slip, [card.full_name for card in CARDS], n=1, cutoff=0)
    assert refused.value.mend == f"Did you mean {nearest[0]!r}?"


def test_a_name_like_no_other_is_answered_with_the_list():
    with pytest.raises(RecipeError, match="espalier methods"):
        method.find("§")


@pytest.fixture
def verb(tmp_path, monkeypatch):
    """Make a verb `toy` of the package whose methods are these, with the source of one module, `toy.one`."""

    def make(methods: dict[str, str], source: str) -> None:
        folder = tmp_path / "espalier" / "toy"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(f"METHODS = {methods!r}\n")
        (folder / "one.py").write_text(source)
        monkeypatch.setattr("espalier.__path__", [str(tmp_path / "espalier"), *sys.modules["espalier"].__path__])
        monkeypatch.setattr(method, "VERBS", ("toy",))
        for name in ("espalier.toy", "espalier.toy.one"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    yield make
    for name in ("espalier.toy", "espalier.toy.one"):
        sys.modules.pop(name, None)


def test_listing_a_method_does_not_import_it(verb):
    source = (
        'raise ImportError\n@method(paper="p", status="proven")\ndef do(recipe, run):\n    """Do it.\n\n    More."""\n'
    )
    verb({"do-it": "one:do"}, source)
    assert list(method.cards()) == [
        method.Card("toy", "do-it", "espalier.toy.one", "do", "Do it.", paper="p", status="proven")
    ]
    with pytest.raises(ImportError):
        method.find("toy.do-it").load()


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ("two:do", "@method()\ndef do(recipe, run): ..."),
        ("one:other", "@method()\ndef do(recipe, run): ..."),
        ("one:do", "def do(recipe, run): ..."),
    ],
)
def test_a_registration_that_leads_to_no_method_is_our_bug(verb, line, source):
    verb({"x": line}, source)
    with pytest.raises(AssertionError):
        list(method.cards())
