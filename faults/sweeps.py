"""Sweeps over every file call of every writer: killed there, or told by the disk that it can't (FAULTS F2, F4)."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from espalier import files
from espalier.budget import memory
from espalier.errors import UserError
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train import checkpoint
from espalier.train.device import Device
from faults import calls
from faults.calls import End, Fault
from faults.sheet import Row
from faults.small import Setting, fresh, save, silent
from faults.writers import Writer, writers

MOST_SECONDS = 5.0
SHOWN = 3
HEADS = {"head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
AGAIN = 0.3  # the share of trials after which the writer is called again


@dataclass
class Count:
    """What came of trials, and the first few that went wrong."""

    trials: int = 0
    possible: int = 0
    again: int = 0
    refused: int = 0
    slowest: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def figure(self, what: str) -> str:
        return f"{len(self.wrong)} {what}"

    def trials_of(self) -> dict[str, Any]:
        return {"trials": self.trials, "of": self.possible}

    def why(self) -> str:
        return "; ".join(self.wrong[:SHOWN])


def kills(setting: Setting) -> list[Row]:
    """Killed at every file call of every writer, a write cut in half too; then done again, sometimes killed again."""
    count, kinds = Count(), writers(setting.small)
    for writer in kinds:
        for fault in ("kill", "torn"):
            _sweep(setting, writer, fault, count)
    tried = (
        f"SIGKILL at file calls of {len(kinds)} writers, and in the middle of writes: {count.trials} of "
        f"{count.possible} places; {count.again} second kills in the recovery"
    )
    wanted = "0 losses of the last good state; done again, the same end"
    return [Row("G1", tried, count.figure("losses"), wanted, not count.wrong, count.why(), **count.trials_of())]


def disk_errors(setting: Setting) -> list[Row]:
    """The disk is full, or fails, at every file call of every writer."""
    rows = []
    for fault in ("ENOSPC", "EIO"):
        count, kinds = Count(), writers(setting.small)
        for writer in kinds:
            _sweep(setting, writer, fault, count)
        tried = (
            f"{fault} from file calls of {len(kinds)} writers: {count.trials} of {count.possible} places, "
            f"{count.refused} refused"
        )
        wanted = f"0 damaged older files, ResourceError, done again the same end; exit <= {MOST_SECONDS:g} s"
        reached = not count.wrong and count.slowest <= MOST_SECONDS
        took = f"slowest {count.slowest:.1f} s"
        rows.append(
            Row("G1", tried, count.figure("wrong"), wanted, reached, count.why(), **count.trials_of(), took=took)
        )
    return [*rows, *_limited(setting), *_estimate(setting)]


def _sweep(setting: Setting, writer: Writer, fault: Fault, count: Count) -> None:
    """One writer, one fault, at each of its calls."""
    prepared = setting.folder("prepared")
    writer.before(prepared)
    before = _outcome(writer, prepared)
    calm = fresh(prepared, setting.place / "calm-write")
    whole = calls.watch(partial(writer.write, calm), calm)
    assert whole.error is None, whole.error
    after, dice = _outcome(writer, calm), setting.dice(f"{writer.name} {fault}")
    numbers = [n for n, call in enumerate(whole.calls, start=1) if fault != "torn" or call.name == "write"]
    count.possible += len(numbers)
    for number in setting.some(numbers):
        trial = fresh(prepared, setting.place / "trial")
        end = setting.seen(calls.watch(partial(writer.write, trial), trial, at=number, fault=fault))
        count.trials += 1
        count.slowest = max(count.slowest, end.seconds)
        count.refused += end.error is not None
        where = f"{writer.name}, {fault} at call {number} ({whole.calls[number - 1].name})"
        count.wrong += [f"{where}: {fault_found}" for fault_found in _faults(writer, trial, end, before, after, fault)]
        if dice.random() > AGAIN:
            continue
        if fault == "kill" and dice.random() < 0.5:
            count.again += 1
            calls.watch(partial(writer.write, trial), trial, at=dice.randint(1, len(whole.calls)))
        again = calls.forked(partial(_recover, writer, trial))
        if again.error:
            count.wrong.append(f"{where}: done again, {_said(again)}")
        elif _outcome(writer, trial) != after:
            count.wrong.append(f"{where}: done again, another end")
        elif left := _left_behind(trial):
            count.wrong.append(f"{where}: left behind {left}")


def _faults(writer: Writer, place: Path, end: End, before: Any, after: Any, fault: Fault) -> Iterator[str]:
    """What is wrong right after a fault."""
    outcome = _outcome(writer, place)
    if not ((writer.between and not str(outcome).startswith("damaged")) or outcome in (before, after)):
        yield f"neither the old state nor the new one ({str(outcome)[:200]})"
    if fault in ("kill", "torn"):
        return
    if end.error and end.error.get("kind") != "ResourceError":
        yield _said(end)
    elif not end.error and outcome != after:
        yield "no word of the error, and not the new state"


def _outcome(writer: Writer, place: Path) -> Any:
    """What a user sees, in another process's copy of nothing: damage is an outcome too."""
    try:
        return writer.outcome(place)
    except Exception as error:
        return f"damaged: {error}"


def _recover(writer: Writer, place: Path) -> None:
    """What a next process does: the start of a run clears away what was never finished, then it writes."""
    for folder in [place, *(path for path in place.rglob("*") if path.is_dir() and not path.name.startswith("."))]:
        files.remove_partials(folder)
    writer.write(place)


def _left_behind(place: Path) -> list[str]:
    temporary = (files.PARTIAL, files.RETIRED, files.RESUMABLE)
    return sorted(path.name for path in place.rglob("*") if path.name.startswith(temporary))


