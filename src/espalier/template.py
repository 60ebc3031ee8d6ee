"""Template: a model's chat template, which is a program of the model's author, carried out within bounds.

Its sandbox (jinja2's, as transformers sets it up) keeps it from files, programs and the network, and a single range()
short; it doesn't bound time or memory: nested loops and 10**(10**10) run for years. So it's carried out by a child
process, which the kernel ends when a conversation takes it longer than SECONDS, and which gets MORE_BYTES at most.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from espalier.errors import ModelError, ResourceError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
MORE_BYTES = 2**30  # of address space, beyond what the process has
MAX_TEXT_BYTES = 64 * 2**20
OUT_OF_MEMORY = 3
BEYOND_BOUNDS = (OUT_OF_MEMORY, -signal.SIGALRM)  # exit codes that are the template's fault


class Template:
    """Writes conversations as a folder's chat template says, in a child process that is there until `close`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        self.tokenizer, self._folder = tokenizer, folder
        self._child: BaseProcess | None = None

    def write(self, messages: Sequence[Any], *, prompt: bool) -> str:
        """The conversation as one text; with `prompt`, up to where the model's answer begins.

        `ValueError` in the template's words for a conversation that it refuses, `TypeError` for one that isn't made of
        what JSON has, `ModelError` where the template goes beyond its bounds, `ResourceError` where the child is ended
        from outside, started once more, and ended again.
        """
        asked = json.dumps([messages, prompt]).encode()
        try:
            wrote, text = self._answer(asked)
        except ResourceError:  # perhaps memory was short for a moment
            wrote, text = self._answer(asked)
        if not wrote:
            raise ValueError(text)
        return str(text)

    def _answer(self, asked: bytes) -> tuple[bool, str]:
        """Whether the child wrote the conversation, and the text, or why not; `ResourceError` if others ended it."""
        child = self._child or self._start()
        with contextlib.ExitStack() as unanswered:
            unanswered.callback(self.close)  # or the next question would get this one's answer
            try:
                self._pipe.send_bytes(asked)
                if not self._pipe.poll(2 * SECONDS):  # the child's own bound comes first
                    raise self._without_end()
                wrote, text = json.loads(self._pipe.recv_bytes(MAX_TEXT_BYTES))
            except (EOFError, ConnectionError):
                child.join(SECONDS)
                by_itself = child.exitcode in BEYOND_BOUNDS
                raise (self._without_end() if by_itself else self._ended(child.exitcode)) from None
            except OSError:  # a text that is too long
                raise self._without_end() from None
            unanswered.pop_all()
        return wrote, text

    def close(self) -> None:
        """End the child; the next conversation starts another."""
        if self._child is not None:
            self._pipe.close()
            self._child.kill()
            self._child.join(SECONDS)
            self._child = None

    def _start(self) -> BaseProcess:
        # A fork has what is loaded, and at once. It neither computes nor touches what other threads may hold.
        forking = multiprocessing.get_context("fork")
        self._pipe, theirs = forking.Pipe()
        child = forking.Process(target=_serve, args=(theirs, self.tokenizer), daemon=True)
        child.start()
        self._child = child
        theirs.close()
        return child

    def _ended(self, code: int | None) -> ResourceError:
        how = f"by signal {-code}" if code and code < 0 else f"with exit code {code}"
        return ResourceError(
            f"{self._folder}: chat template",
            found=f"the process that carries it out ended {how}, twice",
            expected="a process that is left to its work",
            mend="See whether the machine ran out of memory (signal 9), and free some.",
        )

    def _without_end(self) -> ModelError:
        return ModelError(
            f"{self._folder}: chat template",
            found=f"a template that takes more than {SECONDS:g} s, {MORE_BYTES / 2**30:g} GiB of memory or "
            f"{MAX_TEXT_BYTES // 2**20} MiB of text for a conversation",
            expected="one that writes its turns one after the other",
            mend="Mend chat_template.jinja, or take it from where the model comes from.",
        )


def _serve(pipe: Connection, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what is asked for until the parent is gone. What takes too long ends this process, even inside a call."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    for number in [int(link.name) for link in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number != pipe.fileno():
            with contextlib.suppress(OSError):  # the listing's own is closed by now
                os.close(number)  # the parent's files, with the locks on them
    _bound_memory()
    try:
        while True:
            messages, prompt = json.loads(pipe.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            pipe.send_bytes(json.dumps(_written(tokenizer, messages, prompt)).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)
    except (EOFError, ConnectionError):
        pass  # the parent has gone


def _written(tokenizer: PreTrainedTokenizerBase, messages: Any, prompt: bool) -> tuple[bool, str]:
    """Whether the template wrote the conversation, and the text, or why not."""
    try:
        return True, str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except MemoryError:
        raise
    except Exception as error:  # templates raise what they like
        return False, str(error) or type(error).__name__


def _bound_memory() -> None:
    """Let this process have little more address space than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = (psutil.Process().memory_info().vms + MORE_BYTES, soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (min(b for b in bounds if b != resource.RLIM_INFINITY), hard))
