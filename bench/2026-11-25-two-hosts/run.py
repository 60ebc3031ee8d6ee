"""Two hosts train together, one is lost in the middle, and the other goes on alone from the last step.

    sudo python bench/2026-11-25-two-hosts/run.py

Each host is a network namespace with a name of its own, an end of a veth pair and nothing else; both see the same disk.
`espalier launch here --nodes 2` is called on both. Then one is lost: by its processes, which are killed (their
connections break), or by its cable first (no word reaches the other). What the other says and when it ends is noted;
then it is called alone, and what all ranks have read is compared with a run of one process that nobody disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml

from espalier import records
from espalier.run import METRICS, STATE

HERE = Path(__file__).parent
PORT, LOST_AT, PATIENCE = 29511, 120, 240.0
WORDS = ("def", "return", "import", "class", "self", "value", "print", "list", "index", "name", "for", "while", "open")
RECIPE = {
    "data": {"held_out": 0.2, "vocab_size": 300, "sequence_length": 16},
    "model": {"head_dim": 16, "max_position_embeddings": 64},
    "stages": [
        {"num_hidden_layers": 1, "hidden_size": 32, "duration": "12800 tokens"},
        {"num_hidden_layers": 2, "hidden_size": 48, "duration": "12800 tokens", "depth": "identity"},
    ],
    "train": {
        "batch_tokens": 64,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "evaluations": 4,
        "eval_tokens": 256,
        "save_steps": 25,
        "torch_compile": "off",
        "bf16": "off",
        "threads": 1,
    },
    "samples": {"prompts": ["def "], "max_new_tokens": 4},
}
# Every rank notes the rows of each batch: those of all ranks, and its own.
NOTE = """
import json, os, pathlib
if "LOCAL_RANK" in os.environ:
    from espalier.data.stream import Stream
    batch, take = Stream.batch, Stream.take
    def noted(self, start, count, **among):
        own = []
        object.__setattr__(self, "take", lambda rows: own.extend(rows.tolist()) or take(self, rows))
        made = batch(self, start, count, **among)
        object.__delattr__(self, "take")
        line = {"start": start, "all": self.order(start, count).tolist(), "own": own, "ranks": among.get("ranks", 1)}
        with pathlib.Path(os.environ["NOTES"]).open("a") as file:
            file.write(json.dumps(line) + chr(10))
        return made
    Stream.batch = noted
"""


@dataclass(frozen=True)
class Host:
    """A network namespace with a host name, which is also the name of its end of the cable."""

    name: str
    address: str

    def start(self, arguments: list[str], work: Path) -> subprocess.Popen[bytes]:
        """`espalier launch here ARGUMENTS` on this host, told into NAME.log."""
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": self.name,
            "PYTHONPATH": os.pathsep.join([str(work / "note"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "NOTES": str(work / f"{self.name}.rows"),
            "ESPALIER_HOME": str(work / "home"),
            "HF_HUB_OFFLINE": "1",
        }
        here = f"hostname {self.name}; exec {sys.executable} -m espalier launch here --processes 1 " + " ".join(
            arguments
        )
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", here]
        with (work / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(command, env=environment, cwd=work, stdout=log, stderr=log)

    def unplug(self) -> None:
        sh(f"ip -n {self.name} link set {self.name} down")

    def kill(self) -> None:
        """Every process of this host, at once."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def processes(self) -> list[int]:
        return [int(pid) for pid in sh(f"ip netns pids {self.name}").split()]


A, B = Host("host-a", "10.77.0.1"), Host("host-b", "10.77.0.2")


@contextmanager
def hosts() -> Iterator[None]:
    """Both hosts and the cable between them, while the block lasts."""
    names = "".join(f"{host.address} {host.name}\n" for host in (A, B))
    try:
        for host in (A, B):
            sh(f"ip netns add {host.name}")
            sh(f"ip -n {host.name} link set lo up")
            folder = Path("/etc/netns") / host.name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        sh(f"ip link add {A.name} netns {A.name} type veth peer name {B.name} netns {B.name}")
        for host in (A, B):
            sh(f"ip -n {host.name} addr add {host.address}/24 dev {host.name}")
            sh(f"ip -n {host.name} link set {host.name} up")
        yield
    finally:
        for host in (A, B):
            host.kill()
            sh(f"ip netns del {host.name}")
            shutil.rmtree(Path("/etc/netns") / host.name, ignore_errors=True)


