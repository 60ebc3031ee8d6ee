"""Exact duplicates."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.data.ops.dedup import unique
from espalier.data.sources import Document


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(["a", "b", "c", " a", "é", "é"])))
def test_the_first_of_each_text_stays_and_the_rest_is_counted(texts):
    dropped = Counter()
    kept = list(unique((Document(text, str(n)) for n, text in enumerate(texts)), dropped))
    assert [document.text for document in kept] == list(dict.fromkeys(texts))
    assert [int(document.origin) for document in kept] == [texts.index(document.text) for document in kept]
    assert dropped["duplicate"] == len(texts) - len(kept)


def test_documents_are_taken_one_at_a_time():
    def endless():
        while True:
            yield Document("a", "")

    assert next(unique(endless(), Counter())).text == "a"
