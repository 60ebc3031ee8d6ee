"""Story: what a run folder has to say, as tables on the terminal and as the page. Reads files only; no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from espalier import page, records, units
from espalier.budget.plan import Plan, StagePlan
from espalier.errors import RunError
from espalier.folder import ModelFolder
from espalier.ledger import Cap, Cost, Ledger
from espalier.report import Report
from espalier.run import CHANGES, FINAL, LEDGER, METRICS, PAGE, PLAN, RECIPE, RESULTS, require_whole, stored_recipe, why
from espalier.spec import ModelSpec

NAMES = {"tokens": "Tokens", "flops": "FLOPs", "seconds": "Time", "usd": "Money", "kwh": "Energy"}


class Story:
    """A run folder's files, read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        require_whole(folder)
        planned = records.read(folder / PLAN, None)
        if planned is None:
            raise RunError(
                str(folder),
                found="no plan.json: the run ended before it was planned",
                expected="a run that has begun to train",
                mend="Run its recipe again.",
            )
        self.plan, self.first = Plan.from_json(planned["plan"]), Plan.from_json(planned["first"])
        self.expected = stored_recipe(folder).get("expected")
        self.device, self.hardware = planned["device"], planned["hardware"]
        self.ledger = Ledger(folder / LEDGER)
        self.metrics = list(records.read_lines(folder / METRICS))
        self.changes = list(records.read_lines(folder / CHANGES))
        self.results = Report.load(folder / RESULTS) if (folder / RESULTS).exists() else None
        final = folder / FINAL
        self.made = ModelFolder(final).made if final.exists() else None
        self.measured = set(self.ledger.entries[-1].measured) if self.ledger.entries else set()

    @property
    def trained(self) -> Cost:
        """What the training steps took, all stages together."""
        return self.ledger.spent(kind="train")

    def basis(self, resource: str) -> Any:
        """Tokens and FLOPs are counted exactly; seconds come from a clock; money never from a meter."""
        exact = resource in ("tokens", "flops") or resource in self.measured
        return "measured" if exact else "estimated"

    def plan_rows(self) -> list[page.PlanRow]:
        trained, total = self.trained, self.ledger.total
        rows = [
            page.PlanRow(f"{NAMES[r]}, training", r, getattr(self.first.total, r), getattr(trained, r), self.basis(r))
            for r in NAMES
        ]
        rows += [
            page.PlanRow(f"{NAMES[r]}, everything", r, None, getattr(total, r), self.basis(r))
            for r in ("flops", "seconds", "usd", "kwh")
        ]
        if self.expected:
            loss = self.results.value("held-out", "loss") if self.results else None
            rows.append(page.PlanRow("Held-out loss", "nats", self.expected["loss"], loss, "measured"))
        return rows

    def alternatives(self) -> list[page.Alternative]:
        grown, scratch = self.trained, self.plan.from_scratch
        note = f"estimated: the same {units.count(self.plan.total.tokens)} tokens at the final size throughout"
        return [
            page.Alternative(name, c.tokens, c.flops, c.seconds, c.usd, c.kwh, text)
            for name, c, text in (("Grown (this run)", grown, "as metered"), ("From scratch", scratch, note))
        ]

    def stages(self) -> list[page.StageRow]:
        rows = []
        for number, stage in enumerate(self.plan.stages):
            spent = self.ledger.spent(kind="train", stage=number)
            losses = [m["eval_loss"] for m in self.metrics if m["stage"] == number and "eval_loss" in m]
            loss = losses[-1] if losses else None
            rows.append(
                page.StageRow(
                    f"Stage {number + 1}",
                    shape(stage.spec),
                    stage.parameters,
                    spent.tokens,
                    spent.flops,
                    spent.seconds,
                    loss,
                )
            )
        return rows

    def growth(self) -> list[page.GrowthPoint]:
        found = []
        for line in self.metrics:
            if "growth" in line:
                before, after = (self.plan.stages[line["stage"] - 1], self.plan.stages[line["stage"]])
                at = self._point(line, line["loss_after"])
                found.append(
                    page.GrowthPoint(
                        grown(before, after),
                        at.tokens,
                        at.flops,
                        at.usd,
                        at.seconds,
                        at.step,
                        line["loss_before"],
                        line["loss_after"],
                    )
                )
        return found

    def curves(self) -> list[page.Curve]:
        train = [self._point(m, m["loss"]) for m in self.metrics if "loss" in m]
        held_out = [self._point(m, m["eval_loss"]) for m in self.metrics if "eval_loss" in m]
        return [page.Curve("training", train, "train"), page.Curve("held out", held_out, "validation")]

    def _point(self, line: dict[str, Any], loss: float) -> page.Point:
        return page.Point(line["num_tokens"], line["total_flos"], line["cost_usd"], line["seconds"], line["step"], loss)

    def headline(self) -> list[page.Figure]:
        trained, scratch, total = self.trained, self.plan.from_scratch, self.ledger.total
        figures = []
        if self.results:
            loss, bpb = (self.results.value("held-out", name) for name in ("loss", "bpb"))
            figures.append(page.Figure("Held-out loss", f"{loss:.3f}", f"nats a token; {bpb:.3f} bits a byte"))
        share = trained.flops / (scratch.flops * trained.tokens / scratch.tokens) if trained.tokens else 0.0
        figures += [
            page.Figure("Cost of the run", units.money(total.usd), "everything in it, estimated from the hour's price"),
            page.Figure("Device time", units.duration(total.seconds), "measured, data and evaluation included"),
            page.Figure("Compute", f"{share:.0%}", "of training the final size from scratch on the same tokens"),
        ]
        return figures

    def lineage(self) -> list[page.Ancestor]:
        stages = self.plan.stages
        line = [page.Ancestor(shape(stages[0].spec), "new weights", f"{units.count(stages[0].parameters)} parameters")]
        for point, stage in zip(self.growth(), stages[1:], strict=False):
            method = f"grown at {units.count(point.tokens)} tokens"
            detail = f"{point.label}; held-out loss {point.loss_before:.3f} → {point.loss_after:.3f}"
            line.append(page.Ancestor(f"{shape(stage.spec)}", method, detail))
        return line

    def view(self) -> page.View:
        seen = self.results.context.get("samples", []) if self.results else []
        device, row = self.device, self.hardware
        return page.View(
            title=self.folder.name,
            subtitle=f"{shape(self.plan.stages[-1].spec)}, grown in {len(self.plan.stages)} stages",
            made_at=time.strftime("%Y-%m-%d %H:%M", time.localtime((self.folder / LEDGER).stat().st_mtime)),
            headline=self.headline(),
            curves=[curve for curve in self.curves() if curve.points],
            growth=self.growth(),
            plan=self.plan_rows(),
            alternatives=self.alternatives(),
            stages=self.stages(),
            samples=[page.Sample(prompt, completion) for prompt, completion in seen],
            lineage=self.lineage(),
            results=self.results.rows if self.results else [],
            recipe=records.read_signed(self.folder / RECIPE),
            machine={
                "device": row["name"],
                "threads": str(device["threads"]),
                "matmuls": device["compute"],
                "compiled": device["compile"],
                "matmul peak": units.si(row["peak_flops"][device["compute"]], "FLOP/s"),
                **(self.made or {}).get("versions", {}),
            },
            notes=list(self.notes()),
        )

    def notes(self) -> Iterator[str]:
        """What figures alone don't say."""
        if self.expected and self.results:
            yield self.against_expectation()
        yield from self.changed()
        if ended := why(self.folder):
            yield f"The run {ended}."
        yield from self.guarded()
        for line in self.metrics:
            if "planned_anew" in line:
                yield (
                    f"At step {line['step']} what was left of the plan became {line['planned_anew']:.2f} x as long, "
                    f"{line['planned_steps']} steps in all: training took {line['pace']:.2f} s for each second planned."
                )
        yield f"Where the time went: {self.where_time_went()}."

    def changed(self) -> Iterator[str]:
        """What the rest of the run was computed by, unlike its beginning."""
        for line in self.changes:
            if line["resume"] == "flag" and "step" in line:
                yield f"After step {line['step']} {line['key']} was {line['now']}, before it {line['saved']}."

    def guarded(self) -> Iterator[str]:
        """What went wrong with the numbers."""
        if broken := [str(line["step"]) for line in self.metrics if "nonfinite" in line]:
            plural = f"{len(broken)} updates were" if len(broken) > 1 else "One update was"
            yield f"{plural} not made, of numbers that weren't finite: step {', '.join(broken)}."
        for line in self.metrics:
            if "rewound_from" in line:
                yield (
                    f"At step {line['rewound_from']} the loss was {line['spike']:.1f} sigma above the latest: the run "
                    f"went back to step {line['step']} and passed over the samples that led there."
                )
            elif "spike" in line:
                yield f"At step {line['step']} the loss was {line['spike']:.1f} sigma above the latest."

    def against_expectation(self) -> str:
        """The loss beside the one that a law expected of the recipe."""
        assert self.expected and self.results
        loss = self.results.value("held-out", "loss")
        expected, low, high = (self.expected[key] for key in ("loss", "low", "high"))
        between = ""
        if low is not None:
            between = f"{'inside' if low <= loss <= high else 'outside'} {low:.3f} to {high:.3f}, "
        return f"Held-out loss {loss:.3f}: {between}{loss - expected:+.3f} from the {expected:.3f} that was planned."

    def where_time_went(self) -> str:
        """What the seconds were spent on, the most first."""
        kinds = {entry.kind for entry in self.ledger.entries}
        seconds = {kind: self.ledger.spent(kind=kind).seconds for kind in kinds}
        return ", ".join(
            f"{kind} {units.duration(seconds[kind])}" for kind in sorted(kinds, key=seconds.__getitem__, reverse=True)
        )


