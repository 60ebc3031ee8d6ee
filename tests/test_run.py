"""Runs: one process, one recipe, every second charged, and failures on record."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier import files, recipe, records
from espalier import run as module
from espalier.errors import RunError
from espalier.folder import MADE, ModelFolder
from espalier.ledger import Cap, Cost, Rates, read
from espalier.recipe import ByField, Flagged, Planned, Recipe, Safe
from espalier.run import CHANGES, LEDGER, LOCK, LOG, METRICS, RECIPE, Run, status


class Stage(Recipe):
    size: int = 1


class Job(Recipe):
    name: str = "x"
    rate: float = 1e-5
    stages: tuple[Stage, ...] = (Stage(), Stage(size=2))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "x"


@pytest.fixture
def start(folder):
    """Start a run of the folder, and let go of it after the test."""
    begun = []

    def start(job: Recipe = Job(), **words) -> Run:  # noqa: B008  frozen
        run = Run.start(folder, job, **{"tell": lambda line: None, **words})
        begun.append(run)
        return run

    yield start
    for run in begun:
        run.close()


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now - 999_000.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


HOLD = """
import sys
from pathlib import Path
from espalier.recipe import Recipe
from espalier.run import Run
with Run.start(Path(sys.argv[1]), Recipe()):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_lets_go_or_dies(folder, start):
    job = Recipe()
    for end in ("let go", "die"):
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdin=-1, stdout=-1, text=True)
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError) as refused:
            start(job)
        assert refused.value.where == str(folder) and "another process" in refused.value.found
        if end == "die":
            holder.kill()
        holder.communicate()
        start(job).close()


def test_two_runs_of_one_process_do_not_share_a_folder(start):
    first = start()
    with pytest.raises(RunError, match="another process"):
        start()
    first.close()
    start()


def test_a_run_stores_its_recipe_in_full(start, folder):
    start(Job(rate=3e-4))
    assert recipe.load(Job, folder / RECIPE) == Job(rate=3e-4)


def test_the_same_recipe_is_taken_up_and_another_is_refused_by_its_keys(start, folder):
    start().close()
    start().close()
    other = Job(rate=2.0, stages=(Stage(), Stage(size=3)))
    for _ in range(2):
        with pytest.raises(RunError) as refused:
            start(other)
        shown = [line.split() for line in refused.value.found.splitlines()[2:]]
        assert shown == [["rate", "1e-05", "2.0", "refused"], ["stages.1.size", "2", "3", "refused"]]
    assert recipe.load(Job, folder / RECIPE) == Job()
    start().close()


class Marked(Recipe):
    name: Safe[str] = "x"
    hours: Planned[float] = 1.0
    rate: Flagged[float] = 1.0
    inner: ByField[Job] = Job()
    seed: int = 1


CHANGED = {"name": "y", "hours": 2.0, "rate": 2.0, "inner.rate": 2.0, "seed": 2}
VERDICTS = dict(zip(CHANGED, ("safe", "planned", "flag", "refused", "refused"), strict=True))


def marked(keys) -> Marked:
    """The recipe with other values at these keys."""
    values = {key: value for key, value in CHANGED.items() if key in keys and "." not in key}
    return Marked(**values, inner=Job(rate=2.0) if "inner.rate" in keys else Job())


@given(
    keys=st.sets(st.sampled_from(list(CHANGED)), min_size=1),
    accept=st.sets(st.sampled_from(["rate", "seed", ""])),
    finished=st.booleans(),
)
def test_changes_are_taken_over_or_refused_by_their_classes(tmp_path_factory, keys, accept, finished):
    folder, told = tmp_path_factory.mktemp("runs") / "x", []
    with Run.start(folder, Marked(), tell=told.append) as run:
        run.finish("finished" if finished else "stopped")
    classes = {VERDICTS[key] for key in keys}
    allowed = {"safe"} if finished else {"safe", "planned", "flag"}
    if classes <= allowed and ("rate" not in keys or "rate" in accept):
        with Run.start(folder, marked(keys), tell=told.append, accept=accept) as run:
            lines = list(records.read_lines(folder / CHANGES))
            kept = Marked() if finished else marked(keys)
            assert run.recipe == kept == recipe.load(Marked, folder / RECIPE)
            assert run.made("x", seed=1)["changes"] == lines
        assert {line["key"]: line["now"] for line in lines} == ({} if finished else {k: CHANGED[k] for k in keys})
        says = told[-1]
    else:
        with pytest.raises(RunError) as refused:
            Run.start(folder, marked(keys), tell=told.append, accept=accept)
        assert recipe.load(Marked, folder / RECIPE) == Marked() and not (folder / CHANGES).exists()
        consent = "--accept-changes rate" in refused.value.mend
        assert consent == (not finished and "refused" not in classes and "rate" not in accept)
        says = refused.value.found
    rows = {line.split()[0]: line.split()[-1] for line in says.splitlines()[2:]}
    assert rows == {key: VERDICTS[key] for key in keys}, "all that differs is shown, with its class"


