"""Questions that were read, the heads that some of them chose, and what all readouts come to on the others."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from espalier import files
from espalier.errors import DataError, RecipeError
from espalier.evaluate.audits import choice
from espalier.evaluate.audits.reading import Reader
from espalier.evaluate.audits.readings import read_all, read_options, without
from espalier.evaluate.intervals import paired_bootstrap, stderr
from espalier.evaluate.items import Outcome, read_rows
from espalier.evaluate.questions import LETTERS, Question, as_item, render
from espalier.report import Report

# Heads of which the mean, and the choice together, are told beside the best one.
TOP = 5
# Questions of the causal check, and how often other heads are drawn for it.
CHECKED, DRAWN = 200, 3

Head = tuple[int, int]


@dataclass(frozen=True)
class ChosenHeads:
    """mcq_head.json: the (layer, head) from 0 that is read by each kind of score, and how it was read."""

    token: str
    vectors: str
    heads: dict[str, Head]


def write_heads(path: Path, heads: dict[str, Head], reader: Reader) -> None:
    """Keep the heads that were chosen, for other questions."""
    files.write_text(path, json.dumps(asdict(ChosenHeads(reader.token, reader.vectors, heads))) + "\n")


def read_heads(path: Path, reader: Reader) -> dict[str, Head]:
    """The heads of a file; refused where the model hasn't got them, or they were chosen at other tokens or vectors."""
    found, *_ = read_rows(ChosenHeads, path) or [ChosenHeads("", "", {})]
    layers, heads = len(reader.layers), reader.layers[0].heads
    as_chosen = (found.token, found.vectors) == (reader.token, reader.vectors)
    for kind in reader.kinds:
        layer, head = found.heads.get(kind, (layers, heads))
        if not as_chosen or not (0 <= layer < layers and 0 <= head < heads):
            raise RecipeError(
                f"heads: {path}",
                found=f"heads {found.heads} with token={found.token} and vectors={found.vectors}",
                expected=f"one for {kind} of {layers} layers and {heads} heads, with token={reader.token} and "
                f"vectors={reader.vectors}",
                mend="Set token=..., vectors=... and also=... as they were, or leave heads=... out to choose anew.",
            )
    return {kind: found.heads[kind] for kind in reader.kinds}


@dataclass(frozen=True)
class Plan:
    """What is done with the questions of a task.

    validation    share of them by which heads are chosen, unless they are given
    given         heads by kind of score
    fixed         options at the end that are never shuffled
    permutations  other orders in which the options are shown
    options       whether their texts are scored as well
    silence       most heads that are silenced
    """

    task: str
    validation: float
    given: dict[str, Head] | None
    fixed: int
    permutations: int
    options: bool
    silence: int
    seed: int


