"""A warm interpreter: carries out `espalier` command lines, each in a fork, so that a start takes no seconds.

Reads a request a line from stdin and answers with a line: {"start": [arguments], ...} with the process's id,
{"wait": id} with its exit code (negative: the signal that killed it). Run as a script by the fixtures of conftest.py.
"""

import json
import os
import resource
import signal
import sys

import datasets  # noqa: F401  imported once, here, for every fork
from transformers import GPT2LMHeadModel, GraniteForCausalLM  # noqa: F401

from espalier import pipeline, story  # noqa: F401
from espalier.cli import app, main  # noqa: F401
from espalier.data import pack  # noqa: F401
from espalier.evaluate.audits import readout  # noqa: F401
from espalier.grow import apply, preserve  # noqa: F401
from espalier.infer import sample  # noqa: F401
from espalier.train import checkpoint, moments, objectives, probe  # noqa: F401

LIMIT_SECONDS = 120


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            carry_out(**request)


def carry_out(start: list[str], folder: str, output: str, file_bytes: int | None) -> None:
    """Be the command, as a fresh process would: its own output files, folder and limits."""
    signal.alarm(LIMIT_SECONDS)
    os.chdir(folder)
    for number, name in enumerate(("/dev/null", f"{output}.out", f"{output}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o644), number)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["espalier", *start]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code)  # taking torch and datasets down would cost a second


if __name__ == "__main__":
    serve()