def test_what_is_to_be_taken_back_is_told_as_it_has_to_be_typed(start, folder):
    start(Marked()).close()
    with pytest.raises(RunError) as refused:
        start(marked({"seed", "inner.rate"}))
    typed = [word for word in refused.value.mend.replace(",", "").split() if "=" in word and "..." not in word]
    assert recipe.parse(Marked, "", ["seed=2", "inner.rate=2", *typed], where="x") == Marked()


def test_a_change_is_on_record_from_the_earliest_step_that_it_holds_for(start, folder):
    start(Marked()).close()
    run = start(marked({"rate"}), accept=["rate"])
    assert "step" not in next(records.read_lines(folder / CHANGES))
    for step, earliest in ((8, 8), (12, 8), (4, 4)):
        run.went_on(step)
        assert [line["step"] for line in records.read_lines(folder / CHANGES)] == [earliest]
    run.close()
    for _ in range(2):
        start(Marked(), accept=["rate"]).close()
    assert [line["now"] for line in records.read_lines(folder / CHANGES)] == [2.0, 1.0], (
        "what has been taken back has been"
    )


def test_a_change_that_nothing_was_computed_with_is_none(start, folder):
    start(Marked()).close()
    start(marked({"rate"}), accept=["rate"]).close()
    start(marked({"rate"})).close()
    third = marked({"rate"}).model_copy(update={"rate": 3.0})
    start(third, accept=["rate"]).close()
    [line] = records.read_lines(folder / CHANGES)
    assert (line["saved"], line["now"]) == (1.0, 3.0)
    start(Marked()).close()
    assert not list(records.read_lines(folder / CHANGES)), "taken back, without consent"
    assert recipe.load(Marked, folder / RECIPE) == Marked()


