"""Recipes: read back as printed, and every mistake is told with its line, its key and what would do."""

import ast
import importlib
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

import espalier
from espalier import method, recipe
from espalier.budget.plan import BudgetRecipe
from espalier.data.prepare import DataRecipe
from espalier.errors import RecipeError
from espalier.pipeline import PretrainRecipe
from espalier.recipe import Recipe


class Leaf(Recipe):
    rate: float = 1.0
    size: int | None = None
    mode: Literal["auto", "on", "off"] = "auto"


class Branch(Recipe):
    leaf: Leaf = Leaf()
    leaves: tuple[Leaf, ...] = ()
    choice: Leaf | str | int = "none"
    texts: tuple[str, ...] = ()


class Files(Recipe):
    POSITIONAL = "paths"

    paths: tuple[str, ...] = ()
    rate: float = 1.0


class Tree(Recipe):
    name: str = "tree"
    branch: Branch = Branch()
    branches: list[Branch] = Field(default_factory=list)


def read(text: str = "", *overrides: str, kind=Tree):
    return recipe.parse(kind, text, list(overrides), where="tree.yaml")


def refusal(text: str = "", *overrides: str, kind=Tree) -> RecipeError:
    with pytest.raises(RecipeError) as refused:
        read(text, *overrides, kind=kind)
    return refused.value


