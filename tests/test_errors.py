"""Refusals: all four parts are told, and scripts can tell the classes apart."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier import errors

KINDS = errors.UserError.__subclasses__()


@given(st.sampled_from(KINDS), st.text(), st.text(), st.text(), st.text())
def test_a_refusal_tells_where_found_expected_and_mend_in_that_order(kind, where, found, expected, mend):
    error = kind(where, found=found, expected=expected, mend=mend)
    parts = [("where", where), ("found", found), ("expected", expected), ("mend", mend)]
    assert error.lines() == parts
    assert pickle.loads(pickle.dumps(error)).lines() == parts, "it comes back from another process"
    place = 0
    for _, text in parts:
        place = str(error).index(text, place) + len(text)


def test_every_class_and_every_early_end_has_an_exit_code_of_its_own():
    codes = [kind.exit_code for kind in KINDS]
    codes += [errors.EXIT_BUDGET_SPENT, errors.EXIT_INTERRUPTED, errors.EXIT_TERMINATED]
    assert len(set(codes)) == len(codes)
    assert not {0, 1} & set(codes), "0 is success, 1 is a bug"


@pytest.mark.parametrize("left_out", ["found", "expected", "mend"])
def test_no_part_can_be_left_out(left_out):
    parts = {"found": "a", "expected": "b", "mend": "c"}
    del parts[left_out]
    with pytest.raises(TypeError):
        errors.UserError("here", **parts)