def test_a_change_that_a_kill_kept_from_being_made_leaves_no_record(start, folder, monkeypatch):
    start(Marked()).close()
    write = files.write_text

    def killed(path, text):
        if path.name == RECIPE:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(files, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        start(marked({"rate", "name"}), accept=["rate"])
    monkeypatch.undo()
    assert len(list(records.read_lines(folder / CHANGES))) == 2
    run = start(marked({"name"}))
    assert [line["key"] for line in run.made("x", seed=1)["changes"]] == ["name"]
    run.close()
    start(marked({"name"}))
    assert [line["key"] for line in records.read_lines(folder / CHANGES)] == ["name"], "what was made stays on record"


def test_every_rank_is_refused_what_the_leader_is(ranks, tmp_path):
    def work(world):
        try:
            Run.start(tmp_path / "x", marked({"seed"}), tell=lambda line: None, world=world)
        except RunError as refused:
            return refused.found

    Run.start(tmp_path / "x", Marked(), tell=lambda line: None).close()
    one, other = ranks(2, work)
    assert one == other and "seed" in one


def test_a_stored_recipe_that_was_changed_by_hand_is_refused(start, folder):
    start().close()
    (folder / RECIPE).write_text((folder / RECIPE).read_text().replace("rate: ", "rate: 1"))
    for _ in range(2):
        with pytest.raises(RunError, match=r"recipe\.yaml.*its seal doesn't fit"):
            start()


@pytest.mark.parametrize("ended", ["finished", "stopped", "failed"])
@pytest.mark.parametrize("name", [RECIPE, LEDGER, METRICS])
@pytest.mark.parametrize("how", ["gone", "shorter"])
def test_a_run_that_has_lost_what_it_ended_with_is_refused(start, folder, ended, name, how):
    with start() as run:
        for step in (1, 2):
            run.log_metrics(step=step, stage=0)
            run.charge("train")
        run.finish(ended)
    path = folder / name
    lines = path.read_text().splitlines(keepends=True)
    path.unlink() if how == "gone" else path.write_text("".join(lines[:-1]))
    with pytest.raises(RunError, match=name if (name, how) != (RECIPE, "gone") else "other files"):
        start()


def test_what_a_run_adds_after_it_was_taken_up_is_no_loss(start, folder):
    for ended in ("stopped", "failed", None):
        with start() as run:
            run.log_metrics(step=1, stage=0)
            run.charge("train")
            if ended:
                run.finish(ended)
    assert start().state["status"] == "running"


def test_an_error_after_a_run_has_finished_does_not_undo_it(start, folder):
    with pytest.raises(BrokenPipeError), start() as run:
        run.finish("finished")
        raise BrokenPipeError
    assert status(folder) == "finished" and "BrokenPipeError" in (folder / LOG).read_text()


def test_an_error_without_words_is_told_by_its_class(start, folder):
    with pytest.raises(MemoryError), start():
        raise MemoryError
    assert module.why(folder) == "failed: MemoryError"


def test_what_a_user_lays_into_a_run_is_no_record_of_it(start, folder):
    with start() as run:
        run.charge("train")
        copied = Path(shutil.copy(folder / LEDGER, folder / "ledger.jsonl.bak"))
        run.finish("stopped")
    copied.unlink()
    start().close()


@pytest.mark.parametrize("step, refused", [(0, False), (1, False), (2, True)])
def test_lines_of_what_is_done_again_may_be_damaged(start, folder, step, refused):
    with start() as run:
        for number in range(4):
            run.log_metrics(step=number, stage=0)
        lines = (folder / METRICS).read_text().splitlines()
        (folder / METRICS).write_text("\n".join([*lines[:2], "\0" * len(lines[2]), lines[3], ""]))
        with pytest.raises(RunError, match=r"metrics\.jsonl:3") if refused else contextlib.nullcontext():
            run.rewind_metrics(step, stage=0)
        if not refused:
            assert [line["step"] for line in records.read_lines(folder / METRICS)] == list(range(step + 1))


def test_a_rewind_before_another_leaves_the_word_of_both(start, folder):
    with start() as run:
        for step, more in ((5, {}), (5, {"rewound_from": 9}), (2, {"rewound_from": 7})):
            run.rewind_metrics(step, stage=0)
            run.log_metrics(step=step, stage=0, **more)
        assert [line.get("rewound_from") for line in records.read_lines(folder / METRICS)] == [9, 7]


def test_who_is_gone_is_told_until_somebody_takes_the_run_up(start, folder):
    start().close()
    (folder / LOCK).write_text("process 7 on there")
    with pytest.raises(RunError):
        start(Job(name="another"))
    assert module.why(folder) == "ended without a word: process 7 on there is gone"
    start().close()
    assert module.why(folder) == ""


def test_a_refused_recipe_leaves_the_state_as_it_was(start, folder):
    with start() as run:
        run.finish("stopped", "SIGTERM")
    ended = run.state
    with pytest.raises(RunError):
        start(Job(name="another"))
    assert run.state == ended


def test_whoever_glances_at_the_status_keeps_nobody_out(start, folder):
    start().close()
    with (folder / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(module.GLANCE / 5, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        start().close()


def test_the_status_of_a_run_is_whether_somebody_is_at_work_or_how_it_ended(start, folder):
    with start() as run:
        assert status(folder) == "running"
    assert status(folder) == "unfinished", "its process ended without a word"
    with start() as run:
        run.finish("stopped")
    assert status(folder) == "stopped"
    with start() as run:
        assert status(folder) == "running"
        run.finish("finished")
    start().close()
    assert status(folder) == "finished"


def test_a_folder_with_other_files_is_refused_untouched(start, folder):
    folder.mkdir(parents=True)
    (folder / "thesis.doc").write_text("x")
    with pytest.raises(RunError, match="other files"):
        start()
    assert [path.name for path in folder.iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, f"{files.PARTIAL}{RECIPE}-7"]], ids=str)
def test_a_start_that_was_killed_at_any_moment_can_be_made_again(start, folder, left):
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).write_text("")
    start()
    assert {path.name for path in folder.iterdir()} == {LOCK, RECIPE}


