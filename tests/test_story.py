"""The story of a run: its files, told without adding anything, whatever a model wrote and wherever a run stopped."""

import shutil

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from espalier import records, story, units
from espalier.errors import RunError
from espalier.ledger import Cap, Ledger
from espalier.report import Report
from espalier.run import FINAL, LEDGER, METRICS, PAGE, PLAN, RECIPE, RESULTS, STATE
from espalier.story import Story, tell, tell_plan, write_page


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def told(finished) -> Story:
    return Story(finished)


def test_stages_add_up_to_what_training_took(told):
    stages = told.stages()
    assert [stage.shape for stage in stages] == ["1 layer × 32", "2 layers × 48"]
    assert sum(stage.tokens for stage in stages) == told.trained.tokens == 2560
    assert sum(stage.flops for stage in stages) == pytest.approx(told.trained.flops)
    assert sum(stage.seconds for stage in stages) == pytest.approx(told.trained.seconds)
    assert stages[-1].loss == told.results.value("held-out", "loss")


def test_the_plan_is_set_against_the_fact(told):
    rows = {(row.quantity, row.unit): row for row in told.plan_rows()}
    tokens, time = rows["Tokens, training", "tokens"], rows["Time, everything", "seconds"]
    assert tokens.planned == tokens.actual == 2560
    assert time.actual == Ledger(told.folder / LEDGER).total.seconds > rows["Time, training", "seconds"].actual
    assert {row.basis for (_, unit), row in rows.items() if unit in ("tokens", "flops", "seconds")} == {"measured"}
    assert {row.basis for (_, unit), row in rows.items() if unit == "usd"} == {"estimated"}


def test_growing_is_set_against_starting_at_the_final_size(told):
    grown, scratch = told.alternatives()
    assert grown.tokens == scratch.tokens
    assert grown.flops == told.trained.flops < scratch.flops
    (compute,) = (figure for figure in told.headline() if figure.label == "Compute")
    assert compute.value == f"{grown.flops / scratch.flops:.0%}"


def test_growth_lies_on_the_curve_where_it_happened(told):
    (growth,) = told.growth()
    assert (growth.step, growth.tokens) == (20, 1280)
    assert growth.loss_after == pytest.approx(growth.loss_before, abs=1e-3)
    assert growth.label == "1 → 2 layers, 32 → 48 wide"
    first, second = told.lineage()
    assert growth.label in second.detail and "1.28k" in second.method.replace("1,280", "1.28k")
    assert first.method == "new weights"


def test_curves_have_every_logged_point_in_order(told):
    training, held_out = told.curves()
    assert [point.step for point in training.points] == list(range(1, 41))
    for curve in (training, held_out):
        for axis in ("tokens", "flops", "usd", "seconds", "step"):
            values = [getattr(point, axis) for point in curve.points]
            assert values == sorted(values), (curve.name, axis)


def test_every_second_is_said_to_have_gone_somewhere(told):
    parts = told.where_time_went().split(", ")
    kinds = [part.split(" ", 1)[0] for part in parts]
    assert set(kinds) == {entry.kind for entry in told.ledger.entries} and len(kinds) == len(set(kinds))
    seconds = [told.ledger.spent(kind=kind).seconds for kind in kinds]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) == pytest.approx(told.ledger.total.seconds)
    assert parts[0].endswith(units.duration(seconds[0]))


def test_the_terminal_shows_plan_fact_stages_and_samples(finished, capsys):
    tell(finished)
    shown = capsys.readouterr().out
    results = Report.load(finished / RESULTS)
    for expected in ("2,560 tokens", "FLOPs", "the whole run: ", "Stage 2: 2 layers × 48", "sample def "):
        assert expected in shown
    assert f"held-out loss {results.value('held-out', 'loss'):.3f}" in shown


@pytest.fixture
def tell_sample(copy_of_finished):
    """Tell the run's story as if its model had written something."""

    def tell_sample(prompt: str, completion: str) -> None:
        results = Report.load(copy_of_finished / RESULTS)
        results.context["samples"] = [[prompt, completion]]
        results.save(copy_of_finished / RESULTS)
        (copy_of_finished / STATE).unlink(missing_ok=True)
        tell(copy_of_finished)
        write_page(copy_of_finished)

    return tell_sample


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30), st.text(max_size=30))
def test_whatever_a_model_wrote_can_be_shown(tell_sample, capsys, prompt, completion):
    tell_sample(prompt, completion)
    shown = capsys.readouterr().out
    assert all(character in shown for character in prompt + completion if character.isalnum())


@pytest.mark.parametrize("text", ["[bold]", "[/bold]", "\\[/b]", "\\\\[/b]", "[link=x]y[/link]", "[[]"])
def test_what_looks_like_markup_is_text(tell_sample, capsys, text):
    tell_sample("p", text)
    assert f"sample p{text}" in capsys.readouterr().out