def recipe_classes() -> list[type[Recipe]]:
    """Every recipe class of the package, found by its source."""
    root, found = Path(espalier.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
        module = ".".join(("espalier", *path.relative_to(root).with_suffix("").parts))
        for name in names if "Recipe" in path.read_text() else ():
            value = getattr(importlib.import_module(module), name)
            if issubclass(value, Recipe) and value is not Recipe:
                found.append(value)
    return found


CLASSES = recipe_classes()
STAGES = {"stages": [{"duration": "25%", "hidden_size": 64}, {"duration": "3M tokens", "num_hidden_layers": 8}]}
# Values for the keys that have no default; words that YAML could take for something else.
VALUES = {
    "name": "1e5",
    "stages": [{"duration": "25%", "hidden_size": 64}, {"duration": "3M tokens", "num_hidden_layers": 8}],
    "duration": "2e12 flops",
    "path": "hub:a/b",
    "kgco2e_per_kwh": 1e-7,
    "model": "null",
    "within": 3e11,
    "between": 2.5e10,
    "out": "a: b #\n",
    "layers": 3,
    "before": "a",
    "profile": "on",
    "parameters": 1e9,
    "tokens": 1e12,
    "after": "b",
    "run": {"stages": [{"duration": "25%"}, {"duration": "75%", "num_hidden_layers": 8}]},
    "flops": 1e12,
    "rates": {"large": [0.01], "small": [0.02], "grown": [0.01, 1e-5]},
    "large": [1e-5],
    "small": [0.02],
    "grown": [0.01, 0.02],
    "loss": 3.2,
    "low": 1e-7,
    "high": 2.0,
    "fitted_up_to": 1e6,
    "error": 1e-5,
    "baseline": 0.1,
    "form": "size",
    "values": {"E": 2.0, "A": 1e-5, "alpha": 0.3},
    "about": {"data": "null"},
    "law": "1e5",
    "sizes": [{"hidden_size": 32}, {"hidden_size": 64}, {"hidden_size": 128}],
    "budget": {"usd": 1e-5},
    "reference": "off",
    "benchmark": "1:30",
    "queries_per_day": 1e-5,
    "serving": {"queries_per_day": 1e6},
    "reference_tokens": 1e9,
    "width": 32,
    "tasks": ["1e5", "items:a: b"],
    "runs": ["1e5", "off"],
    "items": "null",
    "clusters": [{"name": "1e5", "hardware": "off", "nodes": 2, "devices": 1, "network": "roce", "between": 1e9}],
    "across": {"bandwidth": 1e8, "latency": 1e-5},
    "hardware": "off",
    "nodes": 2,
    "devices": 1,
    "network": "roce",
    "bandwidth": 1e8,
    "batch": 8,
}
BEYOND = {kind: {"factor": 2} for kind in ("DepthRecipe", "StackRecipe", "IdentityRecipe")} | {
    "Law": {"parameters": {"low": 1e5, "high": 1e7}, "tokens": {"low": 1e6, "high": 1e6}},
    "FitRecipe": {"points": "runs.csv"},
    "FinetuneRecipe": {"data": "rows.jsonl"},
    "LadderRecipe": {"run": {"stages": [{"duration": "100%"}]}, "tokens": ["20x", "3M tokens"]},
    "DensityRecipe": {"score": 0.5},
    "QueriesRecipe": {"tokens": "1e5"},
    "LifecycleRecipe": {"budget": 1e5},
    "StageByStageRecipe": {"run": "on"},
    "PlacementRecipe": {"clusters": "1e5"},
}


def least(kind: type[Recipe]) -> dict:
    """The least that a class wants to be told."""
    required = [name for name, field in kind.model_fields.items() if field.is_required()]
    return {name: VALUES[name] for name in required} | BEYOND.get(kind.__name__, {})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_recipe_of_the_package_reads_back_as_printed(kind):
    made = kind.model_validate(least(kind))
    assert read(recipe.dump(made), kind=kind) == made
    assert set(recipe._parse_yaml(recipe.dump(made), "")[0]) == set(kind.model_fields), "printed in full"


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_schema_is_json_that_names_every_key(kind):
    schema = json.loads(recipe.schema(kind))
    assert set(schema["properties"]) == set(kind.model_fields)


def test_the_recipes_of_all_verbs_are_among_those_tried():
    assert {card.recipe() for card in method.cards()} | {PretrainRecipe, DataRecipe, BudgetRecipe} <= set(CLASSES)


words = (
    st.text()
    | st.text("\x85\u2028\u2029\r\n\t a", min_size=1)
    | st.from_regex(r"[-+.~<=0-9eEtnyofrulasxT:_ #'\"]{1,8}", fullmatch=True)
)
numbers = st.floats(allow_nan=False)
leaves = st.builds(Leaf, rate=numbers, size=st.none() | st.integers(), mode=st.sampled_from(["auto", "on", "off"]))
branches = st.builds(
    Branch,
    leaf=leaves,
    leaves=st.lists(leaves, max_size=2).map(tuple),
    choice=leaves | words | st.integers(),
    texts=st.lists(words, max_size=3).map(tuple),
)


@given(st.builds(Tree, name=words, branch=branches, branches=st.lists(branches, max_size=2)))
def test_any_values_read_back_as_printed(tree):
    assert read(recipe.dump(tree)) == tree


@given(numbers, st.integers(1, 9), st.integers(-300, 300))
def test_numbers_are_numbers_however_they_are_written(number, digit, exponent):
    for text in {repr(number), f"{digit}e{exponent}", f"{digit}E{exponent:+}", f"{digit}.5e{exponent}", f"{digit}_000"}:
        assert read(f"branch: {{leaf: {{rate: {text}}}}}").branch.leaf.rate == float(text)
        assert read("", f"branch.leaf.rate={text}").branch.leaf.rate == float(text)


@pytest.mark.parametrize("word", ["on", "off", "yes", "No", "y", "2026-07-01", "1:30", "0x10", "1e", "=", "1.2.3"])
def test_a_word_is_a_word(word):
    assert read(f"name: {word}").name == word
    assert read("", f"name={word}").name == word


def test_yes_and_no_are_written_true_and_false_and_nothing_is_null():
    values, _ = recipe._parse_yaml("a: true\nb: false\nc: null\nd: ~\ne:\nf: 010", "")
    assert values == {"a": True, "b": False, "c": None, "d": None, "e": None, "f": 10}


@pytest.mark.parametrize("text", ["", "# only a remark\n", "{}", "---\n"])
def test_nothing_said_means_the_defaults(text):
    assert read(text) == Tree()


DEEP = """\
name: x

branches:
  - leaf: {rate: 3e-4}
  - leaves:
      - size: 3
      - rate: 1
        PLACE
"""


@pytest.mark.parametrize(
    ("wrong", "key", "near"),
    [("raet: 2", "raet", "rate"), ("Size: 2", "Size", "size"), ("mod: 2", "mod", "mode"), ("int: 1", "int", None)],
)
def test_an_unknown_key_is_told_with_its_line_and_the_nearest_also_deep_in_lists(wrong, key, near):
    error = refusal(DEEP.replace("PLACE", wrong))
    assert error.where == f"tree.yaml:8: branches.1.leaves.1.{key}"
    assert repr(key) in error.found
    assert error.expected == "one of mode, rate, size"
    assert error.mend == (f"Did you mean {near!r}?" if near else "Remove it.")


@given(st.text("abcdefghijklmnopqrstuvwxyzABCXYZ[]", min_size=1).filter(lambda key: key not in Tree.model_fields))
def test_any_unknown_key_is_refused_by_its_name_at_its_line(key):
    error = refusal(f"branch: {{}}\n{json.dumps(key)}: 1")
    assert error.where == f"tree.yaml:2: {key}"
    assert repr(key) in error.found


@pytest.mark.parametrize(
    ("wrong", "key", "found", "expected"),
    [
        ("size: 1.5", "size", "1.5", "integer"),
        ("size: many", "size", "'many'", "integer"),
        ("mode: maybe", "mode", "'maybe'", "'auto', 'on' or 'off'"),
        ("mode: [on]", "mode", "['on']", "'auto', 'on' or 'off'"),
    ],
)
def test_a_wrong_value_is_told_with_its_line_what_was_found_and_what_was_expected(wrong, key, found, expected):
    error = refusal(DEEP.replace("PLACE", wrong))
    assert error.where == f"tree.yaml:8: branches.1.leaves.1.{key}"
    assert error.found == found
    assert expected in error.expected


def test_branches_of_a_union_are_not_named():
    error = refusal("branch:\n  choice:\n    raet: 1")
    assert error.where == "tree.yaml:3: branch.choice.raet"
    assert error.mend == "Did you mean 'rate'?"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: x\nbranch: [1", 2),
        ("name: x\nbranch: {leaf: }}", 2),
        ("name: x\n\tbranch: 1", 2),
        ("a: 1\nb: 2\n c: 3", 3),
        ("name: x\nbranch: {{ leaf }}", 2),
        ('name: x\n\nbranch: "open', 3),
        ("name: x\nbranch: \x07", 2),
        ("name: x\n---\nname: y", 2),
        ("name: x\nbranch: *nowhere", 2),
        ("name: !!python/name:os.system x", 1),
    ],
)
def test_broken_yaml_is_told_with_its_line(text, line):
    error = refusal(text)
    assert error.where == f"tree.yaml:{line}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10}]" for n in range(1, 9))]), "stand for"),
        ("name: &a [*a]", "an alias inside what it stands for"),
        ("name: " + "[" * 5000, "recursion"),
        ("name: " + "1" * 5000, "digits"),
    ],
)
def test_what_only_a_program_writes_is_refused_at_once(text, found):
    assert found in refusal(text).found