def write_page(folder: Path) -> Path:
    """Write the run's page; its path."""
    page.save(Story(folder).view(), folder / PAGE)
    return folder / PAGE


def tell(folder: Path) -> None:
    """Plan against fact and grown against from scratch, in one table; then the stages and the samples."""
    story = Story(folder)
    console = Console()
    table = Table("training", "planned", "fact", "ratio", "from scratch*", "ratio", box=None, pad_edge=False)
    fact = story.trained
    for name in NAMES:
        planned, actual, scratch = (getattr(c, name) for c in (story.first.total, fact, story.plan.from_scratch))
        table.add_row(
            NAMES[name] + ("" if story.basis(name) == "measured" else "*"),
            units.amount(planned, name),
            units.amount(actual, name),
            f"{actual / planned:.2f}" if planned else "",
            units.amount(scratch, name),
            f"{actual / scratch:.2f}" if scratch else "",
        )
    console.print(table)
    total = story.ledger.total
    console.print("* estimated; from scratch: the same tokens at the final size throughout", style="dim")
    if story.expected and story.results:
        console.print(story.against_expectation(), highlight=False)
    for note in story.guarded():
        console.print(note, highlight=False)
    console.print(f"the whole run: {units.duration(total.seconds)}, {units.money(total.usd)}")
    for row in story.stages():
        loss = f", held-out loss {row.loss:.3f}" if row.loss is not None else ""
        console.print(f"{row.name}: {row.shape}, {units.count(row.parameters)} parameters{loss}", highlight=False)
    for prompt, completion in story.results.context.get("samples", []) if story.results else []:
        console.print(Text.assemble(("sample ", "dim"), (prompt, "bold"), completion))


