"""A profile finds the law that times follow, says where it guesses, and prices workloads from token counts."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.budget import inference
from espalier.budget.hardware import Hardware
from espalier.budget.inference import Cell, Query, RuntimeProfile, fit
from espalier.budget.roofline import Roofline, Setting
from espalier.errors import DataError, ResourceError, RunError
from espalier.spec import ModelSpec

PROPERTY = settings(max_examples=40, deadline=None)
MACHINE = Hardware(
    "x", "cuda", 1, {"float32": 1e12, "bfloat16": 4e12}, 10**9, 1e11, 100, 1, 0.4, {}, link_bandwidth=1e10
)
SPEC = ModelSpec(family="llama", vocab_size=1000, hidden_size=128, num_hidden_layers=4, head_dim=32)
PROMPTS, GENERATED = (1, 16, 64, 100), (1, 2, 8, 20)


def law(prompt, generated, *, per_token=2.0, per_context=0.0):
    """Seconds: reading takes a step-like table, then every token its price, with the context that it has."""
    read = 3.0 + 0.1 * (prompt // 10)
    return read + sum(per_token + per_context * (prompt + i) for i in range(1, generated))


def cells(prompts=PROMPTS, generated=GENERATED, **prices):
    return [Cell(Query(p, o), (law(p, o, **prices),)) for p in prompts for o in generated]


@PROPERTY
@given(st.floats(0.01, 10))
def test_a_constant_price_a_token_is_found(per_token):
    found = fit(cells(per_token=per_token), "minimum")
    assert found.token.per_token == pytest.approx(per_token)
    assert found.token.r2 == pytest.approx(1)
    for query in (Query(16, 1), Query(100, 50), Query(1, 2)):
        assert found.seconds(query) == pytest.approx(law(query.prompt, query.generated, per_token=per_token))


@PROPERTY
@given(st.floats(0.1, 10), st.floats(0.01, 1))
def test_a_price_that_grows_with_the_context_is_found_and_the_constant_one_fits_worse(per_token, per_context):
    prices = {"per_token": per_token, "per_context": per_context}
    found = fit(cells(**prices), "minimum")
    assert (found.context.per_token, found.context.per_context) == pytest.approx((per_token, per_context))
    assert found.token.per_context == 0
    assert found.context.r2 == pytest.approx(1)
    assert found.token.r2 < found.context.r2
    assert found.seconds(Query(64, 500), "context") == pytest.approx(law(64, 500, **prices))


def test_the_minimum_is_free_of_what_others_did_and_the_mean_is_not():
    loaded = [replace(cell, seconds=(*cell.seconds, 3 * cell.seconds[0], 1.5 * cell.seconds[0])) for cell in cells()]
    prices = {name: fit(loaded, name).token.per_token for name in inference.SUMMARIES}
    assert prices == pytest.approx({"minimum": 2.0, "median": 3.0, "mean": 11 / 3})


def test_between_the_measured_prompts_the_table_is_linear_and_beyond_them_it_goes_on():
    found = fit(cells(), "minimum")
    first = found.first_token
    assert [first(prompt) for prompt in PROMPTS] == [law(prompt, 1) for prompt in PROMPTS]
    assert first(40) == pytest.approx((first(16) + first(64)) / 2)
    assert first(136) - first(100) == pytest.approx(first(100) - first(64))
    assert [found.covers(Query(prompt, 9)) for prompt in (1, 50, 100, 101)] == [True, True, True, False]
    late = fit(cells(prompts=(16, 64)), "minimum")
    assert late.first_token(3) == late.first_token(16)
    assert not late.covers(Query(3, 1))
    assert fit(cells(prompts=(16,)), "minimum").first_token(999) == law(16, 1)


def test_a_prompt_whose_first_token_was_not_measured_takes_it_from_its_neighbours():
    known = [cell for cell in cells() if cell.query != Query(64, 1)]
    found = fit(known, "minimum")
    assert [prompt for prompt, _ in found.first] == [1, 16, 100]
    assert found.token.per_token == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("generated", [(2, 8), (1,), (1, 2)])
def test_too_few_times_are_refused(generated):
    with pytest.raises(RunError, match="of one token"):
        fit(cells(prompts=(16,), generated=generated), "minimum")


@pytest.fixture
def saved(tmp_path):
    made = RuntimeProfile.of("tiny", SPEC, MACHINE, {"torch": "2"}, cells())
    made.save(tmp_path / inference.PROFILE)
    return made, tmp_path / inference.PROFILE


def test_a_saved_profile_comes_back_the_same(saved):
    made, path = saved
    assert RuntimeProfile.load(path) == made
    assert set(made.fits) == {"minimum", "median", "mean"}
    assert json.loads(path.read_text())["fits"]["minimum"]["token"]["per_token"] == made.fits["minimum"].token.per_token


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": 1}'])
def test_a_file_that_is_no_profile_is_refused(saved, text):
    _, path = saved
    path.write_text(text)
    with pytest.raises(RunError, match=re.escape(str(path))):
        RuntimeProfile.load(path)
    path.unlink()
    with pytest.raises(RunError, match="No such file"):
        RuntimeProfile.load(path)


def test_the_ideal_takes_as_few_devices_as_hold_the_model_and_the_longest_query():
    queries = [Query(10, 5), Query(500, 100), Query(550, 1)]
    needed = sum(Roofline(SPEC, MACHINE, Setting()).memory(500, 100).values())
    for devices in (1, 2, 5):
        machine = replace(MACHINE, memory_bytes=int(needed / devices) + 1)
        assert inference.ideal_setting(SPEC, machine, queries, Setting()).devices == devices
        smaller = replace(MACHINE, memory_bytes=int(needed / devices) - 1)
        assert inference.ideal_setting(SPEC, smaller, queries, Setting()).devices == devices + 1
    alone = replace(MACHINE, memory_bytes=int(needed / 2), link_bandwidth=0.0)
    with pytest.raises(ResourceError, match="no link"):
        inference.ideal_setting(SPEC, alone, queries, Setting())


def test_the_ideal_time_of_a_workload_is_the_sum_of_its_queries():
    queries = [Query(10, 5), Query(30, 7), Query(10, 5)]
    one = Roofline(SPEC, MACHINE, Setting())
    summed = sum(one.generation(query.prompt, query.generated) for query in queries)
    assert inference.ideal_seconds(SPEC, MACHINE, queries, Setting()) == pytest.approx(summed)
    two = Roofline(SPEC, MACHINE.part(2), Setting(devices=2)).generation(10, 5)
    assert inference.ideal_seconds(SPEC, MACHINE, queries[:1], Setting(devices=2)) == pytest.approx(two)


def test_token_counts_are_read_from_csv_and_from_json_lines(tmp_path):
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text("id,prompt_tokens,completion_tokens\nx,12,3\ny,7,1\n")
    lines.write_text(
        '{"prompt_tokens": 12, "completion_tokens": 3, "id": 1}\n{"prompt_tokens": 7, "completion_tokens": 1}\n'
    )
    assert inference.read_queries(table) == inference.read_queries(lines) == [Query(12, 3), Query(7, 1)]


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.csv", "prompt_tokens,completion_tokens\n3,4\n3,0\n", "a.csv:3"),
        ("a.csv", "prompt_tokens,generated\n3,4\n", "a.csv:2"),
        ("a.csv", "prompt_tokens,completion_tokens\n3\n", "a.csv:2"),
        ("a.csv", "", "a.csv"),
        ("a.jsonl", '{"prompt_tokens": 3, "completion_tokens": 4}\n[3, 4]\n', "a.jsonl:2"),
        ("a.jsonl", '{"prompt_tokens": "many", "completion_tokens": 4}\n', "a.jsonl:1"),
        ("a.jsonl", "prompt\n", "a.jsonl"),
    ],
)
def test_a_line_that_is_no_query_is_refused_by_its_number(tmp_path, name, text, where):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as refusal:
        inference.read_queries(tmp_path / name)
    assert refusal.value.where == str(tmp_path / where)
    with pytest.raises(DataError):
        inference.read_queries(tmp_path / "nothing.csv")