def test_what_was_never_finished_is_removed_and_told(start, folder):
    start().close()
    (folder / f"{files.PARTIAL}checkpoint-3-7").mkdir()
    told = []
    start(tell=told.append)
    assert told == [f"Removed {files.PARTIAL}checkpoint-3-7: it was never finished."]
    assert not list(folder.glob(f"{files.PARTIAL}*"))


def test_a_model_that_was_about_to_be_replaced_is_there_again(start, folder):
    start().close()
    (folder / f"{files.RETIRED}final").mkdir()
    start()
    assert (folder / "final").is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_interrupts(start, number):
    told, before = [], signal.getsignal(number)
    run = start(tell=told.append)
    with pytest.raises(KeyboardInterrupt), run.signals():
        assert run.stop_signal is None
        os.kill(os.getpid(), number)
        assert run.stop_signal == number
        assert [number.name in line for line in told] == [True]
        os.kill(os.getpid(), number)
        raise AssertionError("not interrupted")
    assert signal.getsignal(number) is before


def test_a_first_signal_after_another_rank_s_does_not_interrupt(start):
    run = start()
    with run.signals():
        run.stop_signal = signal.SIGTERM  # as ranks agree
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_signal == signal.SIGTERM


@given(waits=st.lists(st.floats(0, 1e6), min_size=1, max_size=6), head_start=st.floats(0, 1e5))
@settings(deadline=None, max_examples=25)
def test_every_second_is_charged_once(tmp_path_factory, waits, head_start):
    folder, clock = tmp_path_factory.mktemp("run"), Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        began = clock.now
        clock.now += head_start
        with Run.start(folder, Job(), since=began, tell=print) as run:
            run.price(Rates(usd_per_hour=3600, watts=1000))
            for number, wait in enumerate(waits):
                clock.now += wait
                cost = run.charge("train", tokens=2, flops=3.0, stage=number)
                assert run.uncharged_seconds == pytest.approx(0, abs=1e-6)
                assert cost.usd == pytest.approx(cost.seconds)
            passed = clock.now - began  # as the clock has it: it can't tell a billionth of a second from another
            clock.now += 5
            assert run.uncharged_seconds == pytest.approx(5)
    total = sum((entry.cost for entry in read(folder / LEDGER)), Cost())
    assert total.seconds == pytest.approx(passed)
    assert (total.tokens, total.flops) == (2 * len(waits), 3.0 * len(waits))


def test_a_charge_is_entered_with_its_place_and_what_was_measured(start, folder, clock):
    run, meter = start(), iter([1.0, 1.5, 1.75])
    clock.now += 10
    run.charge("start")
    run.price(Rates(watts=1, kgco2e_per_kwh=0.5), lambda: next(meter))
    run.charge("train", stage=1, step=7)
    run.charge("train", stage=1, step=8)
    first, second, third = read(folder / LEDGER)
    assert (first.kind, first.cost.seconds, first.measured) == ("start", 10, ("seconds",))
    assert (second.stage, second.step, second.measured) == (1, 7, ("seconds", "kwh"))
    assert [entry.cost.kwh for entry in (first, second, third)] == [0, 0.5, 0.25]
    assert second.cost.kgco2e == 0.25


def test_what_is_affordable_counts_the_time_not_yet_charged(start, clock):
    run = start(cap=Cap(seconds=10))
    clock.now += 4
    assert run.affords(Cost(seconds=6)) and not run.affords(Cost(seconds=6.1))
    run.charge("train")
    assert run.affords(Cost(seconds=6)) and not run.affords(Cost(seconds=6.1))


def test_a_run_that_goes_on_counts_what_was_spent_before(start, clock):
    run = start(cap=Cap(seconds=10))
    clock.now += 4
    run.charge("train")
    run.close()
    assert not start(cap=Cap(seconds=10)).affords(Cost(seconds=7))