def tell_plan(plan: Plan, cap: Cap) -> None:
    """The plan, a line a stage, before anything is trained."""
    table = Table("stage", "shape", "parameters", "tokens", "FLOPs", "time", "cost", box=None, pad_edge=False)
    for number, stage in enumerate(plan.stages, start=1):
        table.add_row(
            str(number),
            shape(stage.spec),
            units.count(stage.parameters),
            units.count(stage.cost.tokens),
            units.si(stage.cost.flops, "FLOP"),
            units.duration(stage.cost.seconds),
            units.money(stage.cost.usd),
        )
    console = Console()
    console.print(table)
    share = cap.share_spent(plan.total)
    console.print(f"speeds {plan.basis}" + (f"; {share:.0%} of the budget" if share else ""))


def shape(spec: ModelSpec) -> str:
    """A shape in a few words."""
    layers = spec.num_hidden_layers
    return f"{layers} layer{'' if layers == 1 else 's'} × {spec.hidden_size}"


def grown(before: StagePlan, after: StagePlan) -> str:
    """What a growth changed, in a few words."""
    words = {"num_hidden_layers": "layers", "hidden_size": "wide", "intermediate_size": "feed-forward"}
    changed = [
        f"{getattr(before.spec, key)} → {getattr(after.spec, key)} {word}"
        for key, word in words.items()
        if getattr(before.spec, key) != getattr(after.spec, key)
    ]
    return ", ".join(changed[:2])
