"""Recipe: everything a step was told, as a frozen pydantic model whose printed form is YAML.

A recipe is read, overridden (`train.learning_rate=3e-3`), printed in full, and stored where it was used.
An unknown key, a wrong type or an impossible value ends in a `RecipeError` that names the file's line.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from espalier.errors import RecipeError

MAX_VALUES = 100_000  # more than anybody writes, and read in a moment


class Recipe(BaseModel):
    """Base of every recipe: frozen, and no key that isn't known.

    POSITIONAL  the key, a list, that takes the arguments without a `=`; "" where there is none
    """

    POSITIONAL: ClassVar[str] = ""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


R = TypeVar("R", bound=Recipe)
T = TypeVar("T")

# What becomes of an unfinished run that is told a new value: nothing about the model changes; what is left of the plan
# is fitted to it, and the run says so; the rest is computed otherwise, which the user has to accept; another run.
Resume = Literal["safe", "planned", "flag", "refused"]
# A field's class is stated with its type, or left to the fields of the recipe within. What states none is refused.
Safe = Annotated[T, Field(json_schema_extra={"resume": "safe"})]
Planned = Annotated[T, Field(json_schema_extra={"resume": "planned"})]
Flagged = Annotated[T, Field(json_schema_extra={"resume": "flag"})]
ByField = Annotated[T, Field(json_schema_extra={"resume": "by field"})]


def load(kind: type[R], path: Path | None = None, overrides: list[str] | None = None) -> R:
    """Read a YAML (or JSON) file, apply `key.sub=value` overrides in order, and check the result.

    Overrides without a `=` make up the list of the recipe's positional key, where it has one.
    """
    text = _read(path) if path else ""
    return parse(kind, text, overrides or [], where=str(path) if path else "command line")


def parse(kind: type[R], text: str, overrides: list[str], *, where: str) -> R:
    """As `load`, from text; `where` names the text in errors."""
    values, lines = _parse_yaml(text, where)
    if kind.POSITIONAL and (plain := [override for override in overrides if "=" not in override]):
        values[kind.POSITIONAL] = plain
        overrides = [override for override in overrides if "=" in override]
    for override in overrides:
        _override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(kind, error, where, values, lines, overrides) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every key, derived ones too; `parse` reads it back to an equal recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def stored(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file as they stand, unchecked."""
    return _parse_yaml(_read(path), str(path))[0]


def schema(kind: type[Recipe]) -> str:
    """JSON schema of a recipe, for editors and for people."""
    return json.dumps(kind.model_json_schema(), indent=2)


