"""The report page: what it shows, that it escapes what it is given, and that it needs nothing but itself."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier import page
from espalier.page import (
    Alternative,
    Ancestor,
    ArmRow,
    Curve,
    Estimate,
    Figure,
    GrowthPoint,
    LawLine,
    LawPoint,
    PlanRow,
    Point,
    Sample,
    StageRow,
    View,
    render,
    save,
)
from espalier.report import Row

HOSTILE = "</script><script>alert('x')</script><img src=http://evil.example onerror=alert(1)> & \"quoted\" {{ 7 * 7 }}"
SECTIONS = {
    "curves": "loss",
    "alternatives": "cost",
    "plan": "plan",
    "stages": "stages",
    "results": "results",
    "samples": "samples",
    "lineage": "lineage",
    "notes": "notes",
    "machine": "machine",
    "recipe": "recipe",
}


def example_view() -> View:
    """A run of three stages, as the demo would report it."""
    draw = random.Random(0)
    parameters, sizes = (3_412_992, 6_563_840, 12_871_680), (2_000_000, 3_000_000, 5_000_000)
    total, starts = sum(sizes), [0, sizes[0], sizes[0] + sizes[1]]

    def spent(tokens: float) -> dict:
        flops = sum(
            6 * size * min(max(tokens - start, 0), stage)
            for size, start, stage in zip(parameters, starts, sizes, strict=True)
        )
        seconds = flops / 5.1e11
        return {
            "tokens": tokens,
            "flops": flops,
            "usd": seconds * 0.4 / 3600,
            "seconds": seconds,
            "step": round(tokens / 16_384),
        }

    def loss(tokens: float) -> float:
        bumps = sum(0.22 * math.exp(-(tokens - start) / 120_000) for start in starts[1:] if tokens >= start)
        return 1.62 + 5.2 / (1 + tokens / 60_000) ** 0.62 + bumps

    def points(tokens: list[float], noise: float) -> list[Point]:
        return [Point(**spent(t), loss=loss(t) + draw.gauss(0, noise)) for t in tokens]

    train = Curve("training", points([total * (i + 1) / 300 for i in range(300)], 0.07), "train")
    validation = Curve("validation", points([total * i / 19 for i in range(20)], 0.0), "validation")
    growth = [
        GrowthPoint(label, **spent(start), loss_before=loss(start - 1), loss_after=loss(start))
        for label, start in (("4 → 8 layers", starts[1]), ("256 → 384 hidden", starts[2]))
    ]
    grown, scratch = spent(total), 6.0 * parameters[-1] * 8_600_000
    code = "    for name, value in sorted(self._registry.items(), key=lambda item: (item[1].priority, item[0])):\n"
    return View(
        title="A Python model, grown in three stages",
        subtitle="12.9M parameters trained on the standard library's own sources, from 3.4M, "
        "within a budget of twenty minutes on two CPU cores.",
        made_at="14 March 2026, 10:42 UTC",
        headline=[
            Figure("Validation loss", "1.837", "nats a token, 2.65 bits"),
            Figure("Training compute", "545 TFLOP", "89% of the plan"),
            Figure("Device time", "17 min 49 s", "two CPU cores"),
            Figure("Money", "$0.12", "at $0.40 an hour"),
        ],
        curves=[train, validation],
        growth=growth,
        plan=[
            PlanRow("Compute", "flops", 6.1e14, grown["flops"], "estimated"),
            PlanRow("Tokens", "tokens", 10e6, total, "measured"),
            PlanRow("Device time", "seconds", 1_140, grown["seconds"], "measured"),
            PlanRow("Money", "usd", 0.127, grown["usd"], "estimated"),
            PlanRow("Energy", "kwh", 0.00541, 0.00505, "estimated"),
            PlanRow("Carbon", "kgco2e", 0.00216, 0.00202, "estimated"),
            PlanRow("Validation loss", "nats", 1.9, 1.837, "measured"),
        ],
        alternatives=[
            Alternative("This run, grown", total, grown["flops"], grown["seconds"], grown["usd"], 0.00505),
            Alternative(
                "From scratch, estimated",
                8_600_000,
                scratch,
                scratch / 5.1e11,
                scratch / 5.1e11 * 0.4 / 3600,
                0.00615,
                "the final size trained from its first step, until the loss fitted to this run's last stage is met.",
            ),
        ],
        stages=[
            StageRow(
                f"Stage {i + 1}",
                f"{layers} layers, {hidden} hidden, {hidden // 64} heads",
                parameters[i],
                sizes[i],
                6.0 * parameters[i] * sizes[i],
                6.0 * parameters[i] * sizes[i] / 5.1e11,
                loss(starts[i] + sizes[i] - 1),
            )
            for i, (layers, hidden) in enumerate(((4, 256), (8, 256), (8, 384)))
        ],
        samples=[
            Sample(
                "def read_lines(path):\n",
                '    """Return the lines of a file."""\n    with open(path) as file:\n'
                "        return [line.rstrip() for line in file if line.strip() and not line.startswith('#')]\n",
            ),
            Sample("class Registry(dict):\n    def names(self):\n", code + "        yield name\n"),
        ],
        lineage=[
            Ancestor("python-stdlib", "dataset", "1,824 files, 10.0M tokens, PSF licence"),
            Ancestor("stage-1", "train from scratch", "4 layers, 256 hidden, 2.0M tokens"),
            Ancestor("stage-2", "grow.stack, then train", "8 layers, 256 hidden, 3.0M tokens"),
            Ancestor("final", "grow.widen, then train", "8 layers, 384 hidden, 5.0M tokens"),
        ],
        results=[
            Row("python-stdlib", "bits per byte", 0.9713, 0.0041, 512),
            Row("completion", "exact match", 0.182, 0.017, 500, "greedy, one line"),
            Row("syntax", "parses", 0.874, None, 250),
        ],
        recipe="budget:\n  seconds: 1200\nmodel:\n  family: granite\n  hidden_size: 384\ntrain:\n"
        "  learning_rate: 3.0e-3\n  schedule: warmup-stable-decay  # the stable part is where the model grows, "
        "and its length is set by the budget\n",
        machine={"Device": "2 × Intel Xeon, 8 GB", "torch": "2.13.0", "espalier": "0.1.0", "Seed": "0"},
        notes=["Energy and carbon are estimates from 17 W and 0.40 kgCO₂e a kWh; nothing on this machine meters them."],
    )


def compared_view() -> View:
    """Two baselines and ten arms on one budget; the first arm is the best, the last never reaches the baseline."""
    names = ["large from scratch", "small only", *(f"operator {n}" for n in range(1, 11))]
    ends = [2.402, 2.498, *(2.35 + 0.006 * n for n in range(10))]

    def curve(n: int) -> Curve:
        losses = [ends[n] + 0.9 * (1 / share - 1) / 3 for share in (0.1, 0.25, 0.5, 0.75, 1.0)]
        points = [
            Point(1e6 * i * (1 + 0.1 * n), 4e14 * i, None, 500.0 * i, 100 * i, loss) for i, loss in enumerate(losses, 1)
        ]
        style = "baseline" if n < 2 else "validation"
        return Curve(names[n], points, style, [(loss - 0.01, loss + 0.02) for loss in losses])

    def row(n: int) -> ArmRow:
        final, reached = Estimate(ends[n], 0.011, 3), 0 if ends[n] > ends[0] else 3
        share = Estimate(0.5 + 0.05 * n, 0.03, 3) if reached else None
        difference = Estimate(ends[n] - ends[0], None if n == 4 else 0.012, 1 if n == 4 else 3) if n else None
        jump = Estimate(0.1 * n, 0.02, 3) if n > 1 else None
        return ArmRow(
            names[n],
            "baseline" if n < 2 else "arm",
            3e-3,
            jump,
            [None, replace(final, mean=2.6), final],
            difference,
            share,
            2 if n == 5 else reached,
            share,
        )

    return replace(
        bare(),
        curves=[curve(n) for n in range(12)],
        comparison=[row(n) for n in range(12)],
        comparison_shares=[0.25, 0.5, 1.0],
    )


class Reader(HTMLParser):
    """Collects what the tests ask of a page: tags with attributes, text by element, ids."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    @property
    def headings(self) -> set[str | None]:
        return {attributes.get("id") for tag, attributes in self.tags if tag == "h2"}

    @property
    def charts(self) -> dict:
        return json.loads(self.scripts[0])


