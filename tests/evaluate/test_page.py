"""The page of evaluations: every figure with its interval, nothing that isn't a number, and drawn where it belongs."""

import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from espalier import files, records
from espalier.evaluate import page
from espalier.evaluate.compare import compare
from espalier.evaluate.evaluation import Evaluation
from espalier.evaluate.intervals import Interval
from espalier.evaluate.items import Outcome
from espalier.ledger import Cost
from espalier.report import Report
from espalier.run import RECIPE

TASKS = ("Counting", "Full repeating", "Head & tail", "Two facts", "Retrieval")
HOSTILE = '<img src=x onerror=alert(1)> & "{{ 7 * 7 }}" </script>'


def evaluation(folder, name: str, skill: float, tasks=TASKS, *, n: int = 40, seed: int = 0, **context) -> Evaluation:
    """Of a model that is right with a probability, half of its items being choices of four."""
    draw, outcomes = random.Random(seed), []
    report = Report(name, context={"model": files.digest(name), "trained": vars(Cost(flops=1e15, usd=2.0)), **context})
    for task in tasks:
        metric, chance = ("exact_match", 0.0) if task < "G" else ("acc", 0.25)
        report.context.setdefault("tasks", {})[task] = {"items": files.digest(task)}
        scores = [float(draw.random() < skill) for _ in range(n)]
        report.add(task, metric, sum(scores) / n, stderr=0.05, n=n)
        for number, score in enumerate(scores):
            tags = {
                "language": ("en", "zh")[number % 2],
                "depth": f"{number % 3 / 2:g}",
                "length": str(64 << number % 2),
            }
            told = (task, f"{task}{number}", {metric: score}, f"said {number}", f"gold {number}", chance, 9, 3)
            outcomes.append(Outcome(*told, tags=tags))
    return Evaluation(folder, report, tuple(outcomes), Cost(seconds=3.0, usd=0.4), "model: m\n")


@pytest.fixture
def folder(tmp_path):
    records.write_signed(tmp_path / RECIPE, "model: m\n")
    return tmp_path


def charts(html: str) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in the page's data")

    return json.loads(html.split('id="data">')[1].split("</script>")[0], parse_constant=refuse)