def _said(end: End) -> str:
    error = end.error or {}
    return error.get("bug", "").strip().splitlines()[-1] if "bug" in error else f"{error.get('kind')}: {error['found']}"


# Limits that the kernel keeps: a small disk, and files that may not grow.


def _limited(setting: Setting) -> list[Row]:
    """Checkpoints onto a real tmpfs that is too small, foreseen and not, and under RLIMIT_FSIZE (short writes)."""
    small = setting.small
    newest = max(checkpoint.list_steps(small.run))
    model, moments, _ = checkpoint.load(small.run / f"checkpoint-{newest}", Device())
    size = _bytes(small.run / f"checkpoint-{newest}")

    def attempt(place: Path, need: int) -> None:
        at = checkpoint.Progress(step=7)
        save(place, model, moments, at, need_bytes=need)

    def older(place: Path) -> None:
        at = checkpoint.Progress(step=3)
        save(place, model, moments, at)

    def on_tmpfs(share: float, need: int) -> Any:
        place = setting.place / "tmpfs"
        _mount_tmpfs(place, int(size * 1.1) + int(size * share))
        older(place)
        return _attempted(partial(attempt, place, need), place)

    def short(limit: int) -> Any:
        place = setting.folder("short")
        older(place)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return _attempted(partial(attempt, place, 0), place)

    sizes = [0.01 * number for number in range(2, 100, 2)]
    largest = max(path.stat().st_size for path in (small.run / f"checkpoint-{newest}").rglob("*"))
    limits = [largest * number // 25 for number in range(1, 25)]
    (setting.place / "tmpfs").mkdir(exist_ok=True)
    disks = [calls.forked(partial(on_tmpfs, share, need)) for share in setting.some(sizes) for need in (0, size)]
    rows = []
    if any(end.error and "Operation not permitted" in end.error.get("bug", "") for end in disks):
        why = "no user namespaces here"
        rows.append(Row("G1", "a real small disk (tmpfs)", "-", "0 damaged", False, why, trials=0, of=2 * len(sizes)))
    else:
        tried = f"a checkpoint onto a tmpfs too small for it: {len(disks)} sizes"
        rows.append(_limited_row(tried, disks, 2 * len(sizes), setting))
    ends = [calls.forked(partial(short, limit)) for limit in setting.some(limits)]
    tried = f"a checkpoint under RLIMIT_FSIZE (short writes): {len(ends)} limits"
    return [*rows, _limited_row(tried, ends, len(limits), setting)]


def _attempted(work: Any, place: Path) -> dict[str, Any]:
    """How a save that can't be done ended: its refusal, and whether the older checkpoint is still the newest."""
    end = calls.End()
    try:
        work()
    except Exception as error:
        lines = error.lines() if isinstance(error, UserError) else [("found", str(error))]
        end.error = {"kind": type(error).__name__, **dict(lines)}
    newest = checkpoint.newest(place, silent)
    return {"error": end.error, "newest": newest and newest.name, "left": _left_behind(place)}


def _limited_row(tried: str, ends: list[End], of: int, setting: Setting) -> Row:
    wrong, fitted = [], 0
    for end in ends:
        told = end.result or {}
        error = told.get("error") or {}
        setting.seen(End(error=error or None))
        if told == {"error": None, "newest": "checkpoint-7", "left": []}:
            fitted += 1  # the disk was large enough after all
        elif error.get("kind") != "ResourceError" or told["newest"] != "checkpoint-3" or told["left"]:
            wrong.append(str(told or end.error)[-300:])
    slowest = max(end.seconds for end in ends)
    figure = f"{len(ends) - fitted} refused, {fitted} saved whole, {len(wrong)} wrong"
    wanted = f"0 wrong: older one newest and whole, ResourceError, nothing left behind; exit <= {MOST_SECONDS:g} s"
    reached = not wrong and slowest <= MOST_SECONDS and fitted < len(ends) / 2
    why, took = "; ".join(wrong[:SHOWN]), f"slowest {slowest:.1f} s"
    return Row("G1", tried, figure, wanted, reached, why, trials=len(ends), of=of, took=took)


def _mount_tmpfs(place: Path, size: int) -> None:
    """Mount a tmpfs at `place`, in a namespace of this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(line)
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _estimate(setting: Setting) -> list[Row]:
    """The space that is asked for before a checkpoint is written, beside what it takes."""
    worst, sizes = 0.0, []
    for hidden, layers in ((128, 4), (128, 16)):
        spec = ModelSpec.stated(
            {"family": "granite", "vocab_size": 2048, "hidden_size": hidden, "num_hidden_layers": layers} | HEADS,
            where="faults",
        )
        model = build.build(spec, Parametrization(), seed=1)
        ratio = _ratio(setting.folder("estimate"), spec, model)
        sizes.append(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters: {ratio - 1:+.1%}")
        worst = max(worst, abs(ratio - 1))
    tried = "the space that a checkpoint is refused for, beside what it takes (muon and adamw)"
    return [Row("G1", tried, "; ".join(sizes), "within 5%", worst <= 0.05, trials=len(sizes), of=len(sizes))]


def _ratio(place: Path, spec: ModelSpec, model: Any) -> float:
    """Bytes asked for by bytes taken; the optimizer that is furthest off."""
    from espalier.train.optim import Optimizer
    from espalier.train.recipe import OptimizerRecipe

    ratios = []
    for name in ("muon", "adamw"):
        recipe = OptimizerRecipe(name=name)
        optimizer = Optimizer(model, spec, recipe, Parametrization())
        for weight in model.parameters():
            weight.grad = weight.detach() * 0 + 1e-3
        optimizer.step()
        need = memory.checkpoint_bytes(spec, recipe.name)
        path = save(place, model, optimizer.state(), checkpoint.Progress(step=1), keep=1)
        ratios.append(need / _bytes(path))
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
