"""Guards: what training does when its numbers go wrong.

Not finite: no update is made of such a loss or gradient, the rows are named, the next batch is taken; three times in a
row and the run stops. A spike: a loss far above the latest ones. PaLM (arXiv 2204.02311) went back to an earlier
checkpoint and passed over the batches around it; only together with that state had they done harm.

How far is told by surprises: what a loss lies above the median of those just before it. The latest surprises, their
median and median deviation, say what is usual, whatever the noise is, and whether the loss falls, stays or rises; one
outlier changes none of these. Gradient norms aren't judged: those of healthy runs lie up to 18 deviations out, even in
their logarithm (bench/2026-11-25-guards).

What is remembered is a plain value, part of a run's progress: a resumed run comes to the same verdicts.
"""

from __future__ import annotations

import math
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from espalier import files
from espalier.data.stream import Batch
from espalier.errors import NumericsError
from espalier.run import Run

if TYPE_CHECKING:
    from espalier.train.checkpoint import Progress

# The losses just before one; the latest surprises, and how many there must be.
BEFORE_IT, WINDOW, FEWEST = 16, 128, 32
# A standard deviation in median deviations, and the least one, as a share of the loss: where losses hardly differ.
NORMAL, LEAST = 1.4826, 0.002
# Updates in a row that aren't finite before the run stops; bundles that are kept.
MOST_BROKEN, KEPT = 3, 3
# How often a run goes back; the batches before and after that of a spike that are passed over with it.
MOST_REWINDS, LEADING, FOLLOWING = 3, 9, 5
BUNDLES = "nonfinite"
SHOWN = 8  # rows in a message


@dataclass(frozen=True)
class Guards:
    """What is remembered from update to update.

    losses     the latest finite ones (nats a token), from the start, a growth or a spike on
    surprises  what each of the latest lay above the median of those before it
    sigmas     how far out the latest loss was, in robust standard deviations; 0 while too little is known
    broken     updates in a row that weren't made, up to now
    rewinds    how often the run went back
    skipped    ranges [begin, end) of samples that are passed over, in order
    """

    losses: tuple[float, ...] = ()
    surprises: tuple[float, ...] = ()
    sigmas: float = 0.0
    broken: int = 0
    rewinds: int = 0
    skipped: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Guards:
        ranges = tuple((begin, end) for begin, end in stored["skipped"])
        lists = {name: tuple(stored[name]) for name in ("losses", "surprises")}
        return cls(**{**stored, **lists, "skipped": ranges})

    def after(self, loss: float, *, finite: bool, limit: float) -> Guards:
        """What is remembered after an update of this loss; further out than `limit` it is a spike."""
        if not finite:
            return replace(self, broken=self.broken + 1, sigmas=0.0)
        known = replace(self, broken=0, sigmas=self._sigmas(loss))
        if known.sigmas > limit:
            return known.anew()
        surprise = [loss - statistics.median(self.losses)] if self.losses else []
        return replace(
            known,
            losses=(*self.losses, loss)[-BEFORE_IT:],
            surprises=(*self.surprises, *surprise)[-WINDOW:],
        )

    def _sigmas(self, loss: float) -> float:
        if len(self.surprises) < FEWEST:
            return 0.0
        usual, middle = statistics.median(self.surprises), statistics.median(self.losses)
        spread = NORMAL * statistics.median(abs(other - usual) for other in self.surprises)
        return (loss - middle - usual) / max(spread, LEAST * max(abs(middle), LEAST))

    def anew(self) -> Guards:
        """With nothing to compare with: losses before a growth don't tell what to expect after it."""
        return replace(self, losses=(), surprises=())

    def back_to(self, earlier: Guards, begin: int, end: int) -> Guards:
        """What a run remembers that went back to `earlier` and passes over samples [begin, end)."""
        skipped = tuple(sorted({*self.skipped, (begin, end)}))
        return replace(earlier, rewinds=self.rewinds + 1, skipped=skipped)

    def next_samples(self, samples: int, count: int) -> int:
        """Where the next `count` samples begin, from `samples` on, none of which is passed over."""
        for begin, end in self.skipped:
            if begin < samples + count and samples < end:
                samples = end
        return samples