def bare() -> View:
    return View("Title", "Subtitle", "today")


def hostile(value: object) -> object:
    """The same value with every text in it replaced by the hostile one."""
    if isinstance(value, str):
        return value if value in ("train", "validation", "baseline", "arm", "measured", "estimated") else HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {HOSTILE: HOSTILE}
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{f.name: hostile(getattr(value, f.name)) for f in fields(value)})  # type: ignore[arg-type]
    return value


@pytest.mark.parametrize("view", [example_view, compared_view])
def test_equal_views_give_equal_pages(view):
    assert render(view()) == render(view())


@pytest.mark.parametrize("view", [example_view, compared_view])
def test_the_page_asks_nothing_of_the_network(view):
    html = render(view())
    reader = Reader(html)
    assert not [tag for tag, attributes in reader.tags if {"src", "href", "srcset", "action"} & attributes.keys()]
    assert not re.search(r"https?:|url\((?!#)|@import|fetch\(|XMLHttpRequest|WebSocket", html)
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'")


def test_hostile_text_stays_text_wherever_it_is_given():
    plain, attacked = Reader(render(example_view())), Reader(render(hostile(example_view())))  # type: ignore[arg-type]
    assert len(attacked.scripts) == 2
    assert plain.scripts[1] == attacked.scripts[1]
    assert not [tag for tag, _ in attacked.tags if tag == "img"]
    assert "".join(attacked.texts).count(HOSTILE) > 40
    assert attacked.charts["loss"]["curves"][0]["name"] == HOSTILE


