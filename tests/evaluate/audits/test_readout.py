"""A planted head is found, with answers and without, is right on what it wasn't chosen by, and is missed if silent."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from espalier.errors import DataError, RecipeError
from espalier.evaluate.audits.audit import Audit, Plan, read_heads, write_heads
from espalier.evaluate.audits.synthetic import SyntheticRecipe, synthetic
from espalier.evaluate.items import SAMPLES, read_outcomes
from espalier.evaluate.questions import Question, as_item
from espalier.report import Report
from espalier.run import RESULTS

SELECTS = (1, 3)
BARE = "{options}{question}"


def asked(n: int = 24, options: int = 4) -> list[Question]:
    return synthetic(SyntheticRecipe(n=n, options=options, phrase="{word}"))


@pytest.fixture
def audit(reader):
    """Questions read by the planted model."""

    def audit(questions=None, **told) -> Audit:
        plan = {"validation": 0.25, "given": None, "fixed": 0, "permutations": 1, "options": False, "silence": 0}
        return Audit(reader(), questions or asked(), Plan("words", **(plan | told), seed=0))

    return audit


def test_the_planted_head_is_found_and_is_always_right(audit):
    found = audit()
    report = found.report("planted")
    assert found.best() == {"qk": SELECTS, "attention": SELECTS}
    for metric in ("qk", "qk_pa", "qk_unlabelled", "attention", "logits", "logits_pa"):
        assert report.value("words", metric) == 1.0
    assert report.value("words", "qk_gain") == 0.0 and {row.n for row in report.rows} == {18}
    assert report.context["heads"]["qk"]["map"][1][3] == 1.0
    assert report.context["unlabelled"][0] == SELECTS
    anew = report.context["heads"]["qk"]["chosen_anew"]
    assert anew["low"] == anew["high"] == 1.0 and anew["picked"]["1.3"] > 0.99
    assert sum(report.context["letters"]["qk"].values()) == pytest.approx(1)


def test_what_the_letters_say_and_what_the_head_says_are_told_apart(audit, planted):
    with torch.no_grad():
        planted.lm_head.weight.zero_()
    report = audit().report("mute")
    assert report.value("words", "qk") == 1.0
    assert report.value("words", "logits") < 0.5
    gain = report.value("words", "qk") - report.value("words", "logits")
    assert report.value("words", "qk_gain") == pytest.approx(gain)
    assert report.context["letters"]["logits"]["A"] == 1.0, "of equal letters the first"


def test_without_the_head_the_letters_are_lost_and_without_others_they_are_not(audit):
    report = audit(silence=1).report("planted")
    assert report.value("words", "logits_without_best") < 0.6
    assert report.value("words", "logits_without_other") > report.value("words", "logits_without_best")
    assert report.value("words", "shift_without_best") > 0.1


def test_no_head_is_silent_where_none_shall_be(audit):
    assert not any("without" in row.metric for row in audit(silence=0).report("planted").rows)


def test_a_head_that_knows_only_where_it_is_chosen_is_worth_nothing_elsewhere(audit):
    """Its scores are set after reading: right on the questions that choose, wrong on the rest."""
    found = audit()
    scores = found.readings.heads["qk"].scores_nLHO
    scores[:] = 0
    right = np.isin(np.arange(len(scores)), found.validation)
    gold = found.readings.gold_n
    scores[np.arange(len(scores)), 0, 2, np.where(right, gold, (gold + 1) % 4)] = 1
    report = found.report("lucky")
    assert found.best()["qk"] == (0, 2)
    assert report.value("words", "qk") == 0.0


def test_permutations_count_only_what_is_right_in_both_orders(audit):
    found = audit(permutations=2)
    first, second = found.permuted
    for order in found.permuted:
        assert all(
            a.options[a.gold] == b.options[b.gold] and a.options != b.options
            for a, b in zip(found.questions, order.questions, strict=True)
        )
    first.letters_nO[:] = -np.eye(4)[first.gold_n]  # always wrong
    report = found.report("planted")
    assert report.value("words", "logits_pa") == pytest.approx(0.5)
    second.letters_nO[:] = -np.eye(4)[second.gold_n]
    assert found.report("planted").value("words", "logits_pa") == 0.0


def test_questions_of_different_sizes_with_extra_options_and_tags(audit):
    small, large = asked(12, 3), asked(12, 4)
    told = [Question(q.question, (*q.options, "winter winter"), q.gold, tags={"size": "small"}) for q in small]
    report = audit(told + large, fixed=1, options=True).report("planted")
    assert report.value("words", "qk") == 1.0
    assert report.value("words/size=small", "qk") == 1.0
    assert 0 <= report.value("words", "options") <= 1 and 0 <= report.value("words", "options_norm") <= 1


def test_a_given_head_is_read_and_judged_by_all(audit, reader, tmp_path):
    write_heads(tmp_path / "heads.json", {"qk": (1, 3), "attention": (0, 0)}, reader())
    given = read_heads(tmp_path / "heads.json", reader())
    report = audit(asked(options=6), given=given).report("planted")
    assert report.value("words", "qk") == 1.0
    assert report.value("words", "attention") < 0.5, "the one that was given, not the best"
    assert {row.n for row in report.rows} == {24} and report.context["validation"] == 0
    assert not any(row.metric.endswith(("_top", "_sum")) for row in report.rows)


@pytest.mark.parametrize(
    ("heads", "told"),
    [
        ({"qk": (2, 0), "attention": (0, 0)}, "for qk"),
        ({"qk": (0, 5), "attention": (0, 0)}, "for qk"),
        ({"qk": (0, 0), "attention": (-1, 0)}, "for attention"),
        ({"qk": (0, 0)}, "for attention"),
    ],
)
def test_a_head_that_the_model_has_not_got_is_refused(reader, tmp_path, heads, told):
    write_heads(tmp_path / "heads.json", heads, reader())
    with pytest.raises(RecipeError) as refused:
        read_heads(tmp_path / "heads.json", reader())
    assert told in refused.value.expected


def test_a_head_that_was_read_elsewhere_is_refused(reader, tmp_path):
    heads = {"qk": (0, 0), "attention": (0, 0)}
    for told in ({"token": "content"}, {"vectors": "projected"}):
        write_heads(tmp_path / "heads.json", heads, reader(**told))
        with pytest.raises(RecipeError, match=next(iter(told.values()))):
            read_heads(tmp_path / "heads.json", reader())
    (tmp_path / "heads.json").write_text("{}\n")
    with pytest.raises(DataError, match="token"):
        read_heads(tmp_path / "heads.json", reader())
    (tmp_path / "heads.json").write_text("")
    with pytest.raises(RecipeError, match="for qk"):
        read_heads(tmp_path / "heads.json", reader())


def test_too_few_questions_to_choose_and_judge_are_refused(audit):
    with pytest.raises(DataError, match="0 of them to choose"):
        audit(asked(4), validation=0.1)


@pytest.fixture
def readout(espalier, planted_folder, tmp_path):
    """`espalier evaluate readout` on the planted folder; how it ended, and the run's folder."""

    def readout(*more: str, name: str = "read"):
        shape = (f"template={BARE}", "cloze='{question}'", f"model={planted_folder}", "threads=1")
        done = espalier("evaluate", "readout", *shape, *more, f"--name={name}")
        return done, tmp_path / "runs" / name

    return readout


