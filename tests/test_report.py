"""Reports: read back as written, and compared in standard errors."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.report import Report, Row, compare

values = st.floats(-1e6, 1e6)
rows = st.builds(
    Row,
    task=st.text(max_size=5),
    metric=st.sampled_from(["loss", "acc"]),
    value=values,
    stderr=st.none() | st.floats(0, 1e3),
    n=st.none() | st.integers(1, 10**9),
    note=st.text(max_size=5),
)
contexts = st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.text() | st.lists(values), max_size=3)


@given(st.text(), st.lists(rows, max_size=4), contexts)
@settings(deadline=None, max_examples=30)
def test_a_report_reads_back_equal(tmp_path_factory, subject, listed, context):
    path = tmp_path_factory.getbasetemp() / "report.json"
    report = Report(subject, listed, context)
    report.save(path)
    assert Report.load(path) == report


def test_a_value_is_found_by_task_and_metric_and_an_absent_one_is_an_error():
    report = Report("model")
    report.add("held-out", "loss", 2.5, stderr=0.1, n=10)
    report.add("held-out", "bpb", 1.5)
    assert report.value("held-out", "bpb") == 1.5
    assert report.rows[0] == Row("held-out", "loss", 2.5, 0.1, 10)
    with pytest.raises(KeyError, match="model has no acc on held-out"):
        report.value("held-out", "acc")


@given(values, values, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_z_is_the_change_in_standard_errors_of_independent_samples(old, new, old_error, new_error):
    a, b = Report("a", [Row("t", "m", old, old_error)]), Report("b", [Row("t", "m", new, new_error)])
    (forth,), (back,) = compare(a, b), compare(b, a)
    assert forth.change == new - old == -back.change
    assert forth.z == pytest.approx((new - old) / math.sqrt(old_error**2 + new_error**2))
    assert back.z == -forth.z


@pytest.mark.parametrize(("old", "new"), [(None, 0.1), (0.1, None), (None, None), (0.0, 0.0)])
def test_without_standard_errors_there_is_no_z(old, new):
    (found,) = compare(Report("a", [Row("t", "m", 1.0, old)]), Report("b", [Row("t", "m", 2.0, new)]))
    assert found.z is None and found.change == 1.0


def test_a_sample_of_no_variance_is_compared_by_the_other_ones():
    (found,) = compare(Report("a", [Row("t", "m", 1.0, 0.0)]), Report("b", [Row("t", "m", 2.0, 0.5)]))
    assert found.z == 2.0


@given(st.lists(rows, max_size=5), st.lists(rows, max_size=5))
def test_the_rows_that_both_have_are_compared_in_the_new_ones_order(old, new):
    keys = {(row.task, row.metric) for row in old}
    expected = [(row.task, row.metric) for row in new if (row.task, row.metric) in keys]
    assert [(d.task, d.metric) for d in compare(Report("a", old), Report("b", new))] == expected
