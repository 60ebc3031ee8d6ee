"""The ledger: sums are exact, a crash costs at most the line that it cut, and a cap is a cap."""

import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import RunError
from espalier.ledger import RESOURCES, Cap, Cost, Entry, Ledger, Rates, read

amounts = st.floats(0, 1e18)
costs = st.builds(Cost, *[amounts] * len(RESOURCES))
caps = st.builds(Cap, *[st.floats(0, 1e18) | st.just(math.inf)] * len(RESOURCES))
entries = st.builds(
    Entry,
    kind=st.sampled_from(["train", "grow", "evaluate", "säge\n"]),
    cost=costs,
    stage=st.none() | st.integers(0, 3),
    step=st.none() | st.integers(0, 10**9),
    measured=st.lists(st.sampled_from(RESOURCES), unique=True).map(tuple),
    time=st.floats(0, 1e10),
)
on_disk = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("ledger") / "ledger.jsonl"


def write(path, added) -> Ledger:
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    for entry in added:
        ledger.add(entry)
    return ledger


@given(entries)
def test_an_entry_reads_back_from_a_flat_object(entry):
    values = entry.to_json()
    assert Entry.from_json(json.loads(json.dumps(values))) == entry
    assert not any(isinstance(value, dict) for value in values.values())


@given(added=st.lists(entries, max_size=5), kind=st.sampled_from(["train", "grow"]), stage=st.integers(0, 3))
@on_disk
def test_totals_are_the_sums_in_memory_and_when_read_again(path, added, kind, stage):
    ledger = write(path, added)
    for seen in (ledger, Ledger(path)):
        assert seen.entries == added
        for name in RESOURCES:
            assert getattr(seen.total, name) == sum(getattr(entry.cost, name) for entry in added)
    chosen = [e.cost for e in added if e.kind == kind and e.stage == stage]
    assert ledger.spent(kind=kind, stage=stage) == sum(chosen, Cost())
    assert ledger.spent() == ledger.total


@given(added=st.lists(entries, min_size=1, max_size=4), later=entries, cut=st.integers(1, 10**4))
@on_disk
def test_a_line_that_was_cut_short_is_left_out_and_the_next_entry_follows_the_whole_ones(path, added, later, cut):
    write(path, added)
    last = len(path.read_bytes().splitlines()[-1]) + 1
    path.write_bytes(path.read_bytes()[: -(1 + cut % last)])
    torn = path.read_bytes()
    assert read(path) == added[:-1]
    assert path.read_bytes() == torn, "reading changes nothing: it may be another process's ledger"
    ledger = Ledger(path)
    ledger.add(later)
    assert read(path) == ledger.entries == [*added[:-1], later]
    assert ledger.total == sum((e.cost for e in ledger.entries), Cost())


@given(added=st.lists(entries, max_size=2), later=entries)
@on_disk
def test_a_write_that_failed_half_way_does_not_spoil_the_next(path, added, later):
    ledger = write(path, added)
    with path.open("ab") as file:
        file.write(b'{"tokens": 1')
    ledger.add(later)
    assert read(path) == ledger.entries == [*added, later]


@pytest.mark.parametrize("line", ["", "{}", "[1]", "7", "null", "\x00", '{"kind": "train"}', "{torn"])
def test_a_line_that_is_no_entry_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    for _ in range(2):
        Ledger(path).add(Entry("train", Cost(seconds=1)))
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(RunError) as refused:
        Ledger(path)
    assert refused.value.where == f"{path}:2"


def test_an_entry_is_on_the_disk_when_it_has_been_added(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    Ledger(tmp_path / "ledger.jsonl").add(Entry("train", Cost(tokens=1.0)))
    assert flushed == [(tmp_path / "ledger.jsonl").stat().st_size, tmp_path.stat().st_size], "the file, and its name"


def test_an_amount_that_is_no_number_is_not_entered(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for amount in (math.nan, math.inf):
        with pytest.raises(ValueError):
            ledger.add(Entry("train", Cost(usd=amount)))
    assert read(ledger.path) == ledger.entries == []


@given(costs, costs, costs)
def test_costs_add_up_in_any_order_and_scale_by_every_resource(a, b, c):
    assert a + b == b + a
    assert a + Cost() == a
    for name in RESOURCES:
        assert math.isclose(getattr((a + b) + c, name), getattr(a + (b + c), name))
        assert getattr(a * 2.5, name) == getattr(a, name) * 2.5


@given(caps, costs)
def test_a_cap_is_exceeded_by_more_than_it_and_by_nothing_else(cap, cost):
    more = [name for name in RESOURCES if getattr(cost, name) > getattr(cap, name)]
    assert cap.exceeded_by(cost) == (more[0] if more else None)
    assert cap.exceeded_by(Cost(**vars(cap))) is None
    assert Cap().exceeded_by(cost) is None


@given(caps, costs)
def test_the_share_spent_is_a_number_and_above_one_only_beyond_the_cap(cap, cost):
    share = cap.share_spent(cost)
    assert share >= 0 and not math.isnan(share)
    assert (share > 1) == (cap.exceeded_by(cost) is not None)
    assert cap.share_spent(Cost()) == Cap().share_spent(cost) == 0


@given(st.sampled_from(RESOURCES), st.floats(1e-3, 1e9), st.floats(0, 5))
def test_the_share_spent_is_the_largest_of_any_resource(name, cap, share):
    cost = Cost(**{name: cap * share})
    assert Cap(**{name: cap}).share_spent(cost) == pytest.approx(share)
    assert Cap(**{**dict.fromkeys(RESOURCES, 1e12), name: cap}).share_spent(cost) == pytest.approx(share)


@given(cap=caps, spent=st.lists(entries, max_size=3), more=costs)
@on_disk
def test_a_ledger_allows_what_stays_within_its_cap_together_with_what_was_spent(path, cap, spent, more):
    write(path, spent)
    ledger = Ledger(path, cap)
    assert ledger.allows(more) == (cap.exceeded_by(ledger.total + more) is None)


@given(st.builds(Rates, *[st.floats(0, 1e5)] * 3), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 100))
def test_the_cost_of_time_is_linear(rates, a, b, factor):
    def close(left, right):
        return all(getattr(left, n) == pytest.approx(getattr(right, n), rel=1e-9, abs=1e-12) for n in RESOURCES)

    assert close(rates.cost(a) + rates.cost(b), rates.cost(a + b))
    assert close(rates.cost(a) * factor, rates.cost(a * factor))
    assert close(rates.cost(a, flops=b, tokens=a), rates.cost(a) + Cost(flops=b, tokens=a))


def test_an_hour_costs_what_the_rates_say():
    cost = Rates(usd_per_hour=2, watts=500, kgco2e_per_kwh=0.4).cost(3600)
    assert (cost.seconds, cost.usd, cost.kwh, cost.kgco2e) == (3600, 2, 0.5, pytest.approx(0.2))