def test_the_embedded_data_is_what_the_view_holds():
    view, charts = example_view(), Reader(render(example_view())).charts
    for curve, drawn in zip(view.curves, charts["loss"]["curves"], strict=True):
        assert [{k: v for k, v in point.items() if k != "told"} for point in drawn["points"]] == [
            asdict(point) for point in curve.points
        ]
    assert [point["label"] for point in charts["loss"]["growth"]] == [point.label for point in view.growth]
    assert [stage["tokens"] for stage in charts["schedule"]["stages"]] == [stage.tokens for stage in view.stages]
    assert charts["schedule"]["scratch"]["tokens"] == view.alternatives[1].tokens


def test_a_page_without_data_has_no_sections():
    reader = Reader(render(bare()))
    assert reader.headings == set()
    assert not [tag for tag, _ in reader.tags if tag in ("table", "figure", "button", "noscript", "dl")]


@pytest.mark.parametrize(("part", "heading"), SECTIONS.items())
def test_a_section_is_there_if_and_only_if_its_part_is(part, heading):
    view = example_view()
    assert Reader(render(replace(bare(), **{part: getattr(view, part)}))).headings >= {heading}
    others = {"curves": {"growth"}, "alternatives": {"stages"}, "stages": {"growth"}}.get(part, set()) | {part}
    without = replace(view, **{name: type(getattr(view, name))() for name in others})
    assert heading not in Reader(render(without)).headings


def test_an_axis_that_nothing_was_spent_on_is_not_offered():
    view = example_view()
    for absent in (None, 0.0):
        curves = [replace(c, points=[replace(p, usd=absent) for p in c.points]) for c in view.curves]
        growth = [replace(p, usd=absent) for p in view.growth]
        reader = Reader(render(replace(view, curves=curves, growth=growth)))
        assert [a["data-axis"] for _, a in reader.tags if "data-axis" in a] == ["flops", "tokens", "seconds"]
        assert list(reader.charts["loss"]["axes"]) == ["flops", "tokens", "seconds"]