def test_a_run_leaves_rows_outcomes_and_a_head_for_other_questions(readout, tmp_path):
    done, run = readout("questions.n=24", "questions.phrase='{word}'", "validation=0.25", "silence=0")
    assert done.code == 0, done.err
    report = Report.load(run / RESULTS)
    assert report.value("synthetic", "qk") == 1.0 and "1.3" in done.out
    outcomes = read_outcomes(run / SAMPLES)
    assert len(outcomes) == 18
    for metric in outcomes[0].scores:
        mean = sum(outcome.scores[metric] for outcome in outcomes) / len(outcomes)
        assert mean == pytest.approx(report.value("synthetic", metric))
    head = run / "mcq_head.json"
    assert json.loads(head.read_text())["heads"]["qk"] == list(SELECTS)
    rows = [{"question": q.question, "options": q.options, "answer": q.options[q.gold]} for q in asked(6, 3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = (f"questions={tmp_path / 'mine.jsonl'}", f"heads={head}", "also=[attention]", "extra=[winter island]")
    done, run = readout(*more, name="again")
    assert done.code == 0, done.err
    assert Report.load(run / RESULTS).value("mine", "qk") == 1.0
    wanted = {as_item(q.with_options(["winter island"]), "mine", "letters", BARE).id for q in asked(6, 3)}
    assert {outcome.id for outcome in read_outcomes(run / SAMPLES)} == wanted


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        ("template={question}", 2, "template"),
        ("cloze={question}{options}", 2, "cloze"),
        ("extra=[none, none]", 3, "an option twice"),
        ("questions=nowhere.jsonl", 3, "nowhere.jsonl"),
        ("questions.options=25", 2, "questions.options"),
        ("questions.phrase=word", 2, "questions.phrase"),
    ],
)
def test_what_cannot_be_read_is_refused(readout, more, code, told):
    done, _ = readout(more)
    assert (done.code, told in done.err) == (code, True), done.err
