"""The model card: what the Hub reads of it is what the report and made.json say."""

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from espalier.card import model_card
from espalier.ledger import RESOURCES, Cost
from espalier.report import Report, Row
from espalier.spec import ModelSpec

SPEC = ModelSpec(vocab_size=8, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
words = st.text("abc: #'\"-é[]{}0", min_size=1, max_size=8).filter(str.strip)
rows = st.builds(
    Row,
    task=words,
    metric=st.sampled_from(["loss", "bpb"]),
    value=st.floats(-1e3, 1e3),
    stderr=st.none() | st.floats(0, 9),
    n=st.none() | st.integers(1, 10**6),
)


FREE = Cost()


def card(results: Report, cost: Cost = FREE, **made) -> str:
    made = {"method": "pretrain", "seed": 5, "versions": {"espalier": "9.9"}, "cost": vars(cost), **made}
    return model_card("model", SPEC.family, SPEC, 1_234_567, made, results)


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@given(st.lists(rows, max_size=4))
def test_the_hub_reads_every_result(listed):
    text = card(Report("model", listed))
    read = ModelCard(text, ignore_metadata_errors=False).data
    results = read.eval_results or []
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in results] == [
        (row.task, row.metric, row.value) for row in listed
    ]
    assert read.library_name == "transformers" and "granite" in read.tags


@given(st.lists(rows, max_size=4))
def test_people_read_every_result(listed):
    table = card(Report("model", listed)).partition("## What it can do")[2]
    for row in listed:
        assert f"| {row.task} | {row.metric} | {row.value:.4f}" in table
        assert not row.stderr or f"± {row.stderr:.4f}" in table


@given(st.floats(0, 1e6))
def test_emissions_are_in_grams_and_say_where_they_come_from(kgco2e):
    cost = Cost(**dict.fromkeys(RESOURCES, kgco2e))
    told = front(card(Report("model"), cost))["co2_eq_emissions"]
    assert told["emissions"] == pytest.approx(kgco2e * 1000, abs=1e-6)
    assert told["source"].startswith("estimated") and told["hardware_used"] == "unknown"
    metered = front(card(Report("model"), cost, measured=["seconds", "kwh"], hardware="Abacus"))["co2_eq_emissions"]
    assert metered["source"].startswith("measured") and metered["hardware_used"] == "Abacus"


def test_the_text_names_shape_seed_method_and_version():
    text = card(Report("model"), Cost(seconds=120, usd=1.5))
    for told in ("3 layers", "hidden size 64", "1.23M", "seed 5", "`pretrain`", "9.9", "2 min", "$1.50"):
        assert told in text