@pytest.mark.parametrize("lines", [0, 1, 5, 30])
def test_a_run_that_is_under_way_has_a_story_too(copy_of_finished, lines, capsys):
    for name in (FINAL, RESULTS, PAGE, STATE):
        path = copy_of_finished / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (LEDGER, METRICS):
        kept = (copy_of_finished / name).read_text().splitlines(keepends=True)[:lines]
        (copy_of_finished / name).write_text("".join(kept))
    tell(copy_of_finished)
    assert write_page(copy_of_finished) == copy_of_finished / PAGE
    shown = capsys.readouterr().out
    assert "2,560 tokens" in shown and "sample" not in shown


def test_the_page_is_one_file_with_everything_in_it(copy_of_finished):
    page = write_page(copy_of_finished).read_text()
    assert "tiny" in page and "1 → 2 layers" in page and "Where the time went" in page
    assert not [line for line in page.splitlines() if "src=" in line and "http" in line]


def test_a_run_that_was_never_planned_has_no_story(copy_of_finished):
    for name in (PLAN, STATE):
        (copy_of_finished / name).unlink()
    with pytest.raises(RunError, match=r"no plan\.json") as refusal:
        Story(copy_of_finished)
    assert refusal.value.exit_code == 5


def test_a_plan_is_told_with_its_share_of_the_budget(told, capsys):
    tell_plan(told.plan, Cap(tokens=5120))
    shown = capsys.readouterr().out
    assert "speeds measured; 50% of the budget" in shown and "2 layers × 48" in shown
    tell_plan(told.plan, Cap())
    assert "of the budget" not in capsys.readouterr().out


def test_a_growth_is_named_by_what_it_changed(told):
    before, after = told.plan.stages
    assert story.grown(before, after) == "1 → 2 layers, 32 → 48 wide"
    assert story.grown(after, after) == ""


def test_energy_that_was_metered_is_called_measured(copy_of_finished):
    lines = list(records.read_lines(copy_of_finished / LEDGER))
    lines[-1]["measured"] = ["seconds", "kwh"]
    records.replace_lines(copy_of_finished / LEDGER, lines)
    (copy_of_finished / STATE).unlink()
    assert Story(copy_of_finished).basis("kwh") == "measured"
    assert Story(copy_of_finished).basis("usd") == "estimated"


@pytest.mark.parametrize("off, word", [(0.1, "inside"), (-0.1, "inside"), (0.5, "outside")])
def test_what_a_law_expected_is_set_against_what_the_run_came_to(copy_of_finished, capsys, off, word):
    loss = Report.load(copy_of_finished / RESULTS).value("held-out", "loss")
    values = yaml.safe_load((copy_of_finished / RECIPE).read_text())
    values["expected"] = {"loss": loss - off, "low": loss - off - 0.2, "high": loss - off + 0.2}
    records.write_signed(copy_of_finished / RECIPE, yaml.safe_dump(values))
    (copy_of_finished / STATE).unlink()
    (row,) = (row for row in Story(copy_of_finished).plan_rows() if row.quantity == "Held-out loss")
    assert (row.planned, row.actual, row.basis) == (loss - off, loss, "measured")
    (note,) = (note for note in Story(copy_of_finished).notes() if note.startswith("Held-out loss"))
    assert word in note and f"{off:+.3f} from the {loss - off:.3f}" in note
    tell(copy_of_finished)
    assert note in capsys.readouterr().out
    assert note in write_page(copy_of_finished).read_text()


def test_what_went_wrong_with_the_numbers_is_told(copy_of_finished, capsys):
    lines = [
        {"step": 3, "nonfinite": "loss", "where": "row 7 of the training split"},
        {"step": 9, "nonfinite": "gradient", "where": "row 8 of the training split"},
        {"step": 12, "rewound_from": 30, "spike": 8.25, "skipped": [80, 140]},
        {"step": 33, "spike": 7.5},
    ]
    (copy_of_finished / STATE).unlink()
    for line in lines:
        records.append(copy_of_finished / METRICS, {"stage": 0, **line})
    notes = list(Story(copy_of_finished).notes())
    assert notes[:3] == [
        "2 updates were not made, of numbers that weren't finite: step 3, 9.",
        "At step 30 the loss was 8.2 sigma above the latest: the run went back to step 12 and passed over the samples "
        "that led there.",
        "At step 33 the loss was 7.5 sigma above the latest.",
    ]
    tell(copy_of_finished)
    assert notes[0] in capsys.readouterr().out


def test_without_an_expectation_nothing_is_said_of_it(told):
    assert not any(row.quantity == "Held-out loss" for row in told.plan_rows())
    assert [note for note in told.notes() if not note.startswith("Where the time went")] == []
