"""Hostile artefacts: each is refused by name with the mend, nothing runs and nothing leaves; their clean twins open."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from faults import hostile
from faults.hostile import ARTEFACTS, Artefact, canary, pickled, replaced, text, tried
from transformers import AutoModelForCausalLM

from espalier import folder
from espalier.model import build
from espalier.untrusted import MAX_ROW_BYTES

ROOT = Path(__file__).parents[2]
MAX_PEAK_BYTES = 600 * 2**20


@pytest.fixture(scope="session", autouse=True)
def warm():
    hostile.warm()


@pytest.mark.parametrize("artefact", ARTEFACTS, ids=lambda artefact: f"{artefact.fault} {artefact.name}")
def test_an_artefact_is_refused_or_opened_and_does_nothing_else(artefact):
    told = tried(artefact)
    assert told.seen == []
    assert told.ended == (artefact.error or "opened"), told
    assert told.peak_bytes < MAX_PEAK_BYTES
    if artefact.error:
        assert told.lines.keys() == {"where", "found", "expected", "mend"} and all(told.lines.values())
        assert artefact.says in " ".join(told.lines.values())


def test_there_are_enough_of_them():
    by_fault = {fault: sum(one.fault == fault for one in ARTEFACTS) for fault in ("F20", "F21", "F22", "F23", "clean")}
    assert sum(by_fault[fault] for fault in ("F20", "F21", "F22")) >= 60 and min(by_fault.values()) >= 7, by_fault
    assert len({one.name for one in ARTEFACTS}) == len(ARTEFACTS)


def unguarded(path):
    """What no reader of ours does."""
    import pickle

    return pickle.loads((path / "pytorch_model.bin").read_bytes())


def runs(path):
    import runpy

    return runpy.run_path(str(path))


@pytest.mark.parametrize(
    ("make", "opens", "sees"),
    [
        (replaced("pytorch_model.bin", pickled()), unguarded, ["pickle.find_class", "os.system", "canary"]),
        (replaced("pytorch_model.bin", pickled("exec")), unguarded, ["pickle.find_class", "canary"]),
        (replaced("pytorch_model.bin", pickled("open")), unguarded, ["pickle.find_class", "open", "canary"]),
        (text("code.py", lambda folder: hostile.code(folder).encode()), runs, ["ran", "canary"]),
        (text("x", b""), lambda path: os.system("true"), ["os.system"]),
        (text("x", b""), lambda path: open("/etc/passwd").close(), ["/etc/passwd"]),  # noqa: PTH123
        (text("x", b""), lambda path: (path.parent.parent / hostile.SECRET).read_text(), ["secret"]),
        (text("x", b""), lambda path: __import__("socket").getaddrinfo("localhost", 80), ["getaddrinfo"]),
    ],
)
def test_the_watch_sees_what_an_artefact_may_not_do(make, opens, sees):
    told = tried(Artefact("planted", "F20", make, opens, None))
    assert all(any(word in line for line in told.seen) for word in sees), told


def trusting(name):
    """A loader of transformers or torch as it would be called by who trusts everybody."""
    owner = {"from_pretrained": AutoModelForCausalLM, "load": torch}[name]
    open_all = {
        "from_pretrained": {"trust_remote_code": True, "use_safetensors": None},
        "load": {"weights_only": False},
    }
    real = getattr(owner, name)
    return mock.patch.object(owner, name, lambda path, **settings: real(path, **settings | open_all[name]))


def no_guard(*patches):
    """`load_unopened` in a child in which guards are taken out."""

    def opens(path):
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            hostile.load_unopened(path)

    return opens


@pytest.mark.parametrize(
    ("name", "patches", "sees"),
    [
        (
            "pytorch_model.bin by torch.save",
            lambda: [
                mock.patch.object(build, "Weights"),
                mock.patch.object(build, "_require_layers"),
                trusting("from_pretrained"),
                trusting("load"),
            ],
            "canary",
        ),
        (
            "auto_map, unopened",
            lambda: [mock.patch.object(folder, "require_plain"), trusting("from_pretrained")],
            "canary",
        ),
        (
            "an index that leaves by ..",
            lambda: [mock.patch.object(folder, "leads_outside", lambda name: False)],
            "outside.safetensors",
        ),
    ],
)
def test_without_its_guard_an_artefact_does_harm_that_is_seen(name, patches, sees):
    artefact = next(one for one in ARTEFACTS if one.name == name)
    told = tried(dataclasses.replace(artefact, open=no_guard(*patches())))
    assert any(sees in line for line in told.seen), told


def test_a_reader_that_dies_is_told(tmp_path):
    told = tried(Artefact("planted", "F20", text("x", b""), lambda path: os.kill(os.getpid(), 9), None))
    assert "signal" in told.ended and json.dumps(told.seen) == "[]"
    assert canary(tmp_path / "x") == tmp_path / hostile.CANARY


def test_a_line_far_beyond_the_longest_row_takes_no_more_than_two_of_them():
    # In a process of its own: others' tests have told this one's allocator to keep what is freed.
    program = (
        "from faults import hostile\n"
        "hostile.warm()\n"
        "print(*(hostile.tried(hostile.named(name)).peak_bytes for name in ('a line of 200 MB', 'clean rows')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    long, clean = map(int, done.stdout.split())
    assert clean > 0 and long - clean <= 2 * MAX_ROW_BYTES
