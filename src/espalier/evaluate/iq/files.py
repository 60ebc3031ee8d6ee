"""The user's own files as sub-tasks: SuperGLUE and CLUE with symbols for their classes, and bAbI's stories.

A file of rows is one of the benchmark's own JSON lines with labels; what is asked about one row is shown by others.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from espalier.errors import DataError
from espalier.evaluate.iq.alphabets import Split
from espalier.evaluate.iq.setting import Instruction, Question, Setting
from espalier.evaluate.iq.symbols import in_symbols
from espalier.evaluate.iq.tasks import INTERFERENCE, MAPPING, UNMEASURED, as_item
from espalier.evaluate.items import Item, read_lines

SHOTS = 3
Texts = tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """A benchmark's rows.

    n         of the paper's selection
    fields    the texts of a row; a.b is b inside a
    meanings  of the labels, to be put after a symbol
    unsure    a label of rows on which no one agreed, which are left out
    """

    n: int
    language: str
    fields: tuple[str, ...]
    meanings: Mapping[str, str]
    unsure: str = ""
    group: str = MAPPING


@dataclass(frozen=True)
class Stories:
    """bAbI's stories with questions in between."""

    n: int
    group: str = INTERFERENCE


_SPANS = ("text", "target.span1_text", "target.span2_text")
FILES: dict[str, Rows | Stories] = {
    "boolq": Rows(
        299,
        "en",
        ("passage", "question"),
        {"true": "if text 1 answers text 2 with yes", "false": "if text 1 answers text 2 with no"},
    ),
    "wic": Rows(
        300,
        "en",
        ("word", "sentence1", "sentence2"),
        {"true": "if text 1 means the same in texts 2 and 3", "false": "if it means different things"},
    ),
    "rte": Rows(
        277,
        "en",
        ("premise", "hypothesis"),
        {"entailment": "if text 2 follows from text 1", "not_entailment": "if it doesn't"},
    ),
    "wsc": Rows(
        103,
        "en",
        _SPANS,
        {"true": "if text 3 stands for text 2 in text 1", "false": "if it stands for something else"},
    ),
    "afqmc": Rows(
        300,
        "zh",
        ("sentence1", "sentence2"),
        {"1": "两个文本意思相同", "0": "两个文本意思不同"},
    ),
    "csl": Rows(
        208,
        "zh",
        ("abst", "keyword"),
        {"1": "文本2都是文本1的关键词", "0": "文本2不都是文本1的关键词"},
    ),
    "ocnli": Rows(
        300,
        "zh",
        ("sentence1", "sentence2"),
        {
            "entailment": "由文本1可以推出文本2",
            "neutral": "由文本1不能判断文本2",
            "contradiction": "文本2与文本1矛盾",
        },
        unsure="-",
    ),
    "cluewsc2020": Rows(
        300,
        "zh",
        _SPANS,
        {"true": "文本3指的是文本2", "false": "文本3指的不是文本2"},
    ),
    "babi_1": Stories(300),
    "babi_2": Stories(300),
}


def items_of(
    task: str,
    path: Path,
    n: int,
    *,
    split: Split = "test",
    shots: int | None = None,
    instruction: Instruction = "induction",
    seed: int = 0,
) -> list[Item]:
    """The first n questions of a file, in an order that the seed draws; fewer where it has no more.

    Raises `DataError` with the line of a row that can't be read.
    """
    kind = FILES[task]
    if isinstance(kind, Stories):
        stories = _stories(path)
        return [as_item(task, stories[number], "en") for number in _order(stories, path, f"{seed} {task}")[:n]]
    rows = _rows(kind, path)
    setting = Setting(kind.language, split, shots or SHOTS, UNMEASURED, instruction)
    return [
        as_item(task, _shown(random.Random(f"{seed} {task} {number}"), setting, kind, rows, number), kind.language)
        for number in _order(rows, path, f"{seed} {task}")[:n]
    ]


def _order(questions: Sequence[object], path: Path, seed: str) -> list[int]:
    """Their places in a random order."""
    if not questions:
        raise DataError(str(path), found="no questions", expected="one at least", mend="Name another file.")
    return random.Random(seed).sample(range(len(questions)), len(questions))


def _shown(draw: random.Random, setting: Setting, kind: Rows, rows: list[tuple[Texts, str]], asked: int) -> Question:
    """The question about one row, after others of each label."""
    by_label = defaultdict(list)
    for number, (_, label) in enumerate(rows):
        if number != asked:
            by_label[label].append(number)
    shown = [
        rows[number]
        for label in kind.meanings
        for number in draw.sample(by_label[label], min(setting.shots, len(by_label[label])))
    ]
    return in_symbols(draw, setting, kind.meanings, shown, rows[asked])


def _rows(kind: Rows, path: Path) -> list[tuple[Texts, str]]:
    """(texts, label) of each row."""
    found = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            _refuse(where, "no JSON", "a JSON object")
        label = str(_field(row, "label", where)).lower()
        if kind.unsure and label == kind.unsure:
            continue
        if label not in kind.meanings:
            _refuse(f"{where}: label", repr(label), f"one of {', '.join(kind.meanings)}")
        found.append((tuple(_text(row, key, where) for key in kind.fields), label))
    return found


def _field(row: Any, key: str, where: str) -> Any:
    for part in key.split("."):
        if not isinstance(row, dict) or part not in row:
            _refuse(f"{where}: {key}", "nothing", "a value")
        row = row[part]
    return row


def _text(row: Any, key: str, where: str) -> str:
    """A text on one line; of a list its entries."""
    value = _field(row, key, where)
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    if not isinstance(value, str) or not value.strip():
        _refuse(f"{where}: {key}", repr(value)[:60], "text")
    return " ".join(value.split())


def _stories(path: Path) -> list[Question]:
    """Each question after the sentences of its story before it; the answers of the whole file are the options."""
    asked: list[tuple[str, str]] = []
    story: list[str] = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        place, _, said = line.strip().partition(" ")
        if not place.isdecimal() or not said:
            _refuse(where, repr(line[:60]), "a number and a sentence")
        if int(place) == 1:
            story = []
        question, tab, rest = said.partition("\t")
        if not tab:
            story.append(said)
        elif answer := rest.split("\t")[0].strip():
            asked.append(("\n".join([" ".join(story), question.strip(), "Answer:"]), f" {answer}"))
        else:
            _refuse(where, "a question without an answer", "question, tab, answer")
    options = tuple(sorted({answer for _, answer in asked}))
    return [Question(prompt, answer, options) for prompt, answer in asked]


def _refuse(where: str, found: str, expected: str) -> NoReturn:
    raise DataError(where, found=found, expected=expected, mend="Mend the line, or name another file.")