class Text(HTMLParser):
    """Headings' ids, and the text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.shown = ""
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._hidden = tag in ("script", "style")
        if tag == "h2":
            self.headings.append(dict(attributes)["id"])

    def handle_data(self, data):
        self.shown += "" if self._hidden else data


def test_one_evaluation_has_its_figures_with_intervals(folder):
    one = evaluation(folder, "model", 0.7)
    html = page.render(folder, {"run": one}, "Title")
    text = Text(html)
    assert text.headings == ["scores", "results", "needle", "parts", "wrong", "cost", "hashes", "recipe"]
    for row in one.report.rows:
        sure = one.interval(row)
        assert f"{100 * row.value:.1f}%" in text.shown
        assert f"{100 * sure.low:.1f} – {100 * sure.high:.1f}%" in text.shown, (
            "Wilson's, as the answers are right or wrong"
        )
    assert files.digest("model")[:32] in text.shown and files.digest(TASKS[0])[:32] in text.shown
    assert "$0.40" in text.shown and "$2.00" in text.shown
    assert "NaN" not in html and "nan" not in text.shown.lower().split()


def test_a_score_that_is_all_or_nothing_is_not_told_without_doubt(folder):
    for skill, share in ((-1.0, 0.0), (1.1, 1.0)):
        one = evaluation(folder, "model", skill)
        one.report.add("group", "score", share, stderr=0.0, n=80)
        for sure in (one.overall_interval, *map(one.interval, one.report.rows)):
            assert sure.value == share and share in sure and 0.01 < sure.high - sure.low < 0.2


def test_tasks_that_went_one_way_each_are_not_told_without_doubt_together(folder):
    one, other = (evaluation(folder, "m", skill, TASKS[:1]) for skill in (0.0, 1.0))
    outcomes = (*one.outcomes, *(replace(each, task=TASKS[1], id=f"b{each.id}") for each in other.outcomes))
    report = Report("m", [*one.report.rows, replace(other.report.rows[0], task=TASKS[1])], one.report.context)
    sure = replace(one, report=report, outcomes=outcomes).overall_interval
    assert sure.value == 0.5 and sure.low < 0.48 and sure.high > 0.52


def test_what_another_model_was_asked_is_not_part_of_the_score(folder):
    told = {"after": {"tasks": {TASKS[1]: {}}}}
    both = evaluation(folder, "m", 0.5, TASKS[:2], **told)
    assert both.overall == evaluation(folder, "m", 0.5, TASKS[:1]).overall


def test_chance_stands_beside_scores_and_not_beside_what_is_made_of_them(folder):
    each = evaluation(folder, "m", 0.5, ("Retrieval",))
    each.report.add("Retrieval", "gain", 0.2, n=40)
    assert (each.chance_of("Retrieval", "acc"), each.chance_of("Retrieval", "gain")) == (0.25, None)
    html = page.render(folder, {"m": each}, "m")
    assert html.count("<td>25.0%</td>") == 1


def test_figures_that_are_no_shares_and_no_numbers_are_told_as_they_are(folder):
    each = evaluation(folder, "m", 0.5, TASKS[:1])
    each.report.add(TASKS[0], "perplexity", math.inf, n=40)
    outcomes = tuple(replace(one, tags={"depth": "deep", "length": "long"}) for one in each.outcomes)
    assert "inf" in page.render(folder, {"m": replace(each, outcomes=outcomes)}, "m")
    assert page.between("mcc", Interval(-0.1, -0.25, 0.05)) == "-25.0 – 5.0%"
    graded = tuple(replace(one, scores={"exact_match": 700.0}) for one in each.outcomes)
    assert replace(each, outcomes=graded).overall is None


def test_wrong_answers_are_shown_from_as_many_tasks_as_there_is_room_for(folder):
    html = page.render(folder, {"run": evaluation(folder, "model", 0.5)}, "Title")
    section = html.split('id="wrong"')[1].split("</section>")[0]
    assert all(section.count(f">{task.replace('&', '&amp;')}<") >= 2 for task in TASKS)
    perfect = page.render(folder, {"run": evaluation(folder, "model", 1.1)}, "Title")
    assert "wrong" not in Text(perfect).headings


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 24, 25])
def test_a_radar_has_at_least_three_axes_and_fewer_or_too_many_are_dots(folder, n):
    tasks = [f"task {number}" for number in range(n)]
    found = charts(page.render(folder, {"run": evaluation(folder, "m", 0.5, tasks)}, "Title"))
    assert bool(found["radar"]) == (3 <= n <= 24) and bool(found["scores"]) == (n in (1, 2, 25))
    if found["radar"]:
        assert found["radar"]["axes"] == tasks and len(found["radar"]["models"][0]["values"]) == n
    if found["scores"]:
        assert [row["name"] for row in found["scores"]["rows"]] == tasks
        assert all(row["low"] <= row["value"] <= row["high"] for row in found["scores"]["rows"])


def test_axes_of_a_radar_are_the_tasks_that_all_have(folder):
    both = {"a": evaluation(folder, "a", 0.5), "b": evaluation(folder, "b", 0.5, TASKS[1:])}
    assert charts(page.render(folder, both, "Title"))["radar"]["axes"] == list(TASKS[1:])


def test_more_tasks_than_a_radar_has_room_for_are_shown_by_group(folder):
    tasks = [f"task {number:02}" for number in range(30)]
    groups = {f"group {g}": tasks[10 * g : 10 * g + 10] for g in range(3)}
    one = evaluation(folder, "m", 0.5, tasks, groups=groups)
    radar = charts(page.render(folder, {"run": one}, "Title"))["radar"]
    assert radar["axes"] == list(groups)
    means = [sum(one.shares()[task][0] for task in each) / 10 for each in groups.values()]
    assert radar["models"][0]["values"] == pytest.approx(means) and radar["chance"] == [0.25] * 3


def test_what_was_hidden_is_a_map_of_depth_and_length(folder):
    html = page.render(folder, {"run": evaluation(folder, "m", 0.5)}, "Title")
    section = html.split('id="needle"')[1].split("</section>")[0]
    shares = [float(share) for share in re.findall(r"--share: ([0-9.]+)", section)]
    assert len(shares) == 6 and all(0 <= share <= 1 for share in shares)
    assert re.findall(r'scope="row">(.*?)<', section) == ["0%", "50%", "100%"]
    assert re.findall(r"<td.*?>(\d+%)<", section) == [f"{share:.0%}" for share in shares]
    assert 'title="' in section and " of " in section


def test_differences_are_drawn_and_told(folder):
    both = {"base": evaluation(folder, "base", 0.4), "other": evaluation(folder, "other", 0.8, seed=1)}
    found, _ = compare(both, "base")
    html = page.render(folder, both, "Title", found)
    drawn = charts(html)["differences"]
    assert [row["name"] for row in drawn["rows"]] == ["overall", *TASKS]
    for row, each in zip(drawn["rows"], found, strict=True):
        assert (row["value"], row["low"], row["high"]) == (each.change, each.low, each.high)
        assert drawn["x"]["low"] < min(0, row["low"]) and max(0, row["high"]) < drawn["x"]["high"]
    section = html.split('id="differences"')[1].split("</section>")[0]
    assert section.count("<b>") == sum(each.sure for each in found) > 3


def test_losses_have_figures_and_differences_without_a_radar(folder):
    def losses(name: str, loss: float) -> Evaluation:
        report = Report(name)
        report.add("held-out", "loss", loss, stderr=0.02, n=1000, note="nats a token")
        outcomes = [Outcome("held-out", str(i), {"loss": loss + i / 100}, "", "", 0.0, 9, 0) for i in range(20)]
        return Evaluation(folder, report, tuple(outcomes), Cost(), "")

    both = {"base": losses("base", 3.2), "other": losses("other", 3.0)}
    found, _ = compare(both, "base")
    html = page.render(folder, both, "Title", found, {"base": Cost(flops=1e9), "other": Cost(flops=2e9)})
    text, drawn = Text(html), charts(html)
    assert (
        drawn["radar"] is drawn["scores"] is None
        and "−0.2000" in text.shown
        and "%" not in text.shown.split("Differences")[1]
    )
    assert [point["value"] for point in drawn["growth"]["lines"][0]["points"]] == [3.2, 3.0]
    assert "wrong" not in text.headings


def test_names_and_answers_stay_text_whatever_is_in_them(folder):
    tasks = (HOSTILE, *TASKS)
    outcomes = evaluation(folder, HOSTILE, 0.3, tasks)
    told = tuple(
        replace(each, said=HOSTILE, gold=HOSTILE, tags={HOSTILE: each.tags["language"]}) for each in outcomes.outcomes
    )
    html = page.render(folder, {HOSTILE: replace(outcomes, outcomes=told)}, HOSTILE)
    text = Text(html)
    assert "img" not in text.tags and text.tags.count("script") == 2
    assert text.shown.count(HOSTILE) > 10
    assert not re.search(r"https?:|url\((?!#)|@import", html)


def test_a_run_without_answers_has_a_page_too(folder):
    report = Report("model")
    report.add("suite", "perplexity", 12.5)
    html = page.render(folder, {"run": Evaluation(folder, report, (), Cost(), "")}, "Title")
    assert Text(html).headings == ["results", "cost", "recipe"] and "12.5" in html


PROBE = """<style>html { max-width: WIDTHpx; }</style><script>
const said = [];
window.addEventListener("error", (event) => said.push("ERROR " + event.message));
setTimeout(() => {
  dispatchEvent(new Event("resize")); // the style above came after the first drawing
  const { axes, models } = charts.radar;
  const rings = [...document.querySelectorAll("#radar-chart .ring-line")].map((node) => node.getBBox());
  const whole = rings.at(-1), svg = document.querySelector("#radar-chart svg");
  const spokes = [...svg.querySelectorAll("line.grid")];
  const centre = { x: Number(spokes[0].getAttribute("x1")), y: Number(spokes[0].getAttribute("y1")) };
  const far = (node, x, y) => Math.hypot(node.getAttribute(x) - centre.x, node.getAttribute(y) - centre.y);
  const radius = far(spokes[0], "x2", "y2");
  let worst = 0;
  models.forEach(({ values }, number) => {
    const dots = [...svg.querySelectorAll(`[data-curve="${number}"] .dot`)];
    dots.forEach((dot, i) => {
      worst = Math.max(worst, Math.abs(far(dot, "cx", "cy") / radius - values[i]));
      const spoke = spokes[i], cross = (dot.getAttribute("cx") - centre.x) * (spoke.getAttribute("y2") - centre.y)
        - (dot.getAttribute("cy") - centre.y) * (spoke.getAttribute("x2") - centre.x);
      worst = Math.max(worst, Math.abs(cross) / radius / radius);
    });
    if (dots.length !== axes.length) said.push("dots missing");
  });
  said.push(worst < 1e-6 ? "in place" : `off by ${worst}`);
  const texts = [...svg.querySelectorAll("text.name")].map((node) => node.getBBox());
  const within = (a, b) => a.x < b.x + b.width && a.y < b.y + b.height - 4;
  const over = (a, b) => within(a, b) && within(b, a);
  const apart = texts.every((a, i) => texts.every((b, j) => i === j || !over(a, b)));
  const inside = texts.every(({ x, width }) => x >= 0 && x + width <= svg.clientWidth);
  said.push(apart && inside ? "named" : "names touch");
  said.push(document.querySelector(".axis-names").hidden ? "by name" : "by number");
  svg.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
  said.push("tip " + document.querySelector("#radar-chart .tip p").textContent.split(":")[0]);
  said.push(document.querySelectorAll("#differences-chart .dot").length + " differences");
  document.querySelector('[data-axis="usd"]').click();
  said.push(document.querySelectorAll("#growth-chart .validation").length + " lines");
  const right = (node) => node.getBoundingClientRect().right, edge = right(document.documentElement) + 1;
  const wide = [...document.querySelectorAll("body *")].filter((node) => right(node) > edge);
  const bare = wide.filter((node) => !node.closest(".scroll > *, .tip, .spoken, noscript, svg *"));
  said.push(bare.length ? `overflows: ${bare[0].tagName} ${bare[0].className}` : "fits");
  document.title = said.join(" | ");
}, 200);
</script></body>"""


@pytest.mark.parametrize(("width", "names"), [(375, "by number"), (1280, "by name")])
def test_a_browser_draws_values_at_their_radius_and_the_page_fits(folder, browse, width, names):
    runs = {"base": evaluation(folder, "base", 0.4), "other": evaluation(folder, "other", 0.8, seed=1)}
    found, _ = compare(runs, "base")
    spent = {"base": Cost(tokens=1e6, flops=1e12, usd=1.0), "other": Cost(tokens=3e6, flops=4e12, usd=3.0)}
    html = page.render(folder, runs, "A comparison", found, spent)
    said = browse(html, PROBE.replace("WIDTH", str(width)), max(width, 500))
    assert said[:3] == ["in place", "named", names]
    assert said[3] in ("tip base", "tip other") and said[4:] == ["6 differences", "6 lines", "fits"]


def test_points_of_growth_are_where_they_were_spent(folder):
    runs = {f"stage-{n}": evaluation(folder, f"m{n}", 0.3 * n, seed=n) for n in (1, 2, 3)}
    spent = {name: Cost(tokens=1e6 * n, flops=1e12 * n * n) for n, name in enumerate(runs, start=1)}
    growth = charts(page.render(folder, runs, "Title", spent=spent))["growth"]
    assert list(growth["axes"]) == ["flops", "tokens"], "nothing was paid"
    assert [line["name"] for line in growth["lines"]] == ["overall", *TASKS]
    for line in growth["lines"]:
        assert [(point["tokens"], point["flops"]) for point in line["points"]] == [
            (1e6 * n, 1e12 * n * n) for n in (1, 2, 3)
        ]
        assert all(point["band"][0] <= point["value"] <= point["band"][1] for point in line["points"])
    overall = [math.fsum(score for score, _ in each.shares().values()) / 5 for each in runs.values()]
    assert [point["value"] for point in growth["lines"][0]["points"]] == pytest.approx(overall)