def test_one_button_of_each_choice_is_pressed():
    pressed = [a for tag, a in Reader(render(example_view())).tags if tag == "button" and a["aria-pressed"] == "true"]
    assert [(a.get("data-axis"), a.get("data-scale")) for a in pressed] == [("flops", None), (None, "linear")]


def test_without_a_script_the_losses_are_a_table():
    noscript = render(example_view()).split("<noscript>")[1].split("</noscript>")[0]
    for point in example_view().curves[1].points:
        assert f"<td>{point.loss:.3f}</td>" in noscript


def test_every_planned_number_is_marked_estimated_and_every_actual_one_by_its_basis():
    view = example_view()
    table = render(view).split('id="plan"')[1].split("</table>")[0]
    measured = sum(row.basis == "measured" for row in view.plan)
    assert table.count("(measured)") == measured
    assert table.count("(estimated)") == 2 * len(view.plan) - measured


def test_what_is_not_known_is_a_dash_without_a_mark():
    view = replace(bare(), plan=[PlanRow("Money", "usd", None, None, "estimated")])
    table = render(view).split('id="plan"')[1].split("</table>")[0]
    assert table.count("<td>–</td>") == 3


def test_bars_compare_only_what_every_alternative_states():
    view = example_view()
    first, second = view.alternatives
    page_text = "".join(Reader(render(replace(view, alternatives=[first, replace(second, kwh=None)]))).texts)
    assert "Energy" in "".join(Reader(render(replace(view, plan=[], notes=[]))).texts)
    assert page_text.count("Energy") == page_text.count("Energy and carbon") + 1  # the plan's row


def test_a_run_that_is_compared_with_nothing_has_no_bars_and_no_rectangle():
    html = render(replace(example_view(), alternatives=example_view().alternatives[:1]))
    assert 'class="bar"' not in html
    assert Reader(html).charts["schedule"]["scratch"] is None


def test_hostile_names_of_arms_stay_text():
    attacked = Reader(render(hostile(compared_view())))  # type: ignore[arg-type]
    assert Reader(render(compared_view())).scripts[1] == attacked.scripts[1]
    assert len(attacked.scripts) == 2 and not [tag for tag, _ in attacked.tags if tag == "img"]
    assert attacked.charts["difference"]["arms"][0]["name"] == HOSTILE


def test_a_comparison_is_there_if_and_only_if_it_has_rows():
    view = compared_view()
    assert "comparison" in Reader(render(replace(view, curves=[]))).headings
    without = Reader(render(replace(view, comparison=[])))
    assert without.headings == {"loss"} and without.charts["difference"] is None
    alone = Reader(render(replace(view, comparison=[replace(row, difference=None) for row in view.comparison])))
    assert alone.charts["difference"] is None and "difference-chart" not in {a.get("id") for _, a in alone.tags}


def cells(view: View) -> list[list[str]]:
    """The texts of the comparison's rows."""
    body = render(view).split('id="comparison"')[1].split("<tbody>")[1].split("</tbody>")[0]
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in body.split("<tr>")[1:]
    ]


def test_the_comparison_writes_estimates_with_intervals_in_the_order_given():
    view, rows = compared_view(), cells(compared_view())
    assert [row[0] for row in rows] == [row.name for row in view.comparison]
    assert rows[0][1:6] == ["0.003", "–", "–", "2.600 (best) ± 0.011", "2.402 ± 0.011"]
    assert rows[1][6:] == ["+0.096 ± 0.012", "–", "–", "not reached"]
    assert rows[2][5:] == ["2.350 (best) ± 0.011", "−0.052 (best) ± 0.012", "60% ± 3%", "60% ± 3%", "3 of 3"]
    assert rows[4][6] == "−0.040"
    assert rows[5][9] == "2 of 3"


def test_what_reads_the_same_as_the_best_is_marked_too_and_nothing_else_is():
    view = compared_view()
    first, second, *_, last = view.comparison
    near = replace(second, losses=[None, None, Estimate(2.4023, 0.01, 3)])
    rows = cells(replace(view, comparison=[first, near, last]))
    assert ["(best)" in row[5] for row in rows] == [True, True, False]


