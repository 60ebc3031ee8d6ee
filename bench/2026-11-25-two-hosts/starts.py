"""How long it takes to start the processes of a run: one that is finished, so that nothing but the start is left.

python bench/2026-11-25-two-hosts/starts.py RECIPE RUNS
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from espalier.torchrun import Start

ROUNDS = 3


def main() -> None:
    recipe, runs = sys.argv[1:]
    python, espalier = [sys.executable, "-c"], [sys.executable, "-m", "espalier"]
    finished = [recipe, "--runs", runs]
    commands = {
        "import torch": [*python, "import torch"],
        "import torch.distributed.run": [*python, "import torch.distributed.run"],
        "torchrun, two that print a version": Start(2).command(["--version"]),
        "run": [*espalier, "run", *finished],
        "launch here --processes 1": [*espalier, "launch", "here", *finished, "--processes", "1"],
        "launch here --processes 2": [*espalier, "launch", "here", *finished, "--processes", "2"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begin)
    for name, measured in seconds.items():
        print(f"{statistics.median(measured):.1f} s  {name}")


if __name__ == "__main__":
    main()