def test_made_says_how_a_model_came_to_be(start, folder, tmp_path, clock):
    parent = tmp_path / "parent"
    parent.mkdir()
    for name in ("config.json", "model.safetensors"):
        (parent / name).write_text("{}")
    (parent / MADE).write_text('{"run": "before"}')
    run = start(Job(rate=0.5))
    clock.now += 3
    run.charge("grow")
    made = run.made("grow.stack", seed=4, parents=(ModelFolder(parent),), growth={"k": 1})
    assert made["recipe"] == {"name": "x", "rate": 0.5, "stages": [{"size": 1}, {"size": 2}]}
    assert (made["method"], made["run"], made["seed"], made["growth"]) == ("grow.stack", "x", 4, {"k": 1})
    assert made["parents"] == [
        {"name": "parent", "fingerprint": ModelFolder(parent).fingerprint(), "made": {"run": "before"}}
    ]
    assert made["cost"] == vars(Cost(seconds=3))
    assert made["versions"]["torch"] == importlib.metadata.version("torch")
    run.write_made(folder, made)
    assert json.loads((folder / MADE).read_text()) == made


def test_an_error_ends_in_the_status_and_its_traceback_in_the_log(start, folder, clock):
    with pytest.raises(ValueError) as raised, start() as run:
        assert run.state == {"status": "running"}
        raise ValueError("odd number")
    assert raised.value.log == folder / LOG
    told = {"kind": "ValueError", "where": "ValueError: odd number"}
    ended = {"status": "failed", "time": clock.now, "reason": "odd number", "error": told}
    assert run.state == ended | {"seals": {RECIPE: records.last_seal(folder / RECIPE)}}
    assert "Traceback" in (folder / LOG).read_text()
    start()


def test_an_interrupt_is_no_failure(start):
    with pytest.raises(KeyboardInterrupt), start() as run:
        raise KeyboardInterrupt
    assert run.state == {"status": "running"}


def test_a_run_that_ends_well_keeps_its_status_and_lets_go(start):
    with start() as run:
        run.finish("finished", "all done")
    assert run.state["status"] == "finished" and run.state["reason"] == "all done"
    start()


def test_the_first_error_is_told_even_if_nothing_can_be_recorded(start, folder, monkeypatch):
    (folder / LOG).mkdir(parents=True)  # a log that can't be opened

    def full(*_):
        raise OSError(28, "No space left on device")

    records.write_signed(folder / RECIPE, recipe.dump(Job()))
    with pytest.raises(ValueError, match="the first"), start():
        monkeypatch.setattr(files, "write_json", full)
        raise ValueError("the first")
    start()


def test_each_run_logs_to_its_own_file(tmp_path):
    for name in ("a", "b"):
        with pytest.raises(ValueError), Run.start(tmp_path / name, Job(), tell=print):
            raise ValueError(f"only {name}")
    assert "only b" not in (tmp_path / "a" / LOG).read_text()
    assert "only a" not in (tmp_path / "b" / LOG).read_text()


@given(steps=st.lists(st.integers(0, 9), max_size=6), until=st.integers(0, 9), torn=st.booleans())
@settings(deadline=None, max_examples=25)
def test_metrics_are_rewound_to_a_step_and_go_on_from_there(tmp_path_factory, steps, until, torn):
    with Run.start(tmp_path_factory.mktemp("run"), Job(), tell=print) as run:
        for step in steps:
            run.log_metrics(step=step, stage=0, loss=0.5)
            run.log_metrics(step=step, stage=1, loss=0.5)
        if torn:
            with (run.folder / METRICS).open("a") as file:
                file.write('{"step": 0, "lo')
        run.rewind_metrics(until, stage=0)
        run.log_metrics(step=until, stage=0, loss=1.5)
        lines = list(records.read_lines(run.folder / METRICS))
    kept = [{"step": step, "stage": 0, "loss": 0.5} for step in steps if step <= until]
    assert lines == [*kept, {"step": until, "stage": 0, "loss": 1.5}]


@pytest.mark.parametrize(
    "end",
    [Run.flush, lambda run: run.finish("stopped"), lambda run: run.__exit__(None, None, None)],
    ids=["flushed", "ended", "let go"],
)
def test_what_was_logged_is_on_the_disk_when_a_run_says_so_or_ends(start, folder, flushed, end):
    run = start()
    run.log_metrics(step=1, stage=0)
    end(run)
    assert flushed.content(folder / METRICS) and flushed.name(folder / METRICS)


def test_files_that_are_not_there_read_as_nothing(tmp_path):
    assert records.read(tmp_path / "no.json", 7) == 7
    assert list(records.read_lines(tmp_path / "no.jsonl")) == []
