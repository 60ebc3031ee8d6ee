"""What a scoring pass reads: tokens as a tree, so that what several texts begin with is read once.

The options of a question share its context, few-shot questions share their header. Texts that branch late go into one
row, under a mask in which a token sees its own branch alone; a long beginning of many rows is a stem, read once and
kept as keys and values while what grows on it is scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np

# Tokens that a stem has to save before its own pass, of a single row, pays.
STEM_SAVES = 256
# Tokens of a stem that take as much memory in a pass as a token that is read.
STEM_WEIGHS = 16


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads at once, and those that it is asked about.

    inputs   what it reads
    targets  what follows each of the last inputs
    owner    the number of the request that they belong to
    part     which window of the request it is
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    owner: int
    part: int = 0

    @property
    def first(self) -> int:
        """The input after which the first target follows."""
        return len(self.inputs) - len(self.targets)


def windows(context: Sequence[int], continuation: Sequence[int], limit: int, owner: int) -> Iterator[Window]:
    """Each token of the continuation once, after as many tokens as fit into `limit` together."""
    tokens = (*context, *continuation)
    for part, begin in enumerate(range(len(context), len(tokens), limit)):
        end = min(begin + limit, len(tokens))
        yield Window(tokens[max(end - 1 - limit, 0) : end - 1], tokens[begin:end], owner, part)


@dataclass
class Tree:
    """One row: the tokens of some windows beyond their stem, every distinct beginning once.

    tokens     [T] in an order in which a token comes after all that it sees
    positions  [T] each token's place in its text
    branches   (begin, end, parent): tokens begin..end are a chain that hangs on the token `parent`, -1 for the stem
    asked      of each window the places in the row whose logits it needs
    """

    stem: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    branches: list[tuple[int, int, int]] = field(default_factory=list)
    asked: list[tuple[Window, list[int]]] = field(default_factory=list)

    @classmethod
    def of(cls, sorted_windows: Sequence[Window], stem: int) -> Tree:
        """The tree of windows in the order of their inputs, of which the first `stem` are the stem's."""
        tree, path = cls(stem), list[int]()
        before: tuple[int, ...] = ()
        for window in sorted_windows:
            shared = common(before, window.inputs) - stem if before else 0
            path = path[:shared]
            new = window.inputs[stem + shared :]
            begin, end = len(tree.tokens), len(tree.tokens) + len(new)
            if new:
                tree.branches.append((begin, end, path[-1] if path else -1))
            tree.tokens += new
            tree.positions += range(stem + shared, len(window.inputs))
            path += range(begin, end)
            tree.asked.append((window, path[window.first - stem :]))
            before = window.inputs
        return tree

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def logits(self) -> int:
        """How many rows of logits it needs."""
        return sum(len(places) for _, places in self.asked)

    @property
    def weight(self) -> int:
        """The tokens that it counts for in a pass: every row has its own copy of the stem, a layer at a time."""
        return max(len(self), (self.stem + len(self)) // STEM_WEIGHS)

    @property
    def chain(self) -> bool:
        """Whether nothing branches, so that the usual causal mask is right."""
        return len(self.branches) == 1

    @cached_property
    def seen(self) -> np.ndarray:
        """[T, T] whether the token of a row sees that of a column."""
        seen = np.zeros((len(self), len(self)), dtype=bool)
        for begin, end, parent in self.branches:
            if parent >= 0:
                seen[begin:end] = seen[parent]
            seen[begin:end, begin:end] = np.tri(end - begin, dtype=bool)
        return seen


@dataclass
class Group:
    """Trees that grow on one stem, and the groups that grow on it.

    stem   tokens from the beginning of the texts on
    known  how many of them the stem below has
    """

    stem: tuple[int, ...] = ()
    known: int = 0
    trees: list[Tree] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def __iter__(self) -> Iterator[Group]:
        """This group and all that grow on it."""
        yield self
        for group in self.groups:
            yield from group


def plant(found: Sequence[Window], *, row_tokens: int, token_worth: float) -> Group:
    """The trees of some windows, each of at most `row_tokens` tokens unless a single window has more.

    token_worth  how many pairs of tokens cost as much attention as one token costs in all other products: two
                 branches share a row where the tokens saved are worth more than the pairs that don't see each other
    """
    ordered = sorted(found, key=lambda window: window.inputs)
    forest = _Forest(ordered, row_tokens, token_worth)
    root = Group()
    todo = [(0, len(ordered), root)] if ordered else []
    while todo:
        begin, end, group = todo.pop()
        parts = forest.parts(begin, end)
        if forest.one_row(begin, end, parts, len(group.stem)):
            group.trees.append(Tree.of(ordered[begin:end], len(group.stem)))
            continue
        stem = forest.stem(begin, end)
        if (len(stem) - len(group.stem)) * (len(parts) - 1) >= STEM_SAVES:
            group.groups.append(Group(stem, len(group.stem)))
            group = group.groups[-1]
        todo += [(*part, group) for part in parts]
    return root


def batches(trees: Sequence[Tree], *, most_tokens: int, most_asked: int) -> Iterator[list[Tree]]:
    """Rows of similar length for one pass each: at most so many tokens, padding too, and logits, or a single row."""
    batch: list[Tree] = []
    asked = 0
    for tree in sorted(trees, key=len, reverse=True):
        if batch and ((len(batch) + 1) * batch[0].weight > most_tokens or asked + tree.logits > most_asked):
            yield batch
            batch, asked = [], 0
        batch.append(tree)
        asked += tree.logits
    if batch:
        yield batch


def chains(found: Sequence[Window]) -> Group:
    """A row for every distinct text, for models that can't be shown a tree."""
    ordered = sorted(found, key=lambda window: window.inputs)
    return Group(trees=[Tree.of(list(same), 0) for _, same in groupby(ordered, key=lambda window: window.inputs)])


@dataclass(frozen=True)
class _Forest:
    """Windows in the order of their inputs; a range of them is a branch."""

    windows: Sequence[Window]
    row_tokens: int
    token_worth: float

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(window.inputs) for window in self.windows])

    @cached_property
    def _common(self) -> np.ndarray:
        """[windows - 1] how many tokens each window begins with that the next one begins with too."""
        return np.array([common(one.inputs, other.inputs) for one, other in pairwise(self.windows)], dtype=int)

    @cached_property
    def _new(self) -> np.ndarray:
        """[windows] how many tokens there are, up to each window, that the window before it hasn't."""
        return np.cumsum(self._lengths - np.concatenate([[0], self._common]))

    def size(self, begin: int, end: int) -> int:
        """Distinct tokens of a range, by their beginnings."""
        return int(self._lengths[begin] + self._new[end - 1] - self._new[begin])

    def shared(self, begin: int, end: int) -> int:
        """How many tokens all of a range begin with."""
        return int(self._common[begin : end - 1].min(initial=self._lengths[begin]))

    def parts(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The branches of a range, by the token after those that all share; one whose windows are the same is whole."""
        at = self.shared(begin, end)
        cuts = [begin]
        for number in range(begin + 1, end):
            if self.windows[number].inputs[at : at + 1] != self.windows[cuts[-1]].inputs[at : at + 1]:
                cuts.append(number)
        return list(pairwise([*cuts, end]))

    def one_row(self, begin: int, end: int, parts: list[tuple[int, int]], stem: int) -> bool:
        """Whether a range is a row: all of it is the same text, or sharing what its parts begin with is worth it."""
        if len(parts) == 1:
            return True
        size = self.size(begin, end) - stem
        if size > self.row_tokens:
            return False
        saved = (self.shared(begin, end) - stem) * (len(parts) - 1)
        blind = size**2 - sum((self.size(*part) - stem) ** 2 for part in parts)
        return saved * self.token_worth >= blind

    def stem(self, begin: int, end: int) -> tuple[int, ...]:
        """What a range begins with, up to the first token that somebody is asked after."""
        asked = min(window.first for window in self.windows[begin:end])
        return self.windows[begin].inputs[: min(self.shared(begin, end), asked)]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return number
    return min(len(one), len(other))
