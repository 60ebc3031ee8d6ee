"""What tests share: caches of their own, a tiny corpus and recipe, and `espalier` in processes that start at once."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from hypothesis import settings
from tests.ranks import run_ranks

from espalier import records
from espalier.budget.hardware import Hardware, remember
from espalier.data.pack import Shard, Tokens
from espalier.data.stream import Stream
from espalier.ledger import Cap
from espalier.recipe import Recipe
from espalier.run import METRICS, Run

# Tensors as small as the tests' gain nothing from threads, which only wait for each other. torch isn't imported yet.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes says more about the machine's other users than about the code.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

WORDS = ("def", "return", "import", "class", "self", "value", "print", "list", "index", "name", "for", "while", "open")

# Durations in tokens, one thread: the same steps, bit for bit, on any machine and after any interruption.
RECIPE = {
    "name": "tiny",
    "data": {"held_out": 0.2, "vocab_size": 300, "sequence_length": 16},
    "model": {"head_dim": 16, "max_position_embeddings": 64},
    "stages": [
        {"num_hidden_layers": 1, "hidden_size": 32, "duration": "1280 tokens"},
        {"num_hidden_layers": 2, "hidden_size": 48, "duration": "1280 tokens", "depth": "identity"},
    ],
    "train": {
        "batch_tokens": 64,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "evaluations": 4,
        "eval_tokens": 256,
        "save_steps": 7,
        "torch_compile": "off",
        "bf16": "off",
        "threads": 1,
    },
    "samples": {"prompts": ["def "], "max_new_tokens": 4},
}


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """No test sees the caches of its user or of another test."""
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def stream(tmp_path_factory) -> Stream:
    """Numbers that mostly count upwards: 62 rows of 16 tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    random = np.random.default_rng(0)
    values = (np.arange(1000) % 50 + 250 * (random.random(1000) < 0.1)).astype("<u2")
    (folder / "shard.bin").write_bytes(values.tobytes())
    shard = Shard("shard.bin", len(values), 1, len(values), hashlib.sha256(values.tobytes()).hexdigest())
    tokens = Tokens(folder, "<u2", 0, (shard,), True)
    return Stream(tokens, sequence_length=16, seed=3, attend="row", eos_id=0)


class Flushed:
    """What a power loss would leave, of what is flushed from now on: a file by its size, a folder by what its names
    stand for."""

    def __init__(self) -> None:
        self._safe: dict[int, int | dict[str, int]] = {}
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        """Takes the place of `os.fsync`."""
        self._fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        self._safe[path.stat().st_ino] = self._now(path)

    def content(self, path: Path) -> bool:
        """Whether a file is on the disk as it is, a folder with all its names."""
        now, safe = self._now(path), self._safe.get(path.stat().st_ino)
        if isinstance(now, dict):
            return now.items() <= (safe or {}).items()
        return now == safe

    def name(self, path: Path) -> bool:
        """Whether the name on the disk stands for what it stands for now."""
        return self._safe.get(path.parent.stat().st_ino, {}).get(path.name) == path.stat().st_ino

    def all_below(self, path: Path) -> bool:
        return all(map(self.content, [path, *path.rglob("*")]))

    @staticmethod
    def _now(path: Path) -> int | dict[str, int]:
        if not path.is_dir():
            return path.stat().st_size
        return {entry.name: entry.stat().st_ino for entry in path.iterdir()}


@pytest.fixture
def flushed(monkeypatch) -> Flushed:
    """What is on the disk for good."""
    flushed = Flushed()
    monkeypatch.setattr(os, "fsync", flushed.fsync)
    return flushed


@pytest.fixture
def told() -> list[str]:
    """What a run said."""
    return []


@pytest.fixture
def make_run(tmp_path, told):
    """A run in tmp_path with a cap."""
    runs = []

    def make_run(**cap: float) -> Run:
        runs.append(Run.start(tmp_path / f"run{len(runs)}", Recipe(), cap=Cap(**cap), tell=told.append))
        return runs[-1]

    yield make_run
    for run in runs:
        run.close()


@pytest.fixture(scope="session")
def peak_bytes():
    """The most that a piece of work holds on the CPU beyond what was there before it, by torch's allocator."""
    from torch.profiler import ProfilerActivity, profile

    def peak_bytes(work: Callable[[], object]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiled:
            work()
        events = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(sizes))

    return peak_bytes