@given(st.floats(-1, 1))
def test_a_difference_has_a_sign_and_zero_has_no_minus(value):
    text = page._signed(value)
    assert float(text.replace("−", "-")) == pytest.approx(value, abs=5.1e-4)
    assert text[0] in "+−" and text != "−0.000"


def test_the_axis_of_differences_holds_zero_and_every_interval():
    for rows in (compared_view().comparison, compared_view().comparison[-1:], compared_view().comparison[2:3]):
        chart = Reader(render(replace(compared_view(), comparison=rows))).charts["difference"]
        low, high = chart["x"]["low"], chart["x"]["high"]
        assert low < 0 < high
        assert all(low < arm["low"] <= arm["mean"] <= arm["high"] < high for arm in chart["arms"])


def test_curves_are_told_apart_where_they_are_compared_and_only_there():
    assert {curve["hue"] for curve in Reader(render(example_view())).charts["loss"]["curves"]} == {""}
    curves = Reader(render(compared_view())).charts["loss"]["curves"]
    assert len({curve["hue"] for curve in curves}) == len(curves)
    assert [curve["hue"].split()[0] for curve in curves if curve["style"] == "baseline"] == ["neutral", "neutral"]


@pytest.mark.parametrize("view", [example_view, compared_view])
def test_every_class_has_its_rule(view):
    html = render(view())
    style = html.split("<style>")[1].split("</style>")[0]
    classes = {name for _, attributes in Reader(html).tags for name in (attributes.get("class") or "").split()}
    assert {name for name in classes if not re.search(rf"\.{name}\b", style)} <= {"estimated"}  # is not measured


def test_each_curve_that_is_compared_has_an_entry_that_keys_reach():
    entries = [
        a["data-curve"] for tag, a in Reader(render(compared_view())).tags if tag == "button" and "data-curve" in a
    ]
    assert entries == [str(n) for n in range(12)]
    assert "data-curve=" not in render(example_view()).split("<script")[0]


def test_a_band_is_within_the_frame_and_as_long_as_its_curve():
    view = compared_view()
    loss = Reader(render(view)).charts["loss"]
    for curve, drawn in zip(view.curves, loss["curves"], strict=True):
        assert [tuple(span) for span in drawn["band"]] == curve.band
        assert loss["y"]["log"]["low"] < min(low for low, _ in curve.band)
        assert drawn["points"][0]["told"][1] == f"between {curve.band[0][0]:.3f} and {curve.band[0][1]:.3f}"
    with pytest.raises(ValueError):
        render(replace(view, curves=[replace(view.curves[0], band=view.curves[0].band[1:])]))


def palettes() -> list[list[str]]:
    """The paper and the hues after it, in the light and the dark."""
    style = render(bare()).split("<style>")[1].split("</style>")[0]
    papers, hues = re.findall(r"--paper: (#\w{6});", style), re.findall(r"--hue-\d: (#\w{6});", style)
    count = len(page.HUES["validation"])
    return [[papers[0], *hues[:count]], [papers[1], *hues[count:]]]


# Linear RGB as seen without one kind of cone (Machado et al. 2009, severity 1), and by most people.
SIGHTS = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
# From linear RGB to cones, and from their cube roots to OKLab, where distance is difference to the eye.
CONES = ((0.412221, 0.536333, 0.051446), (0.211903, 0.680700, 0.107397), (0.088302, 0.281719, 0.629979))
OKLAB = ((0.210454, 0.793618, -0.004072), (1.977998, -2.428592, 0.450594), (0.025904, 0.782772, -0.808676))


def times(matrix: tuple, vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_hue_stands_out_from_the_paper(mode):
    paper, *hues = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, palettes()[mode])]
    for hue in hues:
        assert (max(hue, paper) + 0.05) / (min(hue, paper) + 0.05) >= 3


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHTS)
def test_hues_differ_to_every_kind_of_colour_vision(mode, sight):
    seen = [[min(max(c, 0), 1) for c in times(SIGHTS[sight], linear(hue))] for hue in palettes()[mode][1:]]
    places = [times(OKLAB, [math.cbrt(c) for c in times(CONES, colour)]) for colour in seen]
    assert min(math.dist(a, b) for i, a in enumerate(places) for b in places[:i]) > 0.09


