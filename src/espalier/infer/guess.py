"""Guessing what a model will write: what followed the last tokens when they last stood together in the same text."""

from __future__ import annotations

# Guesses of a text at most; lengths of what has to be the same, the longer first.
MOST, ORDERS = 7, (3, 2)
# The shares of guesses that came true from which a few and from which many guesses are made. A pass over four tokens
# takes a third longer than one over a single token, one over eight tokens half as long again.
SOME, GOOD, FEW = 0.3, 0.6, 3


class Guesses:
    """About one text, whose tokens are appended to by others; `see` is called for each."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.followed: dict[tuple[int, ...], int] = {}
        self.luck = SOME
        for end in range(len(tokens)):
            self._note(end)

    def next(self, room: int) -> list[int]:
        """The tokens to come, at most `room`: the more, the more guesses came true of late."""
        count = MOST if self.luck >= GOOD else FEW if self.luck >= SOME else 0
        return self._chain(min(count, room))

    def see(self) -> None:
        """A token was appended: would it have been guessed?"""
        end = len(self.tokens) - 1
        guess = self._after(self.tokens[max(end - ORDERS[0], 0) : end])
        self.luck += 0.2 * ((guess == self.tokens[end]) - self.luck)
        self._note(end)

    def _chain(self, count: int) -> list[int]:
        """Guesses, each on what was guessed before it, so that a loop is followed round."""
        tail, found = self.tokens[-ORDERS[0] :], list[int]()
        while len(found) < count and (token := self._after([*tail, *found])) is not None:
            found.append(token)
        return found

    def _after(self, tokens: list[int]) -> int | None:
        """What followed the last of these tokens last."""
        known = (self.followed.get(tuple(tokens[-order:])) for order in ORDERS if len(tokens) >= order)
        return next((token for token in known if token is not None), None)

    def _note(self, end: int) -> None:
        for order in ORDERS:
            if end >= order:
                self.followed[tuple(self.tokens[end - order : end])] = self.tokens[end]
