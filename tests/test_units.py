"""Numbers for people: close to the value, of bounded length, in order, and never a wrong prefix."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier import units
from espalier.ledger import RESOURCES

SECONDS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86_400}
SUFFIXES = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
PREFIXES = {prefix: 1000.0**power for power, prefix in units.PREFIXES.items()}


def number(text: str) -> float:
    return float(text.replace(",", ""))


@given(st.floats(1e-12, 1e12), st.integers(1, 6))
def test_significant_digits_keep_the_value_and_add_no_zeros(value, digits):
    text = units.significant(value, digits)
    assert number(text) == pytest.approx(value, rel=0.5 * 10.0 ** (1 - digits) * 1.001)
    assert "." not in text or text[-1] not in "0."


@given(st.floats(1e-8, 1e32))
def test_si_reads_back_with_one_to_three_digits_before_the_point(value):
    text, unit = units.si(value, "FLOP").split(" ")
    prefix = unit.removesuffix("FLOP")
    assert number(text) * PREFIXES[prefix] == pytest.approx(value, rel=0.0051)
    assert 1 <= number(text) < 1000


@given(st.floats(1e-8, 1e32))
def test_a_negative_amount_is_its_opposite_with_a_sign(value):
    assert units.si(-value, "B") == "-" + units.si(value, "B")
    assert units.money(-value) == "-" + units.money(value)


@given(st.integers(0, 10**15))
def test_a_count_reads_back_and_is_exact_when_small(n):
    match = re.fullmatch(r"([\d.,]+)([kMBT]?)", units.count(n))
    assert match
    read = number(match[1]) * SUFFIXES[match[2]]
    assert read == pytest.approx(n, rel=0.0051)
    assert n >= 10_000 or read == n


@given(st.floats(1e-6, 1e12))
def test_money_reads_back_with_cents_or_two_digits(usd):
    match = re.fullmatch(r"\$([\d.,]+)([kMBT]?)", units.money(usd))
    assert match
    assert number(match[1]) * SUFFIXES[match[2]] == pytest.approx(usd, rel=0.051)
    if usd < 999:
        assert len(match[1].split(".")[1]) >= 2


@given(st.floats(1e-9, 1e10))
def test_a_duration_reads_back_in_at_most_two_units(seconds):
    parts = re.findall(r"([\d.,]+) (\S+)", units.duration(seconds))
    assert 1 <= len(parts) <= 2
    assert sum(number(n) * SECONDS[unit] for n, unit in parts) == pytest.approx(seconds, rel=0.025)


@given(st.floats(60, 1e8))
def test_the_smaller_unit_of_a_duration_never_fills_the_larger(seconds):
    parts = re.findall(r"([\d.,]+) (\S+)", units.duration(seconds))
    limits = {"s": 60, "min": 60, "h": 24, "d": float("inf")}
    assert all(0 < number(n) < limits[unit] for n, unit in parts)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.si(1.2e12, "FLOP"), "1.2 TFLOP"),
        (units.si(999.96, "B"), "1 kB"),
        (units.si(0, "FLOP"), "0 FLOP"),
        (units.count(3_412_992), "3.41M"),
        (units.count(9_999), "9,999"),
        (units.count(999_999), "1M"),
        (units.money(0.0012), "$0.0012"),
        (units.money(0.5), "$0.50"),
        (units.money(1234.4), "$1,234"),
        (units.money(100_000), "$100,000"),
        (units.money(999.996), "$1,000"),
        (units.money(999_900), "$999,900"),
        (units.money(999_999.7), "$1M"),
        (units.money(2.5e6), "$2.5M"),
        (units.money(0), "$0"),
        (units.money(1e-9), "<$0.000001"),
        (units.duration(0), "0 s"),
        (units.duration(0.42), "420 ms"),
        (units.duration(59.97), "1 min"),
        (units.duration(3599.7), "1 h"),
        (units.duration(11_105), "3 h 5 min"),
        (units.duration(86_399), "1 d"),
        (units.amount(0.0502, "kwh"), "50.2 Wh"),
        (units.amount(1.2, "kgco2e"), "1.2 kgCO₂e"),
        (units.amount(2.0213, "nats"), "2.021 nats"),
        (units.amount(0.25, ""), "0.25"),
    ],
)
def test_numbers_are_written_as_the_documentation_says(written, expected):
    assert written == expected


@pytest.mark.parametrize("resource", RESOURCES)
def test_every_resource_of_the_ledger_has_its_own_writing(resource):
    assert resource not in units.amount(1234.0, resource).replace("tokens", "")
    assert units.amount(1234.0, resource) != units.significant(1234.0, 4)