positive = st.floats(1e-9, 1e27)


@given(positive, positive, st.sampled_from(["flops", "tokens", "usd", "seconds"]))
def test_ticks_lie_on_their_axis_in_order_and_are_few(one, other, unit):
    low, high = min(one, other), max(one, other)
    for axis in (page.linear_axis(0, high, unit), page.log_axis(low, high, unit)):
        ticks = [at for at, _ in axis["ticks"]]
        assert axis["low"] < axis["high"]
        assert all(axis["low"] <= at <= axis["high"] for at in ticks)
        assert ticks == sorted(set(ticks))
    assert 2 <= len(page.linear_axis(0, high, unit)["ticks"]) <= page.MOST_TICKS + 1


@given(st.floats(100, 1e15), st.sampled_from(["flops", "tokens", "usd", "seconds", "parameters"]))
def test_no_two_ticks_of_a_linear_axis_read_the_same(high, unit):
    texts = [text for _, text in page.linear_axis(0, high, unit)["ticks"]]
    assert len(set(texts)) == len(texts)


@given(st.lists(st.floats(1e-3, 20), min_size=1, max_size=5))
def test_the_loss_axis_holds_every_loss_with_room(losses):
    axis = page.loss_axis(losses)
    assert axis["low"] < min(losses) and max(losses) < axis["high"]


@given(st.floats(8, 1e7))
def test_time_is_cut_as_a_clock_is(seconds):
    first, second = (at for at, _ in page.linear_axis(0, seconds, "seconds")["ticks"][:2])
    assert second - first in page.CLOCK or (second - first) % 86_400 == 0


def test_the_first_drop_may_leave_the_linear_frame_but_not_the_log_one():
    view, charts = example_view(), Reader(render(example_view())).charts
    worst = max(point.loss for curve in view.curves for point in curve.points)
    assert charts["loss"]["y"]["linear"]["high"] < worst < charts["loss"]["y"]["log"]["high"]


