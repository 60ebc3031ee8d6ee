"""A tree has every distinct beginning once, and each text finds its own tokens, and no others, in it."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from espalier.infer import trees
from espalier.infer.trees import Window, batches, chains, plant, windows

# Few tokens and many texts, so that much is shared, by chance or by a common beginning.
TEXTS = st.lists(
    st.builds(
        lambda header, text, targets: (tuple(range(40)) * header + tuple(text), targets),
        st.integers(0, 1),
        st.lists(st.integers(0, 2), min_size=1, max_size=12),
        st.integers(1, 4),
    ),
    min_size=1,
    max_size=30,
)


def asked(texts):
    return [Window(text, tuple(range(min(targets, len(text)))), owner) for owner, (text, targets) in enumerate(texts)]


def planted(texts, **more):
    return plant(asked(texts), **{"row_tokens": 60, "token_worth": 30.0} | more)


@given(TEXTS, st.sampled_from([1, 60, 1000]), st.sampled_from([0.0, 30.0, 1e6]))
def test_every_window_is_asked_once_and_sees_its_own_inputs_alone(texts, row_tokens, token_worth):
    found = []
    for group in planted(texts, row_tokens=row_tokens, token_worth=token_worth):
        for tree in group.trees:
            for window, places in tree.asked:
                found.append(window.owner)
                assert len(places) == len(window.targets)
                seen = np.flatnonzero(tree.seen[places[-1]])
                assert (*group.stem, *(tree.tokens[place] for place in seen)) == window.inputs
                assert [tree.positions[place] for place in seen] == list(range(len(group.stem), len(window.inputs)))
                assert places == list(seen[-len(places) :])
    assert sorted(found) == list(range(len(texts)))


@given(TEXTS)
def test_a_row_of_more_tokens_than_are_allowed_is_a_single_text(texts):
    for group in planted(texts, row_tokens=20):
        assert all(len(tree) <= 20 or tree.chain for tree in group.trees)


@given(TEXTS)
def test_where_sharing_is_worth_everything_every_beginning_is_there_once(texts):
    beginnings = {text[:length] for text, _ in texts for length in range(1, len(text) + 1)}
    group = planted(texts, row_tokens=10**6, token_worth=1e9)
    # Texts that begin differently have nothing to share.
    assert sum(map(len, group.trees)) == len(beginnings) and not group.groups


def test_a_long_beginning_of_many_rows_is_read_once(monkeypatch):
    header = tuple(range(100))
    found = [Window((*header, 200 + n, *([n] * 50)), (0,), n) for n in range(20)]
    root = plant(found, row_tokens=120, token_worth=0.0)
    assert root.trees == [] and [group.stem for group in root.groups] == [header]
    assert [len(tree) for tree in root.groups[0].trees] == [51] * 20


def test_a_stem_ends_before_the_first_token_that_is_asked_after():
    found = [Window((*range(100), n, *([n] * 50)), (0,) * 90, n) for n in range(20)]
    [group] = plant(found, row_tokens=120, token_worth=0.0).groups
    assert len(group.stem) == found[0].first == 61


def test_texts_that_share_little_do_not_share_a_row():
    found = [Window((7, n, *([n] * 40)), (0,), n) for n in range(3)]
    assert [len(tree) for tree in plant(found, row_tokens=1000, token_worth=10.0).trees] == [42] * 3
    assert [len(tree) for tree in plant(found, row_tokens=1000, token_worth=1e4).trees] == [124]


@given(TEXTS)
def test_chains_are_rows_without_branches(texts):
    group = chains(asked(texts))
    assert sorted(tuple(tree.tokens) for tree in group.trees) == sorted({text for text, _ in texts})
    assert all(tree.chain for tree in group.trees) and not group.groups


def test_many_texts_each_the_beginning_of_the_next_are_no_trouble():
    found = [Window((1,) * length, (1,), length) for length in range(1, 1100)]
    assert (
        sum(len(tree.asked) for group in plant(found, row_tokens=10, token_worth=1.0) for tree in group.trees) == 1099
    )


@given(st.integers(0, 9), st.integers(0, 40), st.integers(1, 9))
def test_windows_score_each_token_once_after_as_many_as_fit(prompt, length, limit):
    context, continuation = list(range(100, 101 + prompt)), list(range(length))
    found = list(windows(context, continuation, limit, 0))
    assert [target for window in found for target in window.targets] == continuation
    whole = context + continuation
    for window in found:
        end = len(context) + window.targets[-1]
        assert list(window.inputs) == whole[max(end - limit, 0) : end] and len(window.targets) <= limit


def test_windows_are_those_of_lm_eval():
    from lm_eval import utils

    tokens = list(range(1, 24))
    theirs = utils.get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=5, context_len=1)
    ours = windows([0], tokens, 5, 0)
    assert [(list(one.inputs), list(one.targets)) for one in ours] == [(a, b) for a, b in theirs]


@given(TEXTS, st.integers(1, 100), st.integers(1, 20))
def test_batches_hold_what_they_may_or_a_single_row(texts, most_tokens, most_asked):
    rows = planted(texts).trees
    made = list(batches(rows, most_tokens=most_tokens, most_asked=most_asked))
    assert sorted(map(id, itertools.chain(*made))) == sorted(map(id, rows))
    for batch in made:
        tokens, logits = len(batch) * max(map(len, batch)), sum(tree.logits for tree in batch)
        assert len(batch) == 1 or (tokens <= most_tokens and logits <= most_asked)


def test_a_beginning_in_common():
    assert [trees.common("abc", other) for other in ("", "x", "abd", "abcd", "abc")] == [0, 0, 2, 3, 3]