@dataclass(frozen=True)
class Broken:
    """An update that wasn't made.

    rows        numbers in the training split, in the batch's order
    batch       those rows
    micro_rows  of a micro-batch
    losses      each micro-batch's share of the loss; they are dealt out to `ranks` in turn
    norms       of each parameter's gradient
    """

    rows: list[int]
    batch: Batch
    micro_rows: int
    losses: list[float]
    norms: dict[str, float]
    ranks: int = 1

    @property
    def what(self) -> str:
        return "gradient" if all(map(math.isfinite, self.losses)) else "loss"

    @property
    def where(self) -> str:
        """The rows that may be at fault, and their rank where it's one of several.

        Those of the micro-batches whose loss isn't finite; all where only gradients aren't.
        """
        spoiled = [number for number, loss in enumerate(self.losses) if not math.isfinite(loss)]
        spoiled = spoiled or list(range(len(self.losses)))
        size = self.micro_rows
        rows = [row for number in spoiled for row in self.rows[number * size : (number + 1) * size]]
        ranks = {number % self.ranks for number in spoiled}
        rank = f"rank {ranks.pop()}, " if self.ranks > 1 and len(ranks) == 1 else ""
        shown = ", ".join(map(str, rows[:SHOWN])) + (", ..." if len(rows) > SHOWN else "")
        return f"{rank}row{'s' if len(rows) > 1 else ''} {shown} of the training split"


def report(run: Run, progress: Progress, broken: Broken) -> None:
    """Say which update wasn't made, and leave what is known in the run; `NumericsError` after several in a row."""
    path = run.folder / BUNDLES / bundle_name(progress)
    run.world.led(lambda: write_bundle(path, progress, broken))
    run.log_metrics(step=progress.step, stage=progress.stage, nonfinite=broken.what, where=broken.where)
    run.tell(f"Non-finite {broken.what} at step {progress.step}, {broken.where}; no update made; bundle at {path}")
    if progress.guards.broken < MOST_BROKEN:
        return
    raise NumericsError(
        f"step {progress.step}, {broken.where}",
        found=f"a {broken.what} that isn't finite, {MOST_BROKEN} times in a row",
        expected="finite numbers",
        mend=f"No update was made; what was saved before is intact. See {path}, or lower optimizer.learning_rate "
        "under another name.",
    )


def require_finite(held_out: float, step: int) -> None:
    """Refuse a model whose held-out loss isn't finite: its weights aren't."""
    if not math.isfinite(held_out):
        raise NumericsError(
            f"step {step}",
            found=f"held-out loss {held_out}",
            expected="a finite number",
            mend="What was saved before is intact. Lower optimizer.learning_rate under another name.",
        )


def bundle_name(progress: Progress) -> str:
    """step-N, or step-N-rewind-K: a run that went back comes to the same steps with other batches."""
    rewinds = progress.guards.rewinds
    return f"step-{progress.step}" + (f"-rewind-{rewinds}" if rewinds else "")


def _order(bundle: Path) -> tuple[int, int]:
    """Bundles as they came: by rewind, then by step."""
    step, _, rewinds = bundle.name.removeprefix("step-").partition("-rewind-")
    return int(rewinds or 0), int(step)


def write_bundle(path: Path, progress: Progress, broken: Broken) -> None:
    """Write bundle.json and batch.safetensors into a folder, and delete all beside it but the newest few."""
    files.remove_partials(path.parent)
    with files.whole_folder(path) as folder:
        arrays = {name: array for name, array in vars(broken.batch).items() if array is not None}
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / "batch.safetensors")
        known = {
            "progress": progress.counts,
            "rows": broken.rows,
            "losses": [_as_json(loss) for loss in broken.losses],
            "norms": {name: _as_json(norm) for name, norm in broken.norms.items()},
        }
        files.write_json(folder / "bundle.json", known)
    others = sorted((other for other in path.parent.glob("step-*") if other != path), key=_order)
    for other in others[: 1 - KEPT]:
        shutil.rmtree(other)


def _as_json(number: float) -> float | str:
    """JSON has no word for numbers that aren't finite."""
    return number if math.isfinite(number) else str(number)