def test_an_alias_is_what_it_stands_for():
    assert recipe._parse_yaml("a: &x [1, 2]\nb: *x\nc: [*x, *x]", "test")[0]["c"] == [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("text", "line"),
    [("name: a\nname: b", 2), ("branch:\n  leaf: {}\n  texts: []\n  leaf: {}", 4), ('name: a\n"name": b', 2)],
)
def test_a_key_stated_twice_is_refused_at_the_second_line(text, line):
    error = refusal(text)
    assert error.where == f"tree.yaml:{line}" and "twice" in error.found


@pytest.mark.parametrize("text", ["- 1", "word", "3", "[]", "false"])
def test_a_file_that_is_no_mapping_is_refused(text):
    assert refusal(text).expected == "keys and values"


def test_a_key_that_is_missing_is_asked_for():
    error = refusal("stages: [{hidden_size: 3}]", kind=PretrainRecipe)
    assert (error.found, error.mend[:4]) == ("nothing", "Set ")
    error = refusal("name: x\nstages:\n  - {duration: 1%}\n  - hidden_size: 3", kind=PretrainRecipe)
    assert error.where == "tree.yaml:4: stages.1.duration"


def test_a_mistake_in_a_single_source_is_told_where_it_was_written():
    error = refusal("held_out: 0.1\nsources:\n  path: x\n  colum: text", kind=DataRecipe)
    assert error.where == "tree.yaml:4: sources.colum"
    assert error.mend == "Did you mean 'column'?"


