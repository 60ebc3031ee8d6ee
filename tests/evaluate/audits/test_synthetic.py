"""Generated questions ask for one of their options, each letter equally often."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from espalier.evaluate.audits.synthetic import WORDS, SyntheticRecipe, synthetic


@given(st.integers(2, 24), st.integers(1, 60), st.integers(0, 99))
def test_the_right_option_is_the_word_that_is_asked_for(options, n, seed):
    made = synthetic(SyntheticRecipe(n=n, options=options, phrase="Find {word}!", seed=seed))
    assert len(made) == n
    for question in made:
        assert question.question == f"Find {question.options[question.gold]}!"
        assert len(set(question.options)) == options and set(question.options) <= set(WORDS)
    counts = Counter(question.gold for question in made)
    assert max(counts.values()) - min(counts[place] for place in range(options)) <= 1


def test_a_seed_is_a_set():
    one, again, other = (synthetic(SyntheticRecipe(n=20, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other
