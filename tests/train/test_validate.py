"""Held-out loss: over the same rows whatever the batches, in two units, with an error that can be relied on."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from espalier.train.objectives import NextToken
from espalier.train.validate import HeldOut, validate

BYTES = np.arange(300) % 5 + 1


@pytest.fixture
def model(begin):
    model = begin().model
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def held_out(stream, device):
    def held_out(model, rows: int = 10, micro_rows: int = 4) -> HeldOut:
        return validate(model, stream, BYTES, NextToken(), device, rows=rows, micro_rows=micro_rows)

    return held_out


def test_the_loss_is_that_of_rows_spread_over_the_split(model, held_out, stream):
    batch = stream.take(stream.spread(10))
    with torch.no_grad():
        logits = model(torch.from_numpy(batch.input_ids)).logits
    labels = torch.from_numpy(batch.labels)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    found = held_out(model)
    assert found.tokens == labels.numel() == 160
    assert found.loss == pytest.approx(losses.mean().item(), rel=1e-5)
    bits = losses.double().sum().item() / math.log(2)
    assert found.bpb == pytest.approx(bits / BYTES[batch.labels].sum(), rel=1e-5)


@pytest.mark.parametrize("micro_rows", [1, 3, 7, 99])
def test_the_loss_does_not_depend_on_the_batches(model, held_out, micro_rows):
    expected = held_out(model, micro_rows=4)
    found = held_out(model, micro_rows=micro_rows)
    assert (found.loss, found.bpb) == pytest.approx((expected.loss, expected.bpb), rel=1e-5)
    assert found.tokens == expected.tokens


def test_more_rows_than_there_are_means_all(model, held_out, stream):
    assert held_out(model, rows=10_000) == held_out(model, rows=stream.rows)


def test_the_error_is_that_of_the_mean_over_rows(model, held_out, stream):
    with torch.no_grad():
        by_row = []
        for row in range(stream.rows):
            batch = stream.take(np.array([row]))
            logits = model(torch.from_numpy(batch.input_ids)).logits[0]
            by_row.append(F.cross_entropy(logits, torch.from_numpy(batch.labels)[0]).item())
    expected = np.std(by_row, ddof=1) / math.sqrt(stream.rows)
    assert held_out(model, rows=stream.rows, micro_rows=1).stderr == pytest.approx(expected, rel=1e-4)


def test_a_last_batch_of_few_rows_does_not_inflate_the_error(model, held_out, stream):
    by_row = held_out(model, rows=stream.rows, micro_rows=1).stderr
    assert stream.rows % 5 and stream.rows % 4
    for micro_rows in (4, 5):
        assert held_out(model, rows=stream.rows, micro_rows=micro_rows).stderr == pytest.approx(by_row, rel=0.5)


def test_evaluating_changes_nothing_and_keeps_no_gradient(model, held_out):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_before = torch.get_rng_state()
    assert held_out(model) == held_out(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_before)
