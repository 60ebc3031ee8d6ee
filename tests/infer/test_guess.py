"""Guesses repeat what the text did before, round a loop too, and are made as long as they come true."""

from espalier.infer.guess import FEW, MOST, Guesses


def text(tokens):
    return Guesses(list(tokens))


def write(guesses, *tokens):
    for token in tokens:
        guesses.tokens.append(token)
        guesses.see()


def test_what_followed_the_last_tokens_follows_again():
    assert text([1, 2, 3, 4, 5, 9, 1, 2]).next(3) == [3, 4, 5]


def test_a_loop_is_followed_round():
    guesses = text([1, 2, 1, 2, 1])
    write(guesses, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1)
    assert guesses.next(100) == [2, 1, 2, 1, 2, 1, 2] and len(guesses.next(100)) == MOST


def test_of_two_memories_the_longer_one_counts():
    assert text([7, 1, 2, 3, 8, 1, 2, 4, 0, 0, 7, 1, 2]).next(1) == [3]


def test_nothing_is_guessed_after_what_is_new_or_where_there_is_no_room():
    assert text([1, 2, 3, 4]).next(5) == [] and text([]).next(5) == [] and text([1]).next(5) == []
    assert text([1, 2, 3, 1, 2]).next(0) == []


def test_guesses_become_fewer_when_they_fail_and_more_when_they_come_true():
    guesses = text([5, 5, 5, 5, 5, 5])
    assert len(guesses.next(100)) == FEW
    write(guesses, 6, 7, 8)
    assert guesses.next(100) == []
    write(guesses, *[9] * 12)
    assert len(guesses.next(100)) == MOST
