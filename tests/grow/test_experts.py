"""Upcycling keeps the function while experts are alike, and parts them when it's told to."""

import pytest
import torch

from espalier.errors import ModelError
from espalier.folder import ModelFolder
from espalier.grow.experts import FAMILIES, Upcycling, upcycle, upcycle_folder
from espalier.grow.preserve import check, dead_slots
from espalier.model.build import load
from espalier.model.shards import Weights

EXACT = 1e-5


@pytest.fixture(params=[(family, tied) for family in FAMILIES for tied in (True, False)], ids=str)
def dense(request, make_family):
    family, tied = request.param
    return make_family(family, tied)


@pytest.mark.parametrize("shards", [1, 4])
def test_copies_of_the_mlp_compute_what_it_did(dense, shards, input_ids):
    mixture = upcycle(dense, Upcycling(experts=4, per_token=2, shards=shards))
    assert check(dense, mixture, input_ids).relative_difference <= EXACT
    assert sum(weight.numel() for weight in mixture.parameters()) > sum(w.numel() for w in dense.parameters())


def test_every_part_learns(dense, input_ids):
    assert dead_slots(upcycle(dense, Upcycling(experts=4)), input_ids) == []


@pytest.mark.parametrize("settings", [{"noise": 0.1}, {"drop": 0.5}])
def test_experts_can_be_made_to_differ(dense, settings, input_ids):
    mixture = upcycle(dense, Upcycling(experts=4, **settings))
    name = next(name for name, _ in mixture.named_parameters() if name.endswith("down_proj"))
    down = mixture.get_parameter(name)
    copies = upcycle(dense, Upcycling(experts=4)).get_parameter(name)
    assert torch.equal(copies[0], copies[1]) and not torch.equal(down[0], down[1])
    assert check(dense, mixture, input_ids).relative_difference > EXACT
    if "drop" in settings:
        kept = (down == copies).all(dim=1).float().mean(dim=1)
        assert kept.tolist() == pytest.approx([0.5] * 4)


def test_dropped_neurons_are_the_same_in_all_three_projections(dense):
    changed, plain = (upcycle(dense, Upcycling(experts=3, drop=0.25)), upcycle(dense, Upcycling(experts=3)))
    weights = {name: (weight, plain.get_parameter(name)) for name, weight in changed.named_parameters()}
    down = next((new != old).any(dim=1) for name, (new, old) in weights.items() if name.endswith("down_proj"))
    both = next((new != old).any(dim=2) for name, (new, old) in weights.items() if name.endswith("gate_up_proj"))
    gate, up = both.chunk(2, dim=1)
    assert torch.equal(gate, down) and torch.equal(up, down)


def test_upcycling_is_a_function_of_the_seed(dense):
    one, same, other = (upcycle(dense, Upcycling(experts=4, noise=0.1, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def written(parent, out, how, *, finish=lambda folder: None) -> Weights:
    """The files that upcycling a folder gives, in shards of 40 kB."""
    tell = lambda line: pytest.fail(line)  # noqa: E731
    upcycle_folder(ModelFolder.open(parent), out, how, finish=finish, tell=tell, shard_bytes=40_000)
    return Weights.open(ModelFolder.open(out))


@pytest.mark.parametrize("settings", [{}, {"shards": 2, "noise": 0.1, "drop": 0.25}], ids=["exact", "varied"])
def test_folder_to_folder_gives_the_files_that_transformers_would_write(dense, settings, tmp_path):
    how = Upcycling(experts=4, seed=2, **settings)
    dense.bfloat16().save_pretrained(tmp_path / "dense")
    upcycle(load(ModelFolder(tmp_path / "dense"), dtype="auto"), how).save_pretrained(tmp_path / "expected")
    ours, theirs = written(tmp_path / "dense", tmp_path / "ours", how), Weights.open(ModelFolder(tmp_path / "expected"))
    assert set(ours.names) == set(theirs.names)
    for name in ours.names:
        assert ours.dtype(name) == theirs.dtype(name) and torch.equal(ours.read(name), theirs.read(name)), name
    assert ModelFolder(tmp_path / "ours").config == ModelFolder(tmp_path / "expected").config


def test_an_interrupted_mixture_is_taken_up_by_one_with_the_same_settings_alone(make_family, tmp_path):
    make_family("llama", False).save_pretrained(tmp_path / "dense")
    how, other = Upcycling(experts=4), Upcycling(experts=4, seed=1)
    wrote: list[dict[str, int]] = []

    def note(folder):
        wrote.append({path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")})

    def break_off(folder):
        note(folder)
        raise ModelError("here", found="a kill", expected="none", mend="Go on.")

    for successor in (how, other):
        with pytest.raises(ModelError, match="a kill"):
            written(tmp_path / "dense", tmp_path / "out", how, finish=break_off)
        written(tmp_path / "dense", tmp_path / "out", successor, finish=note)
    assert wrote[0] == wrote[1]
    assert wrote[2].keys() == wrote[3].keys() and not wrote[2].items() & wrote[3].items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"experts": 1, "per_token": 2}, "experts_per_token"), ({"experts": 4, "shards": 3}, "shards")],
)
def test_what_can_not_be_split_is_refused(settings, message, make_family):
    with pytest.raises(ModelError, match=message):
        upcycle(make_family("llama", False), Upcycling(**settings))


def test_families_without_a_mixture_are_refused(make_family):
    with pytest.raises(ModelError, match=r"qwen2.*llama, mistral"):
        upcycle(make_family("qwen2", False), Upcycling(experts=4))
