"""Run: the folder in which a verb works.

    runs/NAME/recipe.yaml     the resolved recipe
              state.json      whether it runs or how it ended, and the seals of the other records then
              plan.json       what was planned before anything was spent
              changes.jsonl   what its recipe was changed to on the way, key by key
              ledger.jsonl    what it cost, entry by entry
              metrics.jsonl   what was logged, step by step
              checkpoint-N/   resumable states, whole or absent
              stage-N/        the model as a stage left it, where the recipe has it kept
              final/          the model folder
              report.html     the page
              log.txt         everything, tracebacks too

A method is given a Run and works; the run keeps the paper trail: recipe, ledger, signals, made.json.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

from espalier import changes, errors, files, recipe, records, watch
from espalier.errors import RunError, UserError
from espalier.folder import MADE, ModelFolder
from espalier.ledger import Cap, Cost, Entry, Ledger, Rates
from espalier.recipe import Recipe
from espalier.world import SINGLE, World

RECIPE, PLAN, LEDGER, METRICS, STATE, PAGE, RESULTS, LOG = (
    "recipe.yaml",
    "plan.json",
    "ledger.jsonl",
    "metrics.jsonl",
    "state.json",
    "report.html",
    "results.json",
    "log.txt",
)
CHANGES, ORIGIN = "changes.jsonl", "data.json"
SEALED = (RECIPE, PLAN, CHANGES, LEDGER, METRICS, RESULTS, ORIGIN)
LOCK = ".lock"
GLANCE = 0.05  # seconds for which somebody who asks for the status may hold the lock
FINAL = "final"
STAGE = "stage-"  # and its number, from 1
VERSIONED = ("espalier", "torch", "transformers", "tokenizers", "datasets")

log = logging.getLogger("espalier")
log.addHandler(logging.NullHandler())
log.propagate = False  # the terminal is for people; tracebacks go to the run's log


class Run:
    """One run folder, held by one process at a time."""

    def __init__(
        self,
        folder: Path,
        resolved: Recipe,
        *,
        cap: Cap | None = None,
        tell: Callable[[str], None] = print,
        since: float | None = None,
    ) -> None:
        self.folder, self.recipe, self.tell = folder, resolved, tell
        self.rates = Rates()
        self.ledger = Ledger(folder / LEDGER, cap)
        self.energy: Callable[[], float] | None = None
        self._kwh = 0.0
        self._charged_until = time.monotonic() - (time.time() - since if since else 0.0)
        self.world = SINGLE
        self.stop_signal: int | None = None
        self._lock: int | None = None
        self._handler: logging.Handler | None = None

    @classmethod
    def start(
        cls,
        folder: Path,
        resolved: Recipe,
        *,
        cap: Cap | None = None,
        tell: Callable[[str], None] = print,
        since: float | None = None,
        accept: Collection[str] = (),
        world: World = SINGLE,
    ) -> Run:
        """As `take_up`, by the leader of a world; the other ranks follow it."""
        take_up = partial(cls.take_up, folder, resolved, cap=cap, tell=tell, since=since, accept=accept)
        run = world.led(take_up) or Follower(folder, resolved, world.rank)
        run.world = world
        watch.last_word(run.broke_off)
        return run

    @classmethod
    def take_up(
        cls,
        folder: Path,
        resolved: Recipe,
        *,
        cap: Cap | None = None,
        tell: Callable[[str], None] = print,
        since: float | None = None,
        accept: Collection[str] = (),
    ) -> Run:
        """Make the folder, or take up the same recipe's unfinished run; another run's folder is refused.

        `since` (seconds of the epoch) is when the time that the run is charged for began; now, if not stated.
        `accept` names the changed keys of the recipe by which an unfinished run may be computed otherwise from here on.
        """
        with files.disk_errors(folder):
            files.make_folder(folder)
        # A process that was killed before it wrote the recipe may have left its lock.
        there = [path for path in folder.glob("*") if not path.name.startswith((LOCK, files.PARTIAL))]
        if there and not (folder / RECIPE).exists():
            raise RunError(
                str(folder),
                found="a folder with other files",
                expected="a new folder, or one that a run was started in",
                mend="Choose another name=... or runs=FOLDER.",
            )
        run = cls(folder, resolved, cap=cap, tell=tell, since=since)
        run._hold()
        try:
            if (folder / RECIPE).exists():
                require_whole(folder)
                if ended := _why_ended(run.state, _holder(folder)):
                    tell(f"The run before {ended}.")
                run._same_recipe(accept)
            run._sign_lock()
            for name in files.remove_partials(folder):
                tell(f"Removed {name}: it was never finished.")
            if not (folder / RECIPE).exists():
                run._keep_recipe()
        except BaseException:
            run.close()
            raise
        run._log_to_file()
        return run

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def state(self) -> dict[str, Any]:
        """status ('running', 'finished', 'stopped', 'failed') and why."""
        return records.read(self.folder / STATE, {"status": "running"})

    def finish(self, status: str, reason: str = "", **more: Any) -> None:
        """Record how the run ended, and that of its records nothing is missing then."""
        self.flush()
        there = [name for name in SEALED if (self.folder / name).exists()]
        seals = {name: records.last_seal(self.folder / name) for name in there}
        self._write_state(status, reason=reason, seals=seals, **more)

    def broke_off(self, error: Exception) -> None:
        """Record an error that ends this process while its work is stuck: its records may be anywhere."""
        with contextlib.suppress(OSError, UserError):
            self._write_state("failed", reason=str(error), error=_described(error))

    def log_metrics(self, **values: Any) -> None:
        """Append one line to metrics.jsonl; it is safe from a power loss after `flush`."""
        with files.disk_errors(self.folder):
            records.append(self.folder / METRICS, values)

    def flush(self) -> None:
        """Have all that was logged on the disk."""
        if (self.folder / METRICS).exists():
            with files.disk_errors(self.folder):
                files.sync(self.folder / METRICS)
                files.sync(self.folder)

    def rewind_metrics(self, step: int, *, stage: int) -> None:
        """Drop logged lines beyond `step` or of stages after `stage`: that work is about to be done again.

        Lines that can't be read are refused only if they are of what stays.
        """
        path = self.folder / METRICS
        lines: list[dict[str, Any]] = []
        try:
            lines.extend(records.read_lines(path))
        except RunError:
            if not lines or lines[-1]["step"] < step:
                raise
        if path.exists():
            stays = ((line["step"] <= step and line["stage"] <= stage) or "rewound_from" in line for line in lines)
            records.replace_lines(path, itertools.compress(lines, stays))

    def went_on(self, step: int) -> None:
        """Note that what was changed holds from `step` on, or from an earlier one that was gone back to."""
        path = self.folder / CHANGES
        if lines := list(records.read_lines(path)):
            records.replace_lines(path, [{**line, "step": min(step, line.get("step", step))} for line in lines])

    @property
    def uncharged_seconds(self) -> float:
        """Time since the last entry; what a new process needed to get here counts too."""
        return time.monotonic() - self._charged_until

    def charge(self, kind: str, *, tokens: float = 0.0, flops: float = 0.0, usd: float = 0.0, **where: Any) -> Cost:
        """Enter the work stated, and all the time since the last entry, as `kind`: so no second goes uncounted.

        `tokens` are training tokens; evaluation states its FLOPs alone. `usd` is what others bill, besides the time.
        """
        seconds = self.uncharged_seconds
        self._charged_until += seconds
        cost, measured = self.rates.cost(seconds, tokens=tokens, flops=flops), self.rates.measured
        cost = replace(cost, usd=cost.usd + usd)
        if self.energy is not None:
            reading = self.energy()
            kwh, self._kwh = reading - self._kwh, reading
            cost = replace(cost, kwh=kwh, kgco2e=kwh * self.rates.kgco2e_per_kwh)
            measured = (*measured, "kwh")
        with files.disk_errors(self.folder):
            self.ledger.add(Entry(kind, cost, measured=measured, **where))
        return cost

    def affords(self, cost: Cost) -> bool:
        """Whether `cost` more, on top of the time not yet charged, stays within the cap."""
        return self.ledger.allows(self.rates.cost(self.uncharged_seconds) + cost)

    def price(self, rates: Rates, energy: Callable[[], float] | None = None) -> None:
        """Set what a second costs from here on; `energy` reads a real meter in kWh."""
        self.rates, self.energy = rates, energy
        self._kwh = energy() if energy else 0.0

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into `stop_signal`; a second one interrupts at once."""

        heard: list[int] = []  # here: `stop_signal` may be another rank's

        def note(number: int, frame: FrameType | None) -> None:
            heard.append(number)
            if len(heard) > 1:
                raise KeyboardInterrupt
            self.stop_signal = self.stop_signal or number
            self.tell(f"{signal.Signals(number).name}: saving after this step; once more to stop at once.")

        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def made(self, method: str, *, seed: int, parents: tuple[ModelFolder, ...] = (), **more: Any) -> dict[str, Any]:
        """The content of made.json for a model that this run makes."""
        return {
            "method": method,
            "run": self.name,
            "recipe": self.recipe.model_dump(mode="json"),
            "seed": seed,
            "parents": [{"name": p.path.name, "fingerprint": p.fingerprint(), "made": p.made} for p in parents],
            "versions": {name: _version(name) for name in VERSIONED},
            "changes": list(records.read_lines(self.folder / CHANGES)),
            "cost": vars(self.ledger.total),
            **more,
        }

    def write_made(self, folder: Path, made: dict[str, Any]) -> None:
        """Put made.json into a model folder that is still being written."""
        files.write_json(folder / MADE, made)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Let go of the folder; an error goes to log.txt with its traceback and becomes the run's status."""
        if isinstance(error, Exception):
            fault = watch.blamed(error)
            if fault is not error:
                fault.__cause__ = error
            fault.log = self.folder / LOG  # type: ignore[attr-defined]
            with contextlib.suppress(OSError, UserError):  # the first error matters more than a full disk
                self._failed(fault, error)
        try:
            if error is None:
                self.flush()
        finally:
            self.close()

    def _failed(self, fault: Exception, error: Exception) -> None:
        """Keep what the run failed by, unless it had done all it had to, and the `error` by which it ended here."""
        log.error("%s", fault, exc_info=fault)
        if self.state["status"] != "finished":
            self.finish("failed", str(fault) or type(fault).__name__, error=_described(fault))

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                if _text_of(self._lock) == _signature():
                    os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None
        if self._handler is not None:
            log.removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def _hold(self) -> None:
        with files.disk_errors(self.folder):
            self._lock = os.open(self.folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        if not _locks(self._lock, fcntl.LOCK_EX):
            time.sleep(GLANCE)
        if not _locks(self._lock, fcntl.LOCK_EX):
            os.close(self._lock)
            self._lock = None
            raise RunError(
                str(self.folder),
                found="another process at work in it",
                expected="a run that nobody holds",
                mend="Wait for it, stop it, or choose another name=...",
            )

    def _sign_lock(self) -> None:
        """Leave in the lock who holds it, until it lets go."""
        assert self._lock is not None
        with files.disk_errors(self.folder):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, _signature().encode(), 0)

    def _same_recipe(self, accept: Collection[str]) -> None:
        """Refuse another recipe; take over, and record, what an unfinished run may be told anew."""
        saved = stored_recipe(self.folder)
        recorded = list(records.read_lines(self.folder / CHANGES))
        lines = changes.carried_out(recorded, saved)
        moved = changes.between(saved, self.recipe)
        finished = self.state["status"] == "finished"
        differing = moved if finished else changes.since_computed(moved, lines)
        changes.require_allowed(differing, accept, where=str(self.folder), finished=finished)
        if finished:
            if differing:
                self.recipe = recipe.load(type(self.recipe), self.folder / RECIPE)
                self.tell(f"Not taken over, since the run is finished:\n{changes.table(differing)}")
            return
        self._write_state("running")
        lines += [{**vars(change), "time": time.time()} for change in moved]
        if lines != recorded:
            records.replace_lines(self.folder / CHANGES, lines)
        if moved:
            self._keep_recipe()
            records.replace_lines(self.folder / CHANGES, changes.carried_out(lines, stored_recipe(self.folder)))
        if differing:
            self.tell(f"Changed since it was begun:\n{changes.table(differing)}")

    def _keep_recipe(self) -> None:
        records.write_signed(self.folder / RECIPE, recipe.dump(self.recipe))

    def _write_state(self, status: str, **more: Any) -> None:
        records.write(self.folder / STATE, {"status": status, "time": time.time(), **more})

    def _log_to_file(self, rank: int = 0) -> None:
        """Append to log.txt, each line's beginning with the rank but for the leader's."""
        whose = f"rank {rank}: " if rank else ""
        self._handler = logging.FileHandler(self.folder / LOG, encoding="utf-8", delay=True)
        self._handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {whose}%(message)s"))
        log.addHandler(self._handler)
        log.setLevel(logging.INFO)