def sh(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


def lost(way: str, which: Host, work: Path) -> dict:
    """Lose a host of two, and go on with the other."""
    other = B if which is A else A
    name = f"{way}-{which.name}"
    both = [f"tiny.yaml name={name} --nodes 2 --meet {A.address}:{PORT}"]
    begin = time.monotonic()
    running = {host: host.start(both, work) for host in (A, B)}
    run = work / "runs" / name
    while step_of(run) < LOST_AT:
        assert time.monotonic() < begin + PATIENCE and all(one.poll() is None for one in running.values())
        time.sleep(0.02)
    started = time.monotonic() - begin
    if way == "unplugged":
        which.unplug()
    which.kill()
    killed = time.monotonic()
    if way == "killed":
        time.sleep(1)  # that its connections broke is told before it is cut off
        which.unplug()
    code = running[other].wait(PATIENCE)
    ended = time.monotonic() - killed
    running[which].wait(PATIENCE)
    left = other.processes()
    lines = (work / f"{other.name}.log").read_text(errors="replace").splitlines()
    said = [line.strip() for line in lines if line.split()[:1] in (["where"], ["found"], ["expected"], ["mend"])]
    reached = step_of(run)

    begin = time.monotonic()
    alone = other.start([f"tiny.yaml name={name}"], work).wait(PATIENCE)
    return {
        "way": way,
        "lost": which.name,
        "lost_after_seconds": started,
        "step_reached": reached,
        "other_ended_after_seconds": ended,
        "other_code": code,
        "other_processes_left": len(left),
        "other_said": said[-4:],
        "alone_code": alone,
        "alone_seconds": time.monotonic() - begin,
        "resumed": [line for line in (work / f"{other.name}.log").read_text().splitlines() if "Resumed" in line][-1:],
        **read(run, work, [A, B]),
    }


def undisturbed(work: Path) -> dict:
    """One process, from beginning to end."""
    code = A.start(["tiny.yaml name=undisturbed"], work).wait(PATIENCE)
    assert code == 0, (work / f"{A.name}.log").read_text()
    return read(work / "runs" / "undisturbed", work, [A])


def step_of(run: Path) -> int:
    return max((line["step"] for line in records.read_lines(run / METRICS)), default=0)


def noted(path: Path) -> list[dict]:
    """The whole lines of a host's notes; a kill may have cut the last one short."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def read(run: Path, work: Path, readers: list[Host]) -> dict:
    """What a run came to, and what its ranks have read by their notes, which are used up."""
    updates: dict[int, dict] = {}
    unshared = 0
    notes = [line for host in readers for line in noted(work / f"{host.name}.rows")]
    for line in notes:
        updates.setdefault(line["start"], line)
        parts = [part["own"] for part in notes if part["start"] == line["start"] and part["ranks"] == line["ranks"]]
        rows = [row for part in parts for row in part]
        unshared += set(rows) != set(line["all"]) or any(part["all"] != line["all"] for part in notes_at(notes, line))
    for host in readers:
        (work / f"{host.name}.rows").unlink(missing_ok=True)
    order = [row for start in sorted(updates) for row in updates[start]["all"]]
    losses = {line["step"]: line["loss"] for line in records.read_lines(run / METRICS) if "loss" in line}
    return {
        "status": records.read(run / STATE, {})["status"],
        "updates": len(updates),
        "updates_not_shared_out_whole": unshared,
        "rows_sha256": hashlib.sha256(json.dumps(order).encode()).hexdigest(),
        "losses": [losses[step] for step in sorted(losses)],
    }


def notes_at(notes: list[dict], line: dict) -> list[dict]:
    return [note for note in notes if note["start"] == line["start"]]


def prepare(work: Path) -> None:
    draw = random.Random(0)
    (work / "corpus").mkdir()
    for number in range(60):
        text = " ".join(draw.choices(WORDS, k=400)) + f" {number}\n"
        (work / "corpus" / f"text{number:02}.txt").write_text(text)
    recipe = RECIPE | {"name": "tiny", "data": {**RECIPE["data"], "sources": [str(work / "corpus")]}}
    (work / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    (work / "note").mkdir()
    (work / "note" / "sitecustomize.py").write_text(NOTE)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        with hosts():
            reference = undisturbed(work)
        trials = []
        for way, which in (("killed", B), ("unplugged", B), ("killed", A)):
            with hosts():
                trials.append(lost(way, which, work))
            print(
                json.dumps({key: value for key, value in trials[-1].items() if key != "losses"}, indent=1), flush=True
            )
    for trial in trials:
        pairs = list(zip(trial["losses"], reference["losses"], strict=True))
        trial["same_rows"] = trial["rows_sha256"] == reference["rows_sha256"]
        trial["largest_relative_difference"] = max(abs(a - b) / b for a, b in pairs)
        trial["losses"] = [statistics.mean(trial["losses"][at : at + 20]) for at in range(0, len(pairs), 20)]
    reference["losses"] = [statistics.mean(reference["losses"][at : at + 20]) for at in range(0, len(pairs), 20)]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "load_at_end": psutil.getloadavg(),
        "undisturbed": reference,
        "trials": trials,
    }
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for trial in trials:
        print(trial["way"], trial["lost"], trial["same_rows"], trial["largest_relative_difference"])


if __name__ == "__main__":
    main()
