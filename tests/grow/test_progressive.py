"""The growth run: what it learned survives each growth and each interruption, on one data order, within the budget."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.budget import flops
from espalier.budget.plan import Plan, plan
from espalier.errors import ModelError
from espalier.grow import apply
from espalier.grow.progressive import GrowthRecipe, Outcome, Setting, grow_run
from espalier.ledger import Cost, Rates
from espalier.run import METRICS, Run, read_lines
from espalier.train import checkpoint, loop
from espalier.train.device import Device
from espalier.train.objectives import NextToken
from espalier.train.validate import validate

VOCABULARY = 300
TOKENS = 64  # of an update
SMALL, LARGE = {"num_hidden_layers": 1, "hidden_size": 32}, {"num_hidden_layers": 2, "hidden_size": 48}


def recipe_of(*stages: dict, steps: int = 6, **more) -> GrowthRecipe:
    """Stages of `steps` updates each, saved every fourth update."""
    duration = f"{steps * TOKENS} tokens"
    return GrowthRecipe(
        model={"head_dim": 16, "max_position_embeddings": 64},
        stages=[{"duration": duration, **stage} for stage in stages],
        train={"per_device_train_batch_size": 4, "logging_steps": 1, "evaluations": 2, "save_steps": 4},
        **more,
    )


def plan_of(recipe: GrowthRecipe) -> Plan:
    return plan(
        [(stage.spec, duration) for stage, duration in zip(recipe.path(VOCABULARY), recipe.durations(), strict=True)],
        rows=4,
        sequence_length=16,
        seconds_per_token=[1e-9] * len(recipe.stages),
        basis="measured",
        rates=Rates(),
        cap=replace(RunCap),
    )


@pytest.fixture
def setting_of(stream, tmp_path):
    """What a growth run works with, in a given run."""
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    byte_lengths = np.ones(VOCABULARY, np.int64)

    def setting_of(run: Run, rows: int = 8, reserve: Cost | None = None) -> Setting:
        def held_out(state):
            more = {"rows": rows, "micro_rows": 4}
            return validate(state.model, stream, byte_lengths, NextToken(), Device(), **more)

        told = {"peak_flops": 1e9, "terminal": False, "objective": NextToken(), "device": Device()}
        return Setting(run, stream, held_out, tokenizer=tokenizer, reserve=reserve or Cost(), **told)

    return setting_of


@pytest.fixture
def carry_out(make_run, setting_of):
    """Carry out a recipe in a new run."""

    def carry_out(recipe: GrowthRecipe, run: Run | None = None) -> Outcome:
        return grow_run(recipe, plan_of(recipe), setting_of(run or make_run()))

    return carry_out
