"""Checkpoints: what comes back is bit for bit what went in, and damage is found before it is used."""

import errno
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from espalier import files
from espalier.errors import ResourceError, RunError
from espalier.train import checkpoint
from espalier.train.checkpoint import Progress, Saver, list_steps, load, newest
from espalier.train.loop import State, train, update
from espalier.train.objectives import NextToken
from espalier.train.optim import Optimizer

MUTATIONS = 40

next_token = NextToken()


def noisy(model, *inputs):
    """An objective that draws random numbers, as dropout would."""
    return next_token(model, *inputs) * (0.5 + torch.rand(()))


@pytest.fixture
def keep(tmp_path):
    """Save a state below tmp_path."""

    def keep(state: State, keep: int = 2, need_bytes: int = 0, tokenizer=None, **more):
        saver = Saver(tmp_path, tokenizer=tokenizer, keep=keep, **more)
        saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=need_bytes)
        saver.finish()
        return tmp_path / f"checkpoint-{state.progress.step}"

    return keep


@pytest.fixture
def resume(begin, device, optimizer_recipe):
    """The state that a checkpoint holds, as a new process takes it up."""

    def resume(path) -> State:
        blank = begin(optimizer_recipe)
        model, moments, progress = load(path, device)
        parametrization = begin.__globals__["MUP"]
        optimizer = Optimizer(model, blank.spec, optimizer_recipe, parametrization)
        optimizer.load_state(moments)
        return State(blank.spec, model, optimizer, progress)

    return resume


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_resumed_run_ends_with_the_bits_of_one_without_a_break(
    begin, resume, keep, stream, segment, device, meter, weights, same, optimizer_recipe, at
):
    torch.manual_seed(5)
    without_break = begin(optimizer_recipe)
    train(without_break, stream, segment(8), noisy, device, meter)
    random_after = torch.get_rng_state()

    torch.manual_seed(5)
    broken_off = begin(optimizer_recipe)
    train(broken_off, stream, segment(at), noisy, device, meter)
    path = keep(broken_off)
    torch.manual_seed(99)
    resumed = resume(path)
    assert resumed.progress == broken_off.progress
    train(resumed, stream, segment(8), noisy, device, meter)

    assert same(weights(resumed), weights(without_break))
    assert resumed.progress == without_break.progress
    assert torch.equal(torch.get_rng_state(), random_after)


def test_saving_changes_nothing(begin, keep, weights, same):
    state = begin()
    torch.manual_seed(0)
    before, random_before, numpy_before = weights(state), torch.get_rng_state(), np.random.get_state()[1].tolist()
    keep(state)
    assert same(weights(state), before)
    assert torch.equal(torch.get_rng_state(), random_before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_a_checkpoint_is_a_model_folder_with_a_tokenizer_and_no_pickle(begin, keep, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    state = begin()
    state.progress = Progress(step=3)
    path = keep(state, tokenizer=tokenizer)
    opened = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in state.model.state_dict().items())
    assert (path / "tokenizer.json").read_text() == "{}"
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".json", ".safetensors"}


@pytest.fixture
def two_checkpoints(begin, keep, stream, segment, device, meter, tmp_path):
    """checkpoint-2 and checkpoint-4, in this order."""
    state = begin()
    for step in (2, 4):
        train(state, stream, segment(step), next_token, device, meter)
        keep(state)
    return tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"


def test_a_flipped_bit_anywhere_is_found_and_the_step_before_is_used(two_checkpoints, tmp_path, told):
    older, newer = two_checkpoints
    chosen = random.Random(0)
    every_file = sorted(path for path in newer.rglob("*") if path.is_file())
    assert newest(tmp_path, told.append) == newer and not told
    for number in range(MUTATIONS):
        file = every_file[number % len(every_file)]
        content = file.read_bytes()
        place, bit = chosen.randrange(len(content)), 1 << chosen.randrange(8)
        file.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        assert newest(tmp_path, told.append) == older, f"{file.name}: bit {bit} of byte {place}"
        assert "Ignored checkpoint-4" in told[-1] and "Using checkpoint-2" in told[-1]
        file.write_bytes(content)
    assert newest(tmp_path, told.append) == newer and len(told) == MUTATIONS


@pytest.mark.parametrize(
    "key, value",
    [("bytes", None), ("sha256", None), ("bytes", "1"), ("sha256", 5)],
    ids=["no size", "no hash", "s", "h"],
)
def test_a_manifest_that_lost_a_key_is_damage(two_checkpoints, tmp_path, told, key, value):
    older, newer = two_checkpoints
    manifest = json.loads((newer / files.MANIFEST).read_text())
    entry = manifest["files"]["config.json"]
    del entry[key]
    if value is not None:
        entry[key] = value
    files.write_json(newer / files.MANIFEST, manifest)
    assert newest(tmp_path, told.append) == older


