"""Many questions, read in every way, as arrays that results are computed from.

Legend: n questions, L layers, H heads, O options of the question that has most; minus infinity where one has fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from espalier.evaluate.audits.choice import HeadScores, standardised
from espalier.evaluate.audits.heads import silenced
from espalier.evaluate.audits.reading import Reader
from espalier.evaluate.questions import Question


@dataclass(frozen=True)
class Readings:
    """Questions in one order of their options.

    letters_nO  log-probability of each letter
    heads       what every head gives every option: "qk", and "attention" where the model computes it
    mass_nLH    share of the last token's attention that is on the options; 0 where it isn't computed
    prompts_n   tokens of each prompt
    """

    questions: Sequence[Question]
    gold_n: np.ndarray
    letters_nO: np.ndarray
    heads: dict[str, HeadScores]
    mass_nLH: np.ndarray
    prompts_n: np.ndarray

    @property
    def letters_right(self) -> np.ndarray:
        """Whether the most probable letter is the right one, [n]."""
        return self.letters_nO.argmax(1) == self.gold_n


@dataclass(frozen=True)
class Options:
    """What the options' texts are to the model when it is shown the question alone.

    logprobs_nO  of each text, in nats
    lengths_nO   its characters
    tokens       that were read for it
    """

    logprobs_nO: np.ndarray
    lengths_nO: np.ndarray
    tokens: int


def read_all(reader: Reader, questions: Sequence[Question], name: str) -> Readings:
    """A pass for each question; `name` is what the bar shows."""
    most, shape = _most(questions), (len(questions), len(reader.layers), reader.layers[0].heads)
    letters = np.full((len(questions), most), -np.inf)
    scores = {kind: np.full((*shape, most), -np.inf, dtype=np.float32) for kind in reader.kinds}
    mass, prompts = np.zeros(shape), np.zeros(len(questions), dtype=int)
    for number, question in enumerate(track(questions, name, transient=True)):
        seen, ids, prompts[number] = reader.read(question)
        letters[number, : len(ids)] = seen.next_V[ids]
        scores["qk"][number, ..., : len(ids)] = standardised(seen.qk_LHO.numpy())
        if seen.attention_LHO is not None:
            scores["attention"][number, ..., : len(ids)] = standardised(seen.attention_LHO.numpy())
            mass[number] = seen.attention_LHO.sum(-1)
    gold = np.array([question.gold for question in questions])
    heads = {kind: HeadScores(each, gold) for kind, each in scores.items()}
    return Readings(questions, gold, letters, heads, mass, prompts)


def read_options(reader: Reader, questions: Sequence[Question]) -> Options:
    """A pass for each option."""
    logprobs = np.full((len(questions), _most(questions)), -np.inf)
    lengths, read = np.ones(logprobs.shape), 0
    for number, question in enumerate(track(questions, "options", transient=True)):
        found, tokens = reader.option_logprobs(question)
        logprobs[number, : len(found)] = found
        lengths[number, : len(found)] = [len(option.strip()) for option in question.options]
        read += tokens
    return Options(logprobs, lengths, read)


def without(
    reader: Reader, questions: Sequence[Question], sets: Sequence[Sequence[tuple[int, int]]]
) -> tuple[np.ndarray, np.ndarray]:
    """While sets of (layer, head) are silent: whether the most probable letter is right, and what the rest becomes.

    Returns two arrays [sets, n]; the second is the KL divergence, in nats, of the next token's probabilities from what
    they are when no head is silent.
    """
    right, shift = np.zeros((2, len(sets), len(questions)))
    for number, question in enumerate(track(questions, "causes", transient=True)):
        before, ids, _ = reader.read(question)
        for place, heads in enumerate(sets):
            with silenced(reader.layers, heads):
                after, *_ = reader.read(question)
            right[place, number] = int(after.next_V[ids].argmax()) == question.gold
            shift[place, number] = (before.next_V.exp() * (before.next_V - after.next_V)).sum()
    return right, shift


def _most(questions: Sequence[Question]) -> int:
    return max(len(question.options) for question in questions)