@pytest.fixture
def ranks(tmp_path) -> Callable[..., list]:
    """`ranks(2, work)` is what `work(world)`, some JSON, comes to on each of two connected processes."""
    return lambda size, work, **more: run_ranks(size, work, tmp_path, **more)


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """A command that was started."""

    espalier: Espalier
    pid: int
    output: Path

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait while the command runs, a minute at most, until a condition holds."""
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "waited a minute in vain"
            assert psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE, self.wait()
            time.sleep(0.002)

    def wait(self) -> Done:
        code = self.espalier.ask({"wait": self.pid})
        out, err = (self.output.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return Done(code, out, err)


class Espalier:
    """Starts commands in `folder` through the warm interpreter."""

    def __init__(self, server: subprocess.Popen, folder: Path) -> None:
        self.server, self.folder = server, folder
        self._numbers = itertools.count()

    def ask(self, request: dict) -> int:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *arguments: object, file_bytes: int | None = None) -> Command:
        """Start `espalier arguments...`; no file that it writes may be larger than `file_bytes`."""
        output = self.folder / f"command-{next(self._numbers)}"
        request = {"folder": str(self.folder), "output": str(output), "file_bytes": file_bytes}
        return Command(self, self.ask({"start": [str(argument) for argument in arguments], **request}), output)

    def __call__(self, *arguments: object, file_bytes: int | None = None) -> Done:
        return self.start(*arguments, file_bytes=file_bytes).wait()


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory) -> Path:
    """A cache that all commands share; the machine's figures are made up, so that nothing has to be measured."""
    home = tmp_path_factory.mktemp("home")
    made_up = Hardware(
        name="a machine for tests",
        kind="cpu",
        count=2,
        peak_flops={"float32": 1e11, "bfloat16": 1e11},
        memory_bytes=2**33,
        memory_bandwidth=1e10,
        watts=20.0,
        usd_per_hour=0.1,
        kgco2e_per_kwh=0.4,
        sources={},
    )
    remember(made_up, home)
    return home


@pytest.fixture(scope="session")
def warm(shared_home) -> Iterator[subprocess.Popen]:
    """The warm interpreter of warm.py."""
    environment = os.environ | {"ESPALIER_HOME": str(shared_home), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    script = Path(__file__).with_name("warm.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(script)], env=environment, text=True, **pipes) as server:
        yield server
        server.kill()


@pytest.fixture(scope="session")
def espalier_in(warm) -> Callable[[Path], Espalier]:
    """As `espalier`, in another folder."""
    return lambda folder: Espalier(warm, folder)


@pytest.fixture
def espalier(warm, tmp_path) -> Espalier:
    """`espalier("run", recipe)` carries out a command in tmp_path."""
    return Espalier(warm, tmp_path)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of sixty short texts, always the same."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    for number in range(60):
        (folder / f"text{number:02}.txt").write_text(" ".join(words.choices(WORDS, k=80)) + f" {number}\n")
    return folder


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory, corpus) -> Path:
    """The tiny recipe on the corpus."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"data": {**RECIPE["data"], "sources": [str(corpus)]}}))
    return path


@pytest.fixture(scope="session")
def finished(warm, recipe_file, tmp_path_factory) -> Path:
    """The run folder of the tiny recipe, carried out without a break. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("finished")
    done = Espalier(warm, folder)("run", recipe_file)
    assert done.code == 0, done.err
    return folder / "runs" / "tiny"


@pytest.fixture
def copy_of_finished(finished, tmp_path) -> Path:
    """A copy of the finished run, where tmp_path's commands find it."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / "tiny"))


@pytest.fixture
def logged_steps() -> Callable[[Path], int]:
    """The last step that a run has logged, 0 before the first."""

    def logged_steps(run: Path) -> int:
        return max((line["step"] for line in records.read_lines(run / METRICS)), default=0)

    return logged_steps


@pytest.fixture
def browse(tmp_path) -> Callable[[str, str, int], list[str]]:
    """What a script at a page's end says, through the page's title, when a browser has shown the page."""
    if not shutil.which("chromium"):
        pytest.skip("needs a browser")

    def browse(html: str, probe: str, width: int) -> list[str]:
        (tmp_path / "page.html").write_text(html.replace("</body>", probe), encoding="utf-8")
        dom = subprocess.run(
            [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-sync",
                "--disable-background-networking",
                "--disable-component-update",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={width},900",
                "--virtual-time-budget=2000",
                "--dump-dom",
                f"file://{tmp_path / 'page.html'}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        title = re.search(r"<title>(.*?)</title>", dom)
        assert title
        return title[1].split(" | ")

    return browse
