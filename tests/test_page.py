"""The report page: what it shows, that it escapes what it is given, and that it needs nothing but itself."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espalier import page
from espalier.page import (
    Alternative,
    Ancestor,
    Curve,
    Figure,
    GrowthPoint,
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
        return value if value in ("train", "validation", "measured", "estimated") else HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {HOSTILE: HOSTILE}
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{f.name: hostile(getattr(value, f.name)) for f in fields(value)})  # type: ignore[arg-type]
    return value


def test_equal_views_give_equal_pages():
    assert render(example_view()) == render(example_view())


def test_the_page_asks_nothing_of_the_network():
    html = render(example_view())
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


positive = st.floats(1e-9, 1e27)


@given(positive, positive, st.sampled_from(["flops", "tokens", "usd", "seconds"]))
def test_ticks_lie_on_their_axis_in_order_and_are_few(one, other, unit):
    low, high = min(one, other), max(one, other)
    for axis in (page._linear(0, high, unit), page._log(low, high, unit)):
        ticks = [at for at, _ in axis["ticks"]]
        assert axis["low"] < axis["high"]
        assert all(axis["low"] <= at <= axis["high"] for at in ticks)
        assert ticks == sorted(set(ticks))
    assert 2 <= len(page._linear(0, high, unit)["ticks"]) <= page.MOST_TICKS + 1


@given(st.floats(100, 1e15), st.sampled_from(["flops", "tokens", "usd", "seconds", "parameters"]))
def test_no_two_ticks_of_a_linear_axis_read_the_same(high, unit):
    texts = [text for _, text in page._linear(0, high, unit)["ticks"]]
    assert len(set(texts)) == len(texts)


@given(st.lists(st.floats(1e-3, 20), min_size=1, max_size=5))
def test_the_loss_axis_holds_every_loss_with_room(losses):
    axis = page._loss_axis(losses)
    assert axis["low"] < min(losses) and max(losses) < axis["high"]


@given(st.floats(8, 1e7))
def test_time_is_cut_as_a_clock_is(seconds):
    first, second = (at for at, _ in page._linear(0, seconds, "seconds")["ticks"][:2])
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


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser")
@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_draws_every_axis_with_labels_apart_and_the_page_fits(tmp_path, width):
    view, train = example_view(), example_view().curves[0].points
    growth = [
        GrowthPoint(f"{n} → {n + 1} layers", p.tokens, p.flops, p.usd, p.seconds, p.step, 2.1, 2.2)
        for n, p in enumerate(train[20::40])
    ]
    html = render(replace(view, growth=growth)).replace("</body>", PROBE)
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    dom = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--virtual-time-budget=2000",
            "--dump-dom",
            f"file://{tmp_path / 'page.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title
    axes = [f"{name} clear" for name in ("flops", "tokens", "usd", "seconds", "linear", "log")]
    first = f"validation {view.curves[1].points[1].loss:.3f}"  # step 0 has no place on a log axis
    assert title[1].split(" | ") == [*axes, f"tip {first}", "fits"]
