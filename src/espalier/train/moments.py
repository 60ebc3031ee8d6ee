"""Moments: what happens beside the updates. Logging, held-out loss, checkpoints, the progress bar.

A moment is called after every step with the state and the step; each decides for itself whether it is due.
"""

from __future__ import annotations

from collections.abc import Callable

from rich import progress as rich_progress

from espalier import units, watch
from espalier.budget.plan import Plan
from espalier.ledger import Cost
from espalier.run import Run
from espalier.train.checkpoint import Progress, Saver
from espalier.train.guards import require_finite
from espalier.train.loop import Meter, State, Step
from espalier.train.validate import HeldOut


class Log:
    """A line in metrics.jsonl every `every` steps, under the field's keys; losses are means since the last line, of
    updates that were made.

    peak_flops is the device's matmul peak (FLOP/s) for `mfu`; samples_per_epoch the rows of the training stream.
    """

    def __init__(self, run: Run, *, every: int, learning_rate: float, peak_flops: float, samples_per_epoch: int):
        self.run, self.every, self.learning_rate = run, every, learning_rate
        self.peak_flops, self.samples_per_epoch = peak_flops, samples_per_epoch
        self._steps: list[Step] = []

    def __call__(self, state: State, step: Step) -> None:
        if not step.broken:
            self._steps.append(step)
        if state.progress.step % self.every or not self._steps:
            return
        seconds = sum(s.seconds for s in self._steps)
        flops = sum(s.flops for s in self._steps)
        progress = state.progress
        self.run.log_metrics(
            step=progress.step,
            stage=progress.stage,
            loss=sum(s.loss for s in self._steps) / len(self._steps),
            grad_norm=self._steps[-1].grad_norm,
            learning_rate=self.learning_rate * step.factor,
            epoch=progress.samples / self.samples_per_epoch,
            num_tokens=progress.tokens,
            total_flos=progress.flops,
            tokens_per_sec=sum(s.tokens for s in self._steps) / seconds,
            tflops=flops / seconds / 1e12,
            mfu=flops / seconds / self.peak_flops,
            step_time=seconds / len(self._steps),
            **spending(self.run),
        )
        self._steps = []


class Validate:
    """The held-out loss every `every` steps, logged as eval_loss and val_bpb; the ledger is charged for it."""

    def __init__(
        self, run: Run, meter: Meter, held_out: Callable[[State], HeldOut], *, every: int, flops_per_token: float
    ):
        self.run, self.meter, self.held_out, self.every = run, meter, held_out, every
        self.flops_per_token = flops_per_token
        self._taken: tuple[Progress, HeldOut] | None = None

    def __call__(self, state: State, step: Step) -> None:
        if state.progress.step % self.every == 0:
            self.now(state)

    def now(self, state: State) -> HeldOut:
        """Evaluate and log, whatever the step; once for a state, however often it is asked for.

        `NumericsError` if the loss isn't finite.
        """
        progress = state.progress
        if self._taken and self._taken[0] == progress:
            return self._taken[1]
        self.meter.flush(state)
        watch.at(progress.step, "evaluating", least=watch.DISK)
        result = self.held_out(state)
        watch.beside(progress.step, "after the evaluation")
        require_finite(result.loss, progress.step)
        self._taken = progress, result
        self.run.charge(
            "evaluate", flops=result.tokens * self.flops_per_token, stage=progress.stage, step=progress.step
        )
        self.run.log_metrics(
            step=progress.step,
            stage=progress.stage,
            eval_loss=result.loss,
            eval_stderr=result.stderr,
            val_bpb=result.bpb,
            num_tokens=progress.tokens,
            total_flos=progress.flops,
            **spending(self.run),
        )
        return result


class Save:
    """A checkpoint every `every` steps; the ledger is charged for it.

    need_bytes  of a checkpoint of a state
    """

    def __init__(self, run: Run, meter: Meter, saver: Saver, *, every: int, need_bytes: Callable[[State], int]):
        self.run, self.meter, self.saver, self.every, self.need_bytes = run, meter, saver, every, need_bytes
        self._saved: Progress | None = None

    def __call__(self, state: State, step: Step) -> None:
        if state.progress.step % self.every == 0:
            self._begin(state)
        else:
            self.saver.poll()

    def now(self, state: State) -> None:
        """Save, whatever the step, once for a state, however often it is asked for: it is there afterwards."""
        if self._saved != state.progress:
            self._begin(state)
        self.saver.finish()

    def _begin(self, state: State) -> None:
        self.meter.flush(state)
        need = self.need_bytes(state)
        watch.beside(state.progress.step, "saving", more=watch.moving(need))
        self.run.flush()
        self.saver.begin(state.model, state.optimizer.state(), state.progress, need_bytes=need)
        self._saved = state.progress
        self.run.charge("checkpoint", stage=state.progress.stage, step=state.progress.step)


class Bar:
    """A progress bar on a terminal: stage, loss, time left, money, share of the budget left; else a line a tenth."""

    def __init__(self, run: Run, plan: Callable[[], Plan], *, terminal: bool):
        self.run, self.plan, self.terminal = run, plan, terminal
        self._told = 0
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.TaskProgressColumn(),
            rich_progress.TextColumn("{task.fields[figures]}"),
            transient=True,
            disable=not terminal,
        )
        self._task = self._progress.add_task("training", total=plan().steps, figures="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, state: State, step: Step) -> None:
        progress, plan = state.progress, self.plan()
        steps, stages = plan.steps, len(plan.stages)
        left = (steps - progress.step) * step.seconds
        figures = (
            f"loss {step.loss:.3f} · {units.count(step.tokens / step.seconds)} tok/s · {units.duration(left)} left"
            f" · {units.money(self.run.ledger.total.usd)}"
        )
        share = self.run.ledger.cap.share_spent(self.run.ledger.total)
        if share:
            figures += f" · {1 - share:.0%} of the budget left"
        if self.terminal:
            self._progress.update(
                self._task,
                completed=progress.step,
                total=steps,
                description=f"stage {progress.stage + 1}/{stages}",
                figures=figures,
            )
        elif progress.step * 10 // steps > self._told:
            self._told = progress.step * 10 // steps
            self.run.tell(f"step {progress.step}/{steps} · stage {progress.stage + 1}/{stages} · {figures}")


def spending(run: Run) -> dict[str, float | None]:
    """The ledger's figures for a line of metrics; budget_left is the share of the tightest cap, None without one."""
    total: Cost = run.ledger.total
    share = run.ledger.cap.share_spent(total)
    return {
        "seconds": total.seconds,
        "cost_usd": total.usd,
        "energy_kwh": total.kwh,
        "budget_left": 1 - share if share else None,
    }