def changes(old: dict[Any, Any], new: dict[Any, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) for every leaf in which two printed recipes differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, list) and isinstance(after, list):
            before, after = dict(enumerate(before)), dict(enumerate(after))
        if isinstance(before, dict) and isinstance(after, dict):
            found += changes(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found


def resume_class(kind: type[BaseModel], key: str) -> Resume:
    """What a run that is taken up does with a new value of `key`, as `changes` writes it."""
    name, _, rest = key.partition(".")
    field = kind.model_fields.get(name)
    stated = field.json_schema_extra if field else None
    found = stated.get("resume", "refused") if isinstance(stated, dict) else "refused"
    if field and found == "by field":
        inner = _models_in(field.annotation)
        return resume_class(inner[0], rest) if inner and rest else "refused"
    return cast(Resume, found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise RecipeError(
            str(path),
            found=getattr(error, "strerror", None) or "bytes that aren't UTF-8",
            expected="a recipe in YAML",
            mend=f"Did you mean {path.parent / near[0]}?" if near else "Name a recipe file; recipes/ has some.",
        ) from None


def _parse_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[tuple, int]]:
    """The values of a YAML mapping and the line (from 1) of every key path."""
    lines: dict[tuple, int] = {}
    values: Any = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            _require_small(node, {})
            values = loader.construct_document(node)
            _record_lines(node, (), lines)
    except yaml.MarkedYAMLError as error:
        assert error.problem_mark, "every problem of a parser has its place"
        raise RecipeError(
            f"{where}:{error.problem_mark.line + 1}",
            found=str(error.problem).removeprefix("found "),
            expected="YAML",
            mend="Check the indentation and quotes of that line.",
        ) from None
    except (RecursionError, ValueError) as error:  # brackets in brackets, a number of thousands of digits
        raise RecipeError(
            where, found=f"what can't be read ({error})", expected="YAML", mend="Take out what no person wrote."
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{where}:{line}", found=f"the character {chr(error.character)!r}", expected="text", mend="Remove it."
        ) from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(
            where,
            found=f"a {type(values).__name__}",
            expected="keys and values",
            mend="Write `key: value` lines.",
        )
    return values, lines


class _Loader(yaml.SafeLoader):
    """Safe YAML with the plain values of YAML 1.2, and no key stated twice.

    So 3e-4 is a number, and `on`, `off`, 1:30 and 2026-07-01 are the words that they look like.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key_node.value!r} twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either version of YAML would read as something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unicode's own line breaks survive only as escapes.
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


# The pattern and the possible first characters of each kind of plain value.
_PLAIN = {
    "null": ("|~|null|Null|NULL", ["", *"~nN"]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _PLAIN.items():
    for _end in (_Loader, _Dumper):
        _end.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Dumper.add_representer(str, _represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


def _require_small(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """The number of values that a node stands for; refuse a few lines whose aliases stand for billions, or go round."""
    if id(node) not in sizes:
        sizes[id(node)] = None
        parts = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = parts if isinstance(node, yaml.CollectionNode) else ()
        sizes[id(node)] = 1 + sum(_require_small(part, sizes) for part in inner)
    size = sizes[id(node)]
    if size is None or size > MAX_VALUES:
        problem = "an alias inside what it stands for" if size is None else f"aliases that stand for {size:,} values"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return size


def _record_lines(node: yaml.Node, path: tuple, lines: dict[tuple, int]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            inner = (*path, key_node.value)
            lines[inner] = key_node.start_mark.line + 1
            _record_lines(value_node, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_lines(item, (*path, index), lines)


def _override(values: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in nested mappings and lists; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"argument {override!r}",
            found="no `=`" if not equals else "no key before `=`",
            expected="key=value, as in train.learning_rate=3e-3",
            mend="Write key.sub=value.",
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        value = text
    *parents, last = key.split(".")
    place: Any = values
    for part in parents:
        place = _step(place, part, override)
    if isinstance(place, list):
        place[_index(place, last, override)] = value
    else:
        place[last] = value


def _step(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list):
        inner = place[_index(place, part, override)]
    elif (inner := place.get(part)) is None:
        inner = place[part] = {}
    if not isinstance(inner, (dict, list)):
        raise RecipeError(
            f"argument {override!r}",
            found=f"{part} = {inner!r}",
            expected="a section",
            mend=f"{part} has no keys below it.",
        )
    return inner


def _index(place: list, part: str, override: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    raise RecipeError(
        f"argument {override!r}",
        found=f"index {part!r}",
        expected=f"0 to {len(place) - 1}" if place else "an item of a list that isn't empty",
        mend="Name an item of the list by its number, from 0.",
    )


def _explain(
    kind: type[Recipe],
    error: ValidationError,
    where: str,
    values: dict[str, Any],
    lines: dict[tuple, int],
    overrides: list[str],
) -> RecipeError:
    """The first pydantic complaint as a `RecipeError` with the line and, for a key, the nearest known one."""
    complaint = error.errors()[0]
    path = _written(complaint["loc"], values)
    if complaint["type"] == "missing":
        key = ".".join(map(str, (*path, complaint["loc"][-1])))
        return RecipeError(
            f"{_place(path, where, lines, overrides)}: {key}",
            found="nothing",
            expected="a value",
            mend=f"Set {key}=... or add it to the recipe.",
        )
    key = ".".join(map(str, path))
    place = _place(path, where, lines, overrides)
    if complaint["type"] == "extra_forbidden":
        known = known_keys(kind, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        return RecipeError(
            f"{place}: {key}",
            found=f"unknown key {str(path[-1])!r}",
            expected=f"one of {', '.join(known)}",
            mend=f"Did you mean {near[0]!r}?" if near else "Remove it.",
        )
    message = complaint["msg"].removeprefix("Value error, ")
    own = complaint["type"] == "value_error"
    return RecipeError(
        f"{place}: {key}" if key else place,
        found=message if own else _shown(complaint["input"]),
        expected="values that fit together" if own else message[0].lower() + message[1:],
        mend=f"Change {key or 'the recipe'}.",
    )


def _written(loc: tuple[str | int, ...], values: Any) -> tuple[str | int, ...]:
    """The steps of a location that lead somewhere in `values`: pydantic also names the branches of unions."""
    path: list[str | int] = []
    for part in loc:
        steps = dict(enumerate(values)) if isinstance(values, list) else values
        if isinstance(steps, dict) and part in steps:
            values = steps[part]
            path.append(part)
    return tuple(path)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _place(path: tuple, where: str, lines: dict[tuple, int], overrides: list[str]) -> str:
    key = ".".join(map(str, path))
    for override in reversed(overrides):
        stated = override.partition("=")[0]
        made_section = path not in lines and stated.startswith(key + ".")
        if key == stated or key.startswith(stated + ".") or made_section:
            return f"argument {override!r}"
    while path and path not in lines:
        path = path[:-1]
    return f"{where}:{lines[path]}" if path in lines else where


def known_keys(kind: type[BaseModel], path: tuple) -> list[str]:
    """The keys that a recipe class accepts below `path`."""
    models: list[type[BaseModel]] = [kind]
    for part in path:
        if isinstance(part, int):
            continue
        models = [
            inner
            for model in models
            if part in model.model_fields
            for inner in _models_in(model.model_fields[part].annotation)
        ]
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    if get_origin(annotation) in (Union, types.UnionType, list, tuple, dict) or get_args(annotation):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