def test_saving_writes_the_page_and_nothing_else(tmp_path):
    save(example_view(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(example_view())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


PROBE = """<script>
const said = [];
window.addEventListener("error", (event) => said.push("ERROR " + event.message));
setTimeout(() => {
  for (const button of document.querySelectorAll(".choice button")) {
    button.click();
    const texts = [...document.querySelectorAll("#loss-chart .mark")].map((node) => node.getBBox());
    const touch = texts.some((a, i) => texts.some((b, j) => i < j && a.x < b.x + b.width && b.x < a.x + a.width
      && a.y < b.y + b.height - 2 && b.y < a.y + a.height - 2));
    const pressed = [...button.parentNode.children].filter((other) => other.ariaPressed === "true");
    const alone = pressed.length === 1 && pressed[0] === button;
    said.push((button.dataset.axis || button.dataset.scale) + (touch ? " touches" : alone ? " clear" : " unpressed"));
  }
  const chart = document.querySelector("#loss-chart svg");
  if (chart) chart.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  said.push("tip " + document.querySelector("#loss-chart .tip p")?.textContent);
  said.push(document.documentElement.scrollWidth > innerWidth ? "overflows" : "fits");
  document.title = said.join(" | ");
}, 200);
</script></body>"""


@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_draws_every_axis_with_labels_apart_and_the_page_fits(browse, width):
    view, train = example_view(), example_view().curves[0].points
    growth = [
        GrowthPoint(f"{n} → {n + 1} layers", p.tokens, p.flops, p.usd, p.seconds, p.step, 2.1, 2.2)
        for n, p in enumerate(train[20::40])
    ]
    said = browse(render(replace(view, growth=growth)), PROBE, width)
    axes = [f"{name} clear" for name in ("flops", "tokens", "usd", "seconds", "linear", "log")]
    first = f"validation {view.curves[1].points[1].loss:.3f}"  # step 0 has no place on a log axis
    assert said == [*axes, f"tip {first}", "fits"]


COMPARED_PROBE = """<script>
const said = [];
window.addEventListener("error", (event) => said.push("ERROR " + event.message));
setTimeout(() => {
  const names = [...document.querySelectorAll("#loss-chart .curve text")], boxes = names.map((node) => node.getBBox());
  const over = (a, b) => a.y < b.y + b.height - 2 && b.y < a.y + a.height - 2;
  const touch = boxes.some((a, i) => boxes.some((b, j) => i < j && over(a, b)));
  said.push(names.length + (touch ? " touch" : " apart"));
  const lit = () => [...document.querySelectorAll(".lit .on")].map((group) => group.dataset.curve).join();
  const entry = document.querySelector('[data-curve="3"]');
  entry.focus();
  said.push("lit " + lit());
  entry.blur();
  said.push("lit " + lit());
  const chart = document.querySelector("#loss-chart svg");
  for (const key of ["End", "ArrowDown", "ArrowLeft"]) chart.dispatchEvent(new KeyboardEvent("keydown", { key }));
  said.push("tip " + document.querySelector("#loss-chart .tip p").textContent, "lit " + lit());
  said.push(document.querySelectorAll("#difference-chart .dot").length + " differences");
  said.push(document.documentElement.scrollWidth > innerWidth ? "overflows" : "fits");
  document.title = said.join(" | ");
}, 200);
</script></body>"""


@pytest.mark.parametrize(("width", "named"), [(500, 0), (1280, 12)])
def test_a_browser_names_ends_apart_and_brings_out_the_curve_asked_for(browse, width, named):
    view = compared_view()
    tip = f"tip small only {view.curves[1].points[-2].loss:.3f}"
    expected = [f"{named} apart", "lit 3", "lit ", tip, "lit 1", "11 differences", "fits"]
    assert browse(render(view), COMPARED_PROBE, width) == expected


def law_view() -> View:
    """Two lines of a loss law with three runs each."""
    sizes = [10.0**n for n in range(4, 9)]
    lines = [
        LawLine(
            f"{name} & more",
            [LawPoint(n, loss, (loss - 0.5, loss + 0.5)) for n in sizes for loss in [floor + 20 * n**-0.25]],
            [LawPoint(n, floor + 20 * n**-0.25) for n in sizes[:3]],
        )
        for name, floor in (("short", 2.0), ("long", 1.5))
    ]
    return View("law", "", "", law=lines)


def test_a_law_is_drawn_within_its_axes_and_says_its_intervals():
    page = Reader(render(law_view()))
    chart = page.charts["law"]
    assert page.headings == {"law"} and [line["name"] for line in chart["lines"]] == ["short & more", "long & more"]
    for line in chart["lines"]:
        assert (len(line["points"]), len(line["runs"])) == (5, 3)
        for point in line["points"]:
            assert chart["y"]["low"] < point["interval"][0] < point["interval"][1] < chart["y"]["high"]
            assert chart["x"]["low"] <= point["parameters"] <= chart["x"]["high"]
            assert "95% between" in point["told"][1] and "parameters" in point["told"][-1]
    assert Reader(render(example_view())).charts["law"] is None


LAW_PROBE = """<script>
const said = [];
window.addEventListener("error", (event) => said.push("ERROR " + event.message));
setTimeout(() => {
  const count = (what) => document.querySelectorAll("#law-chart " + what).length;
  said.push(count(".dot") + " runs", count(".validation") + " lines", count(".band") + " bands");
  const chart = document.querySelector("#law-chart svg");
  for (const key of ["End", "ArrowDown"]) chart.dispatchEvent(new KeyboardEvent("keydown", { key }));
  said.push("tip " + document.querySelector("#law-chart .tip p").textContent);
  said.push(document.documentElement.scrollWidth > innerWidth ? "overflows" : "fits");
  document.title = said.join(" | ");
}, 200);
</script></body>"""


@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_draws_a_law_and_reads_its_lines(browse, width):
    expected = ["6 runs", "2 lines", "2 bands", "tip long &amp; more: expected 1.700", "fits"]
    assert browse(render(law_view()), LAW_PROBE, width) == expected