class Follower(Run):
    """A run as ranks see it that don't lead: what there is one of is the leader's to write, to tell and to count."""

    def __init__(self, folder: Path, resolved: Recipe, rank: int) -> None:
        super().__init__(folder, resolved, tell=_unheard)
        self.ledger = Ledger(folder / os.devnull)
        self._log_to_file(rank)

    def _failed(self, fault: Exception, error: Exception) -> None:
        """Only an error of this rank's own has a traceback that no other rank keeps."""
        if fault is error and not getattr(error, "told_by_leader", False):
            log.error("%s", error, exc_info=error)

    def finish(self, status: str, reason: str = "", **more: Any) -> None:
        pass

    def broke_off(self, error: Exception) -> None:
        pass

    def log_metrics(self, **values: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def rewind_metrics(self, step: int, *, stage: int) -> None:
        pass

    def went_on(self, step: int) -> None:
        pass

    def charge(self, kind: str, *, tokens: float = 0.0, flops: float = 0.0, usd: float = 0.0, **where: Any) -> Cost:
        self._charged_until += self.uncharged_seconds
        return Cost()


def _unheard(text: str) -> None:
    pass


def stored_recipe(folder: Path) -> dict[str, Any]:
    """The keys and values of a run's recipe, unchecked; `RunError` when the file isn't as the run wrote it."""
    records.read_signed(folder / RECIPE)
    return recipe.stored(folder / RECIPE)


def status(folder: Path) -> str:
    """'running', 'finished', 'stopped', 'failed', or 'unfinished' if its process ended without a word."""
    if (said := _said(folder)) == "running" and not _is_held(folder):
        said = _said(folder)  # it may just have come to its end
        return "unfinished" if said == "running" else said
    return said


def _said(folder: Path) -> str:
    return str(records.read(folder / STATE, {"status": "running"})["status"])


def why(folder: Path) -> str:
    """What ended a run that failed or ended without a word, in half a sentence; "" where nothing did."""
    holder = _holder(folder)  # looked at first: one that begins now isn't gone
    return _why_ended(records.read(folder / STATE, {"status": "running"}), "" if _is_held(folder) else holder)


def _why_ended(state: dict[str, Any], held_by: str) -> str:
    """`held_by` says who held the lock and never let go of it."""
    if state["status"] == "failed":
        return f"failed: {state['reason'].removesuffix('.')}"
    return f"ended without a word: {held_by} is gone" if state["status"] == "running" and held_by else ""


def _holder(folder: Path) -> str:
    return (folder / LOCK).read_text(errors="replace") if (folder / LOCK).exists() else ""


def _signature() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _text_of(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace")


def _described(error: Exception) -> dict[str, str]:
    """An error as state.json has it: its class, and the parts of a refusal; `where` names a rank that was at fault."""
    return {**errors.to_json(error), "kind": type(error).__name__}


def require_whole(folder: Path) -> None:
    """Refuse a run whose records aren't those that it ended with; one that didn't come to an end has said nothing."""
    seals = records.read(folder / STATE, {}).get("seals", {})
    for name, seal in seals.items():
        path = folder / name
        found = records.last_seal(path) if path.exists() else None
        if found != seal and records.read(folder / STATE, {}).get("seals", {}) == seals:  # nobody has taken it up now
            raise RunError(
                str(path),
                found="no such file" if found is None else f"another end than it had ({found or 'no seal'})",
                expected=f"all that the run wrote, to its seal {seal}",
                mend="Restore the file, or choose another name=... and run the recipe again.",
            )


def _is_held(folder: Path) -> bool:
    """Whether a process is at work in a run folder."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open() as file:
        return not _locks(file.fileno(), fcntl.LOCK_SH)


def _locks(descriptor: int, how: int) -> bool:
    """Whether the lock could be had, which is kept until the file is closed."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _version(package: str) -> str:
    return importlib.metadata.version(package)