def test_values_that_do_not_fit_together_are_told_at_their_section():
    error = refusal("branches: []\nname: {}\n")
    assert error.where == "tree.yaml:2: name"
    error = refusal("model: a\nout: b\nfactor: 2\nlayers: 4", kind=method.find("grow.stack").recipe())
    assert error.found == "state either factor or layers"


@given(st.integers(0, 1), st.integers(0, 1), numbers)
def test_an_override_reaches_any_depth_and_changes_nothing_else(outer, inner, rate):
    text = "branches:\n" + "  - {leaves: [{size: 1}, {size: 2}]}\n" * 2
    changed = read(text, f"branches.{outer}.leaves.{inner}.rate={rate!r}").model_dump()
    assert changed["branches"][outer]["leaves"][inner].pop("rate") == rate
    plain = read(text).model_dump()
    del plain["branches"][outer]["leaves"][inner]["rate"]
    assert changed == plain


def test_overrides_are_taken_in_order_and_take_any_yaml():
    assert read("name: x", "name=y", "name=z").name == "z"
    assert read("", "branch.texts=[a, 'b=c']").branch.texts == ("a", "b=c")
    assert read("", "branch.choice={rate: 2}", "branch.choice.size=3").branch.choice == Leaf(rate=2, size=3)
    assert read("", "name=a=b").name == "a=b"
    assert read("", "name=def [").name == "def ["
    assert read("branch:", "branch.leaf.size=1").branch.leaf.size == 1


@given(st.lists(words.filter(lambda word: "=" not in word), min_size=1), st.integers(0, 9))
def test_arguments_without_a_key_are_the_list_of_the_positional_one(texts, place):
    arguments = [*texts[:place], "rate=2", *texts[place:]]
    assert read("paths: [other]", *arguments, kind=Files) == Files(paths=tuple(texts), rate=2)


def test_a_mistake_beside_a_positional_argument_is_told_as_ever():
    error = refusal("", "a.txt", "raet=1", kind=Files)
    assert error.where == "argument 'raet=1': raet"
    assert "no `=`" in refusal("", "a.txt").found, "a recipe without a positional key takes none"


@pytest.mark.parametrize(
    "override",
    [
        "branches.1.texts.0.x=1",
        "name",
        "=x",
        "branches.2.choice=1",
        "branches.x.choice=1",
        "branches.-1=1",
        "name.first=x",
        "branches.0.texts.0=a",
    ],
)
def test_an_override_that_leads_nowhere_is_refused_by_itself(override):
    error = refusal("name: x\nbranches: [{}, {texts: [a]}]", override)
    assert repr(override) in error.where


@pytest.mark.parametrize("override", ["branch.leaf.raet=1", "branch.leaf.rate=much", "branch.leaf={rate: much}"])
def test_a_mistake_in_an_override_is_told_as_the_overrides_and_not_as_a_line(override):
    error = refusal("branch:\n  leaf:\n    rate: 1", "name=fine", override)
    assert error.where.startswith(f"argument {override!r}: branch.leaf.ra")


def test_a_file_is_read_and_a_wrong_name_is_answered_with_the_nearest(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("name: é\n", encoding="utf-8")
    assert recipe.load(Tree, path, ["branch.leaf.size=1"]).name == "é"
    assert recipe.stored(path) == {"name": "é"}
    with pytest.raises(RecipeError, match=r"Did you mean .*demo\.yaml"):
        recipe.load(Tree, tmp_path / "dmo.yaml")
    path.write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="UTF-8"):
        recipe.load(Tree, path)
    path.write_text('{"name": "json", "branch": {"leaf": {"rate": 1e-5}}}')
    assert recipe.load(Tree, path).branch.leaf.rate == 1e-5


@given(branches, branches)
def test_changes_are_the_leaves_that_differ(old, new):
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    found = recipe.changes(before, after)
    assert bool(found) == (before != after)
    assert recipe.changes(before, before) == []
    for key, was, now in found:
        assert was != now
        assert type(was) is not type(now) or not isinstance(was, list | dict), "not a leaf"
        assert (_at(before, key), _at(after, key)) == (was, now)


def _at(values, key):
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) and int(part) < len(values) else _get(values, part)
    return values


def _get(values, part):
    return values.get(part) if isinstance(values, dict) else None


def test_a_recipe_takes_no_change_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Tree().name = "other"