class Audit:
    """Everything that is read when it is made, and what follows from it.

    A head has a number, layer by layer: layer * H + head.
    """

    def __init__(self, reader: Reader, questions: Sequence[Question], plan: Plan) -> None:
        self.reader, self.questions, self.plan = reader, questions, plan
        self.layers, self.heads = len(reader.layers), reader.layers[0].heads
        draw = random.Random(plan.seed)
        orders = [[q.shuffled(draw, fixed=plan.fixed) for q in questions] for _ in range(plan.permutations)]
        self.readings = read_all(reader, questions, "questions")
        self.permuted = [read_all(reader, order, "other orders") for order in orders]
        self.options = read_options(reader, questions) if plan.options else None
        self.tokens = sum(int(each.prompts_n.sum()) for each in (self.readings, *self.permuted))
        self.tokens += self.options.tokens if self.options else 0
        self.validation, self.held_out = self._split()

    @cached_property
    def ranking(self) -> dict[str, np.ndarray]:
        """By kind of score the heads to read, best first: all of them as the validation questions rank them, or the
        one that was given."""
        if self.plan.given is not None:
            return {kind: np.array([layer * self.heads + head]) for kind, (layer, head) in self.plan.given.items()}
        return {kind: choice.ranked(scores[self.validation]) for kind, scores in self.readings.heads.items()}

    @cached_property
    def unlabelled(self) -> np.ndarray:
        """All heads, best first, as attention ranks them without answers; none where it isn't computed."""
        if "attention" not in self.readings.heads:
            return np.arange(0)
        return choice.unlabelled(self.readings.heads["attention"], self.readings.mass_nLH)

    @cached_property
    def right(self) -> dict[str, np.ndarray]:
        """Whether each question is answered rightly, by readout, [n]."""
        found, gold = {"logits": self.readings.letters_right}, self.readings.gold_n
        if self.options:
            found["options"] = self.options.logprobs_nO.argmax(1) == gold
            found["options_norm"] = (self.options.logprobs_nO / self.options.lengths_nO).argmax(1) == gold
        return found | {kind: self.readings.heads[kind].right[:, rank[0]] for kind, rank in self.ranking.items()}

    def best(self) -> dict[str, Head]:
        """The best head by kind of score."""
        return {kind: self._place(rank[0]) for kind, rank in self.ranking.items()}

    def report(self, subject: str) -> Report:
        """Rows of (task, readout), all of the held-out questions."""
        report = Report(subject, context=self._context())
        for metric, scores, note in self._rows():
            values = [float(score) for score in scores]
            value = sum(values) / len(values)
            report.add(self.plan.task, metric, value, stderr=stderr(values), n=len(values), note=note)
        for task, metric, right in self._tagged():
            report.add(task, metric, sum(right) / len(right), stderr=stderr(right), n=len(right))
        return report

    def outcomes(self) -> Iterator[Outcome]:
        """Of the held-out questions, with a score for each readout; said and logprobs are the letters'."""
        for number in self.held_out:
            question = self.questions[number]
            item = as_item(question, self.plan.task, "letters", self.reader.template)
            logprobs = self.readings.letters_nO[number, : len(question.options)]
            yield Outcome(
                task=self.plan.task,
                id=item.id,
                scores={name: float(right_n[number]) for name, right_n in self.right.items()},
                said=item.options[int(logprobs.argmax())],
                gold=item.gold,
                chance=item.chance,
                prompt_tokens=int(self.readings.prompts_n[number]),
                completion_tokens=0,
                logprobs=tuple(map(float, logprobs)),
                tags=question.tags,
            )

    def table(self) -> str:
        """The best heads, with what they come to on the questions that chose them and on the others."""
        lines = []
        for kind, rank in self.ranking.items():
            lines.append(f"{kind}: layer.head, right of {len(self.validation)} that chose it, of {len(self.held_out)}")
            for head in rank[:TOP]:
                right = self.readings.heads[kind].right[:, head]
                chose = f"{right[self.validation].mean():.3f}" if len(self.validation) else "given"
                lines.append(f"  {self._name(head):>6}  {chose}  {right[self.held_out].mean():.3f}")
        return "\n".join(lines)

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.questions)
        if self.plan.given is not None:
            return np.arange(0), np.arange(n)
        validation, held_out = choice.split(self.readings.gold_n, self.plan.validation, self.plan.seed)
        if not len(validation) or not len(held_out):
            raise DataError(
                self.plan.task,
                found=f"{n} questions, {len(validation)} of them to choose a head by and {len(held_out)} to judge it",
                expected="some of both",
                mend="Take more questions, or another validation=...",
            )
        return validation, held_out

    def _rows(self) -> Iterator[tuple[str, np.ndarray, str]]:
        """(metric, score of each held-out question, note)"""
        heads = {kind: f"head {self._name(rank[0])}" for kind, rank in self.ranking.items()}
        for name, right_n in self.right.items():
            yield name, right_n[self.held_out], heads.get(name, "")
        for name, right_n in self._permutation_right().items():
            yield f"{name}_pa", right_n[self.held_out], "right in the given order and in another"
        for kind in self.ranking:
            yield from self._rows_of_heads(kind)
        if count := min(self.plan.silence, self.layers * self.heads // 4):
            yield from self._rows_of_silence(count)

    def _permutation_right(self) -> dict[str, np.ndarray]:
        """Right in the given order, times the share of other orders in which it is right too, [n]."""
        if not self.permuted:
            return {}
        also = np.mean([order.letters_right for order in self.permuted], axis=0)
        found = {"logits": self.readings.letters_right * also}
        for kind, rank in self.ranking.items():
            also = np.mean([order.heads[kind].right[:, rank[0]] for order in self.permuted], axis=0)
            found[kind] = self.right[kind] * also
        return found

    def _rows_of_heads(self, kind: str) -> Iterator[tuple[str, np.ndarray, str]]:
        """Beside the best head: what it gains on the letters, the next ones, and the choice without answers."""
        held_out, top = self.readings.heads[kind][self.held_out], self.ranking[kind][:TOP]
        gain = held_out.right[:, top[0]].astype(float) - self.right["logits"][self.held_out]
        sure = paired_bootstrap([0.0] * len(gain), gain.tolist(), seed=self.plan.seed)
        yield f"{kind}_gain", gain, f"on the logits: 95% from {sure.low:.3f} to {sure.high:.3f}"
        if len(top) > 1:
            yield f"{kind}_top", held_out.right[:, top].mean(1), f"mean of the {len(top)} best heads"
            yield f"{kind}_sum", held_out.together(top), f"scores of the {len(top)} best heads together"
        for head in self.unlabelled[:1]:
            yield f"{kind}_unlabelled", held_out.right[:, head], f"head {self._name(head)}, chosen without answers"

    def _rows_of_silence(self, count: int) -> Iterator[tuple[str, np.ndarray, str]]:
        """The letters while the best heads by QK-score are silent, and while as many others are, drawn at random."""
        best = self.ranking["qk"][:count]
        others, draw = np.setdiff1d(np.arange(self.layers * self.heads), best), np.random.default_rng(self.plan.seed)
        drawn = [draw.choice(others, len(best), replace=False) for _ in range(DRAWN)]
        checked = self.held_out[:CHECKED]
        sets = [[self._place(head) for head in heads] for heads in (best, *drawn)]
        right, shift = without(self.reader, [self.questions[number] for number in checked], sets)
        self.tokens += (1 + len(sets)) * int(self.readings.prompts_n[checked].sum())
        for name, part in (("best", slice(1)), ("other", slice(1, None))):
            note = f"{len(best)} {name} heads silent"
            yield f"logits_without_{name}", right[part].mean(0), note
            yield f"shift_without_{name}", shift[part].mean(0), f"{note}: KL divergence of the next token, nats"

    def _tagged(self) -> Iterator[tuple[str, str, list[float]]]:
        """(task, readout, score of each held-out question) for each value of each tag."""
        places: dict[tuple[str, str], list[int]] = {}
        for number in self.held_out:
            for tag in self.questions[number].tags.items():
                places.setdefault(tag, []).append(number)
        for (key, value), numbers in sorted(places.items()):
            for name, right_n in self.right.items():
                yield f"{self.plan.task}/{key}={value}", name, right_n[numbers].astype(float).tolist()

    def _context(self) -> dict[str, Any]:
        """What must be known to compare, maps of all heads, and the letters that each readout prefers."""
        reader, letters = self.reader, {"logits": self._histogram(self.readings.letters_nO.argmax(1))}
        for kind, rank in self.ranking.items():
            letters[kind] = self._histogram(self.readings.heads[kind].choices[:, rank[0]])
        return {
            "questions": files.digest([render(question, reader.template).text for question in self.questions]),
            "chance": float(np.mean([1 / len(question.options) for question in self.questions])),
            "template": reader.template,
            "cloze": reader.cloze,
            "token": reader.token,
            "vectors": reader.vectors,
            "validation": len(self.validation),
            "heads": {kind: self._about_heads(kind) for kind in self.ranking},
            "unlabelled": [self._place(head) for head in self.unlabelled[:20]],
            "letters": letters,
        }

    def _about_heads(self, kind: str) -> dict[str, Any]:
        """The head that is read, how the choice might have gone, and a map [layers][heads] of accuracy.

        The map is of the held-out questions: whoever chooses a head from it has none left to judge it by.
        """
        scores = self.readings.heads[kind]
        accuracy = scores[self.held_out].right.mean(0).reshape(self.layers, self.heads)
        about: dict[str, Any] = {"chosen": self._place(self.ranking[kind][0]), "map": accuracy.round(4).tolist()}
        if len(self.validation):
            trust = choice.trust(scores[self.validation], scores[self.held_out], self.plan.seed)
            often = {self._name(head): float(trust.picked[head]) for head in np.argsort(-trust.picked)[:TOP]}
            about["chosen_anew"] = {"low": trust.low, "high": trust.high, "picked": often}
        return about

    def _histogram(self, choices_n: np.ndarray) -> dict[str, float]:
        """The share of the held-out questions for which each letter is chosen."""
        shares = np.bincount(choices_n[self.held_out], minlength=self.readings.letters_nO.shape[1]) / len(self.held_out)
        return dict(zip(LETTERS, shares.tolist(), strict=False))

    def _place(self, head: int) -> Head:
        return int(head) // self.heads, int(head) % self.heads

    def _name(self, head: int) -> str:
        layer, number = self._place(head)
        return f"{layer}.{number}"
