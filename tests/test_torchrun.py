"""Torchrun: its command is one that torchrun reads, and exit codes and signals come through it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from espalier import errors, torchrun
from espalier.cli.app import run_app
from espalier.torchrun import Start


@pytest.fixture
def under_torchrun(monkeypatch, tmp_path):
    """This process is a rank, and whoever started torchrun wants to be told its code."""

    def under_torchrun(*, told: bool, local_rank: int = 0) -> Path:
        monkeypatch.setenv(torchrun.STARTED, "job")
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        if told:
            monkeypatch.setenv(torchrun.TOLD, str(tmp_path))
        return tmp_path / str(local_rank)

    return under_torchrun


CODES = (0, 1, *range(2, 10), 10, 130, 143)


@pytest.mark.parametrize("code", CODES)
def test_a_process_by_itself_keeps_its_code(code):
    assert torchrun.ended(code) == code


@pytest.mark.parametrize("code", CODES)
def test_what_left_a_model_is_success_to_torchrun(under_torchrun, code):
    under_torchrun(told=False)
    assert torchrun.ended(code) == (0 if code in (10, 130, 143) else code)


@pytest.mark.parametrize("code", CODES)
def test_the_code_is_told_and_only_what_a_start_may_mend_has_failed(under_torchrun, code):
    path = under_torchrun(told=True)
    assert torchrun.ended(code) == (code if code in (1, errors.RankError.exit_code) else 0)
    assert path.read_text() == str(code)


def test_torchrun_reads_the_command():
    from torch.distributed.run import config_from_args, parse_args

    start = Start(3, nodes=2, meet="host:1234", job="a b", restarts=4, grace=50, logs=Path("logs"))
    command = start.command(["run", "a.yaml", "--runs", "x y"])
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    config, _, arguments = config_from_args(parse_args(command[3:]))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "host:1234", "a b")
    assert (config.max_restarts, config.shutdown_timeout) == (4, 50)
    assert arguments[-6:] == ["-m", "espalier", "run", "a.yaml", "--runs", "x y"]
    streams = config.logs_specs._redirects
    assert streams.keys() == {1, 2}, "the first rank's output is shown"


@pytest.mark.parametrize(
    "then, code",
    [
        ("sys.exit(7)", 7),
        ("tell(10, 10)", 10),
        ("tell(9, 9); sys.exit(1)", 9),
        ("tell(9); sys.exit(1)", 9),
        ("tell(0, 9); sys.exit(1)", 9),
        ("tell(0, 0); sys.exit(1)", 0),  # torchrun was signalled, and all were done
    ],
)
def test_the_code_that_was_told_is_the_one(monkeypatch, tmp_path, then, code):
    fake(monkeypatch, tmp_path, then)
    assert torchrun.carry_out(Start(2), []) == code


def test_a_rank_that_was_killed_is_not_covered_by_one_that_is_done(monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path, "tell(0); sys.exit(1)")
    assert torchrun.carry_out(Start(2), []) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(tmp_path, number):
    """To torchrun, once, which is in another session; this process waits for it."""
    program = f"""
import sys
from pathlib import Path
from espalier import torchrun
from tests.test_torchrun import fake_command
then = "signal.signal({int(number)}, lambda *_: (tell(143, 143), sys.exit(1))); time.sleep(20)"
torchrun.Start.command = lambda self, arguments: fake_command(Path({str(tmp_path)!r}), then)
sys.exit(torchrun.carry_out(torchrun.Start(2), []))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
    ready, end = tmp_path / "pid", time.monotonic() + 20
    while not (ready.exists() and ready.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    assert os.getsid(int(ready.read_text())) not in (os.getsid(0), process.pid)
    process.send_signal(number)
    assert process.wait(20) == 143


def fake(monkeypatch, folder: Path, then: str) -> None:
    monkeypatch.setattr(Start, "command", lambda self, arguments: fake_command(folder, then))


def fake_command(folder: Path, then: str) -> list[str]:
    """Torchrun's stand-in: `tell(codes)` leaves codes as ranks would; its process is in the file `pid`."""
    program = f"""
import os, pathlib, signal, sys, time
def tell(*codes):
    for rank, code in enumerate(codes):
        pathlib.Path(os.environ[{torchrun.TOLD!r}], str(rank)).write_text(str(code))
{then.replace("time.sleep", f"pathlib.Path({str(folder / 'pid')!r}).write_text(str(os.getpid())); time.sleep")}
"""
    return [sys.executable, "-c", program]


def test_cores_are_shared_out():
    cores = len(os.sched_getaffinity(0))
    assert torchrun.threads(1) == cores and torchrun.threads(10 * cores) == 1


def test_the_command_is_shown_and_bad_recipes_are_refused_before_any_start(recipe_file, tmp_path, capsys):
    arguments = ["launch", "here", str(recipe_file), "--processes", "2", "--runs", str(tmp_path)]
    assert run_app([*arguments, "name=other", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "--nproc-per-node 2" in shown and shown.endswith(f"run {recipe_file} name=other --runs {tmp_path}\n")
    assert run_app([*arguments, "nonsense=1"]) == 2
    assert run_app([*arguments, "--nodes", "2"]) == 2 and "--meet" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