@pytest.mark.parametrize("content", ["[]", "null", '{"files": []}', '{"files": {"config.json": 3}}', "", "{"])
def test_a_manifest_of_another_form_is_damage(two_checkpoints, tmp_path, told, content):
    older, newer = two_checkpoints
    (newer / files.MANIFEST).write_text(content)
    assert newest(tmp_path, told.append) == older


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "trainer/optimizer.safetensors"])
@pytest.mark.parametrize("how", ["missing", "cut", "longer"])
def test_a_file_that_is_missing_cut_or_longer_is_found(two_checkpoints, tmp_path, told, name, how):
    older, newer = two_checkpoints
    content = (newer / name).read_bytes()
    if how == "missing":
        (newer / name).unlink()
    else:
        (newer / name).write_bytes(content[:-9] if how == "cut" else content + b"\n\0")
    assert newest(tmp_path, told.append) == older
    assert "checkpoint-4" in told[0]


def test_when_every_checkpoint_is_damaged_none_is_used(two_checkpoints, tmp_path, told):
    for path in two_checkpoints:
        (path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"checkpoint-4/config.json.*checkpoint-2/config.json"):
        newest(tmp_path, told.append)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path, told):
    (tmp_path / "checkpoint-old").mkdir()
    assert newest(tmp_path, told.append) is None and list_steps(tmp_path) == []


@pytest.mark.parametrize("count", [1, 2, 3])
def test_only_the_newest_are_kept(begin, keep, tmp_path, count):
    state = begin()
    for step in (1, 2, 3, 10, 20):
        state.progress = Progress(step=step)
        keep(state, keep=count)
    assert list_steps(tmp_path) == [20, 10, 3][:count]
    assert all(files.damage(tmp_path / f"checkpoint-{step}") is None for step in list_steps(tmp_path))


def test_a_damaged_future_does_not_push_out_what_is_saved_now(begin, keep, two_checkpoints, tmp_path, told):
    (two_checkpoints[1] / "config.json").write_text("{}")
    state = begin()
    state.progress = Progress(step=3)
    keep(state, keep=1)
    assert newest(tmp_path, told.append) == tmp_path / "checkpoint-3"


def test_a_step_that_is_saved_again_replaces_the_old(begin, keep, device, tmp_path):
    for seed in (0, 1):
        state = begin(seed=seed)
        keep(state)
    loaded = load(tmp_path / "checkpoint-0", device)[0].state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.model.state_dict().items())


def test_a_disk_that_will_be_full_is_refused_before_anything_is_written(begin, keep, two_checkpoints, tmp_path, told):
    state = begin()
    state.progress = Progress(step=9)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ResourceError, match=r"full disk .* free") as refusal:
        keep(state, need_bytes=2 * free)
    assert refusal.value.exit_code == 6
    assert newest(tmp_path, told.append) == two_checkpoints[1]
    assert not list(tmp_path.glob(f"{files.PARTIAL}*"))


def test_a_disk_that_fills_while_writing_leaves_the_last_checkpoint(
    begin, keep, two_checkpoints, tmp_path, told, monkeypatch
):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    state = begin()
    state.progress = Progress(step=9)
    with pytest.raises(ResourceError, match="full disk"):
        keep(state)
    assert list_steps(tmp_path) == [4, 2]
    assert newest(tmp_path, told.append) == two_checkpoints[1]
    assert not list(tmp_path.glob(f"{files.PARTIAL}*"))


def test_every_so_many_steps_one_stays(begin, tmp_path):
    saver, state = Saver(tmp_path, tokenizer=None, keep=2, every=4), begin()
    for step in range(1, 11):
        state.progress = Progress(step=step)
        saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
    assert list_steps(tmp_path) == [10, 9, 8, 4]


def test_what_is_written_beside_the_training_is_the_state_as_it_was(
    begin, device, stream, segment, same, weights, tmp_path
):
    state = begin()
    train_on = {"stream": stream, "segment": segment(3), "objective": next_token, "device": device}
    before = weights(state)
    saver = Saver(tmp_path, tokenizer=None, keep=2, when="beside")
    saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
    update(state, **train_on)
    assert not same(weights(state), before)
    saver.finish()
    assert same(dict(load(tmp_path / "checkpoint-0", device)[0].named_parameters()), before)


def test_a_disk_that_fills_beside_the_training_is_told_at_the_next_step(begin, tmp_path, monkeypatch):
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "full")

    state, saver = begin(), Saver(tmp_path, tokenizer=None, keep=2, when="beside")
    monkeypatch.setattr(checkpoint.shards, "write_tensors", full)
    saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
    with pytest.raises(ResourceError, match="full disk"):
        for _ in range(100):
            saver.poll()
            time.sleep(0.05)
    assert not list(tmp_path.iterdir())


def test_an_error_in_training_is_told_before_a_full_disk_beside_it(begin, tmp_path, monkeypatch):
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "full")

    state = begin()
    monkeypatch.setattr(checkpoint.shards, "write_tensors", full)
    with pytest.raises(ValueError, match="the first"), Saver(tmp_path, tokenizer=None, keep=2, when="beside") as saver:
        saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=0)
        raise ValueError("the first")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_filled_leaves_nothing(begin, keep, tmp_path, monkeypatch):
    def mkdir(path: Path, *arguments: object, real=Path.mkdir, **words: object) -> None:
        if path.name == checkpoint.TRAINER:
            raise OSError(errno.ENOSPC, "full")
        real(path, *arguments, **words)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(ResourceError, match="full disk"):
        keep(begin())
    assert not list(tmp_path.glob(f"{files.PARTIAL}*"))
