"""Inference priced before and after it was measured: `espalier budget roofline` and `espalier budget queries`."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from pydantic import Field

from espalier import files, units
from espalier.budget import hardware, inference, price, roofline_page
from espalier.budget.hardware import Hardware
from espalier.budget.inference import RuntimeProfile, Slope
from espalier.budget.roofline import Attention, Roofline, Setting
from espalier.budget.roofline_page import Estimate
from espalier.errors import RecipeError
from espalier.folder import ModelFolder
from espalier.method import method
from espalier.recipe import Recipe
from espalier.report import Report
from espalier.run import PAGE, RESULTS, Run

FIGURES = "roofline.json"
NUMBERS = ("FLOPs", "bytes", "FLOPs a byte", "time", "share")


class SettingRecipe(Recipe):
    """How a model is run; 32-bit activations are computed at the float32 peak, others at the bfloat16 peak."""

    weight_bits: int = Field(default=16, ge=1, le=32)
    activation_bits: int = Field(default=16, ge=1, le=32)
    cache_bits: int = Field(default=16, ge=1, le=32)
    attention: Attention = "sdpa"

    def setting(self) -> dict[str, Any]:
        """These settings by name."""
        return self.model_dump(include=set(SettingRecipe.model_fields))


class RooflineRecipe(SettingRecipe):
    """The model, the hardware, and a batch of queries."""

    model: Path = Field(description="a model folder or its config.json: no weights are needed")
    hardware: str = Field(default="here", description="a key of hardware.yaml, or the machine at hand")
    devices: int = Field(default=1, ge=1, description="how many of them each product is divided among")
    prompt: int = Field(default=512, ge=1)
    generated: int = Field(default=128, ge=2)
    batch: int = Field(default=1, ge=1)


@method(paper="arXiv 2402.16363", needs="a config.json", costs="nothing")
def roofline(recipe: RooflineRecipe, run: Run) -> Path:
    """Predict time, memory and price of inference by operator, and what bounds each: a table and a page."""
    estimate = estimated(recipe)
    files.write_json(run.folder / FIGURES, estimate.figures())
    files.write_text(run.folder / PAGE, roofline_page.render(estimate, f"Estimated on {date.today()}"))
    _show(estimate)
    return run.folder / PAGE


def estimated(recipe: RooflineRecipe) -> Estimate:
    """The estimate that a recipe asks for."""
    folder = recipe.model.parent if recipe.model.name == "config.json" else recipe.model
    device = hardware.named(recipe.hardware, home=files.home())
    if recipe.devices > 1 and not device.link_bandwidth:
        raise RecipeError(
            "devices",
            found=f"{recipe.devices} of {device.name}, of which no link to another is known",
            expected="1",
            mend=f"Choose other hardware, or state its link_bandwidth in {files.home() / hardware.OWN}.",
        )
    spec = ModelFolder(folder).spec
    setting = Setting(batch=recipe.batch, devices=recipe.devices, **recipe.setting())
    roofline = Roofline(spec, device.part(recipe.devices), setting)
    return Estimate(folder.resolve().name, roofline, recipe.prompt, recipe.generated)


class QueriesRecipe(SettingRecipe):
    """A profile and a workload; the bits and `attention` are those of the ideal on other hardware."""

    profile: Path = Field(description="runtime_profile.json of `espalier budget profile`")
    tokens: Path = Field(description="CSV or JSON lines with prompt_tokens and completion_tokens of each query")
    slope: Slope = Field(default="token", description="a price for each token written, or one that its context raises")
    hardware: str | None = Field(default=None, description="also price the ideal on this row of hardware.yaml")


@method(paper="arXiv 2305.02440", needs="a runtime profile and token counts", costs="nothing")
def queries(recipe: QueriesRecipe, run: Run) -> Report:
    """Price a workload from its token counts alone: time, money and energy of its queries one after another."""
    profile = RuntimeProfile.load(recipe.profile)
    asked = inference.read_queries(recipe.tokens)
    report = Report(str(recipe.tokens), context={"model": profile.model, "slope": recipe.slope})
    for statistic, fit in profile.fits.items():
        seconds = sum(fit.seconds(query, recipe.slope) for query in asked)
        _add(report, f"{statistic} on {profile.hardware.name}", seconds, profile.hardware, len(asked))
    if recipe.hardware:
        device = hardware.named(recipe.hardware, home=files.home())
        setting = inference.ideal_setting(profile.spec, device, asked, Setting(**recipe.setting()))
        seconds = inference.ideal_seconds(profile.spec, device, asked, setting)
        _add(report, f"ideal on {setting.devices} × {device.name}", seconds, device.part(setting.devices), len(asked))
    report.save(run.folder / RESULTS)
    beyond = sum(not profile.fits["minimum"].covers(query) for query in asked)
    if beyond:
        run.tell(f"{beyond} of {len(asked)} prompts are shorter or longer than any that was measured: extrapolated.")
    return report


def _add(report: Report, task: str, seconds: float, row: Hardware, n: int) -> None:
    """The cost of so many seconds on the hardware, a line a resource."""
    cost = price.rates(row).cost(seconds)
    for name in ("seconds", "usd", "kwh", "kgco2e"):
        value = getattr(cost, name)
        report.add(task, name, value, n=n, note=units.amount(value, name))


def _show(estimate: Estimate) -> None:
    """The operators of each phase on the terminal, then what the queries cost."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, title in estimate.titles().items():
        table = Table("operator", *NUMBERS, "bound by", title=title, title_justify="left", box=None, pad_edge=False)
        for column in table.columns[1:-1]:
            column.justify = "right"
        for row in roofline_page.written(estimate.phases[name]):
            table.add_row(*row.values())
        console.print(table, "")
    for line in roofline_page.summary(estimate):
        console.print(line, highlight=False)
