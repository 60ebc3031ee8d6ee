"""Torchrun: how the processes of a run are started on a machine, and how the run's exit code comes back through it.

To torchrun a process that ends with any code but 0 has failed: it ends the others, starts all again if it may, and
ends with 1 and a traceback. So a rank whose run left a model ends with 0 there. Whoever starts torchrun from here is
told the codes in files, and then a refusal, which no other start would mend, is no failure for torchrun either.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from espalier import errors, files

# Set by torchrun for the processes that it starts.
STARTED = "TORCHELASTIC_RUN_ID"
# The folder in which each rank of a machine leaves its exit code, in a file named by its number there.
TOLD = "ESPALIER_EXIT_CODES"
LEFT_A_MODEL = (errors.EXIT_BUDGET_SPENT, errors.EXIT_INTERRUPTED, errors.EXIT_TERMINATED)
# What another start may mend: what looks like a bug and may be a machine's fault; a rank that is dead or hangs.
MENDABLE = (1, errors.RankError.exit_code)
PORT = 29500


@dataclass(frozen=True)
class Start:
    """What torchrun is asked for on each machine.

    processes  ranks of this machine
    nodes      machines
    meet       HOST:PORT of the machine at which they find each other; None for one by itself
    job        a name that the machines of one attempt share, and no others
    restarts   how often all ranks are started again after one failed
    grace      seconds in which ranks that are told to stop may save
    logs       folder for the output of all ranks but the first of the machine
    """

    processes: int
    nodes: int = 1
    meet: str | None = None
    job: str = "espalier"
    restarts: int = 0
    grace: int = 300
    logs: Path | None = None

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line by which `espalier ARGUMENTS` runs in every process."""
        meet = ["--standalone"] if self.meet is None else ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.meet]
        asked = ["--nnodes", self.nodes, "--nproc-per-node", self.processes, *meet, "--rdzv-id", self.job]
        asked += ["--max-restarts", self.restarts, "--shutdown-timeout", self.grace]
        if self.logs and self.processes > 1:
            others = ",".join(f"{rank}:3" for rank in range(1, self.processes))  # 3: both streams
            asked += ["--log-dir", self.logs, "--redirects", others]
        return [sys.executable, "-m", "torch.distributed.run", *map(str, asked), "-m", "espalier", *arguments]


def carry_out(start: Start, arguments: Sequence[str]) -> int:
    """Run `espalier ARGUMENTS` in every process and pass signals on; the first exit code but 0 of the ranks here."""
    if start.logs:
        with files.disk_errors(start.logs):
            start.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"OMP_NUM_THREADS": str(threads(start.processes)), **os.environ, TOLD: folder}
        # In a session of its own it hears Ctrl-C once, from here, and not from the terminal too.
        with (
            subprocess.Popen(start.command(arguments), env=environment, start_new_session=True) as process,
            _passed_on(process) as passed,
        ):
            code = process.wait()
        told = [int(path.read_text()) for path in sorted(Path(folder).iterdir())]
    # A rank that was told to stop before it could save says nothing, and torchrun says 1.
    stopped = 128 + passed[-1] if passed else code
    silent = stopped if code and len(told) < start.processes else 0
    return next((code for code in told if code), silent)


def ended(code: int) -> int:
    """What a process ends with whose command ended with `code`: that, or under torchrun what torchrun understands."""
    if STARTED not in os.environ:
        return code
    if TOLD not in os.environ:
        return 0 if code in LEFT_A_MODEL else code
    (Path(os.environ[TOLD]) / os.environ["LOCAL_RANK"]).write_text(str(code))
    return code if code in MENDABLE else 0


def threads(processes: int) -> int:
    """Cores of this machine for each of so many processes."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Send the signals that ask this process to stop to another one, while the block lasts; those that were."""
    passed: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        process.send_signal(number)

    stopping = (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(number, pass_on) for number in stopping]
    try:
        yield passed
    finally:
        for number, handler in zip(stopping, old, strict=True):
            signal.signal(number, handler)
