"""lm-eval's tasks over our engines give what lm-eval's own backend gives, ask nothing twice, and say what they were."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from espalier.errors import BudgetError, DataError, RecipeError, ResourceError
from espalier.evaluate import tasks
from espalier.evaluate.ask import AskRecipe, ask
from espalier.evaluate.iq import tasks as iq
from espalier.evaluate.items import SAMPLES, Item, read_outcomes, write_items
from espalier.evaluate.kept import ANSWERS
from espalier.evaluate.tasks import TasksRecipe, evaluate_tasks
from espalier.infer.engine import Engine, Generate, Score
from espalier.ledger import Cost
from espalier.report import Report
from espalier.run import LOG, RESULTS, Run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import hash_string

    from espalier.evaluate import suite
    from espalier.evaluate.harness import Harness

# lm-eval's own and those of what it loads; ours would still be errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def run_tasks(told: TasksRecipe, run: Run, engine: Engine) -> Report:
    """The report that a run keeps."""
    tasks.run_tasks(told, run, engine)
    return Report.load(run.folder / RESULTS)


WORDS = ["apple", "pear", "plum", "fig", "kiwi", "lime", "date", "nut"]
KINDS = {
    "task": "kinds",
    "output_type": "multiple_choice",
    "training_split": "train",
    "fewshot_split": "train",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    + [{"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}],
    "metadata": {"version": 2},
}
SUMS = {
    "task": "sums",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}\n",
    "doc_to_target": "{{choices[right]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "none", "filter": [{"function": "take_first"}]},
        {"name": "letters", "filter": [{"function": "regex", "regex_pattern": "([a-z]+)"}, {"function": "take_first"}]},
    ],
}
LAST = {
    "task": "last",
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{choices[right]}}",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
TEXTS = {
    "task": "texts",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}} {{choices|join(' ')}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
GROUP = {
    "group": "fruit",
    "task": ["kinds", "last"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No network, and a cache of datasets of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(autouse=True)
def only_these(monkeypatch):
    """lm-eval's own tasks take many seconds to list, and aren't needed."""
    monkeypatch.setattr(suite, "TaskManager", lambda **told: TaskManager(**told | {"include_defaults": False}))
    monkeypatch.setattr(suite, "BOOTSTRAPS", 10)


def rows(n: int, seed: int) -> list[dict]:
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        choices = draw.sample(WORDS, 3)
        found.append({"question": " ".join(draw.choices(WORDS, k=5)), "choices": choices, "right": draw.randrange(3)})
    return found


def write_tasks(folder: Path, *configs: dict, n: int = 80) -> Path:
    """A user's folder: YAML tasks over JSON lines beside them."""
    for split, size in (("train", 20), ("test", n)):
        lines = [json.dumps(row) + "\n" for row in rows(size, seed=size)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test"}
    for config in configs:
        whole = config if "group" in config else data | config
        (folder / f"{config.get('task') if 'group' not in config else config['group']}.yaml").write_text(
            yaml.safe_dump(whole)
        )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), KINDS, SUMS, LAST, TEXTS, GROUP)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model of three layers that knows bytes."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {byte: number for number, byte in enumerate(alphabet, start=1)}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = LlamaConfig(
        vocab_size=257, max_position_embeddings=512, initializer_range=0.4, eos_token_id=0, bos_token_id=0, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def recipe(folder) -> Callable[..., TasksRecipe]:
    def recipe(*names: str, **told) -> TasksRecipe:
        return TasksRecipe(
            **{"model": "m", "url": "http://nowhere", "include_path": (folder,)} | {"tasks": names} | told
        )

    return recipe


def varied(prompt: str, text: str = "") -> float:
    """Any probability, always the same."""
    return -1 - random.Random(prompt + "|" + text).random()


def lm_eval_results(run) -> dict:
    [path] = run.folder.glob("results_*.json")
    return json.loads(path.read_text())


def metrics(values: dict) -> dict:
    return {key: value for key, value in values.items() if "," in key and "stderr" not in key}


def test_the_scores_are_those_of_lm_eval_s_own_backend(tmp_path, model, recipe, make_run, shared_home, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))
    folder = write_tasks(tmp_path, KINDS, SUMS, LAST, TEXTS, GROUP, n=40)
    names = ["fruit", "sums", "texts"]
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    backend = HFLM(pretrained=str(model), device="cpu", batch_size=1, max_length=512)
    theirs = simple_evaluate(backend, tasks=names, num_fewshot=2, task_manager=manager, bootstrap_iters=0)
    run = make_run()
    told = recipe(*names, num_fewshot=2, include_path=(folder,), model=str(model), url="", local={"threads": 1})
    evaluate_tasks(told, run)
    report = Report.load(run.folder / RESULTS)
    ours = lm_eval_results(run)
    assert set(ours["results"]) == {"fruit", "kinds", "last", "sums", "texts"}
    for name, values in ours["results"].items():
        expected = metrics(theirs["results"][name])
        assert metrics(values) == {
            key: value if "perplexity" not in key and "bits" not in key else pytest.approx(value, rel=1e-6)
            for key, value in expected.items()
        }
    assert 0 < report.value("kinds", "acc") < 1
    assert ours["n-shot"] == theirs["n-shot"] and ours["configs"] == theirs["configs"]
    for name, samples in theirs["samples"].items():
        parts = [one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in samples]
        assert ours["task_hashes"][name] == hash_string("".join(parts))


def test_our_model_of_lm_eval_is_one_that_its_evaluator_takes(folder, model, scripted):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    engine = scripted(score=varied)
    found = simple_evaluate(Harness(engine), tasks=["kinds"], limit=10, task_manager=manager, bootstrap_iters=0)
    assert found["results"]["kinds"]["sample_len"] == 10 and len(engine.asked) == 30


def test_a_report_has_a_row_for_each_task_metric_and_filter(recipe, scripted, make_run):
    run = make_run()
    report = run_tasks(recipe("fruit", "sums"), run, scripted(lambda prompt: "Plum!\nfig", varied))
    assert {(row.task, row.metric) for row in report.rows} == {
        ("kinds", "acc"),
        ("kinds", "acc_norm"),
        ("kinds", "mcc"),
        ("last", "acc"),
        ("last", "perplexity"),
        ("fruit", "acc"),
        ("sums", "exact_match"),
        ("sums", "exact_match,letters"),
    }
    assert report == Report.load(run.folder / RESULTS)
    for row in report.rows:
        assert row.n == (160 if row.task == "fruit" else 80)
        assert row.stderr is not None
    assert report.context["higher_is_better"]["last"] == {"acc": True, "perplexity": False}
    assert report.context["groups"] == {"fruit": ["kinds", "last"]}
    results = lm_eval_results(run)
    for row in report.rows:
        key = row.metric if "," in row.metric else f"{row.metric},none"
        assert results["results"][row.task][key] == row.value
    assert results["versions"]["kinds"] == 2 and results["model_source"] == "espalier"


def test_every_document_has_its_outcome_with_the_scores_that_are_means(recipe, scripted, make_run):
    run = make_run()
    report = run_tasks(recipe("kinds", "last", "texts"), run, scripted(score=varied))
    outcomes = read_outcomes(run.folder / SAMPLES)
    assert len(outcomes) == len({outcome.id for outcome in outcomes}) == 240
    for task, names in {"kinds": {"acc", "acc_norm"}, "last": {"acc"}, "texts": set()}.items():
        mine = [outcome for outcome in outcomes if outcome.task == task]
        assert all(set(outcome.scores) == names for outcome in mine)
        for name in names:
            assert report.value(task, name) == pytest.approx(sum(outcome.scores[name] for outcome in mine) / 80)
    for outcome in [outcome for outcome in outcomes if outcome.task == "kinds"]:
        assert outcome.chance == pytest.approx(1 / 3) and len(outcome.logprobs) == 3
        assert (outcome.said == outcome.gold) == bool(outcome.scores["acc"])
    assert report.context["tasks"]["kinds"]["chance"] == pytest.approx(1 / 3)


def test_a_drawn_document_has_the_prompt_that_the_whole_task_gives_it(recipe, scripted, make_run):
    whole, some = scripted(score=varied), scripted(score=varied)
    run_tasks(recipe("kinds", num_fewshot=3), make_run(), whole)
    run = make_run()
    report = run_tasks(recipe("kinds", num_fewshot=3, limit=12, seed=5), run, some)
    assert len(some.asked) == 36 and set(some.asked) < set(whole.asked)
    assert report.rows[0].n == 12 and lm_eval_results(run)["n-samples"]["kinds"] == {"original": 80, "effective": 12}
    first = {request.prompt for request in whole.asked[-3:]}
    assert not any(first <= {request.prompt} for request in some.asked), "drawn, not the first ones"


def test_rounds_ask_until_the_score_is_sure_enough_and_nothing_twice(recipe, scripted, make_run):
    sure = scripted(score=lambda prompt, text: 0.0)
    run = make_run()
    report = run_tasks(recipe("last", stderr=0.06), run, sure)
    assert report.value("last", "acc") == 1 and report.rows[0].n == 50
    unsure = scripted(score=varied)
    report = run_tasks(recipe("kinds", stderr=0.06), make_run(), unsure)
    assert 50 < report.rows[0].n <= 80
    assert len(unsure.asked) == len(set(unsure.asked)) == 3 * report.rows[0].n
    blank = scripted(score=varied)
    assert run_tasks(recipe("texts", stderr=0.5), make_run(), blank).rows[0].n == 80, "has no score a document"


def test_a_run_that_was_stopped_goes_on_where_it_was(recipe, scripted, make_run):
    told = recipe("kinds", "sums")
    whole = run_tasks(told, make_run(), scripted(lambda prompt: prompt[:4], varied))
    run, engine = make_run(), scripted(lambda prompt: prompt[:4], varied)
    answers = engine.answers

    def stops(requests):
        for count, answer in enumerate(answers(requests)):
            if count == 100:
                raise KeyboardInterrupt
            yield answer

    engine.answers = stops
    with pytest.raises(KeyboardInterrupt):
        run_tasks(told, run, engine)
    with (run.folder / ANSWERS).open("a") as file:
        file.write('{"request": "torn')
    again = scripted(lambda prompt: prompt[:4], varied)
    report = run_tasks(told, run, again)
    assert len(again.asked) == 320 - 100 and not set(again.asked) & set(engine.asked[:100])
    assert report == whole
    assert run.ledger.total.usd == pytest.approx(3.20, abs=1.01)


def test_another_model_isn_t_given_what_the_first_one_answered(recipe, scripted, make_run):
    run = make_run()
    run_tasks(recipe("last"), run, scripted(score=varied))
    (run.folder / SAMPLES).unlink()
    other = scripted(score=varied)
    other.identity = "other"
    run_tasks(recipe("last"), run, other)
    assert len(other.asked) == 80


def test_what_the_budget_cannot_pay_is_refused_and_what_turns_out_dear_ends_with_what_there_is(
    recipe, scripted, make_run, told
):
    engine = scripted(score=varied)
    with pytest.raises(BudgetError, match=r"\$2.40 for 80 items"):
        run_tasks(recipe("kinds", budget={"usd": 1.5}), make_run(), engine)
    assert not engine.asked
    engine.estimate = lambda requests: Cost()
    run = make_run()
    report = run_tasks(recipe("kinds", "last", budget={"usd": 1.5}), run, engine)
    assert 0 < sum(row.n for row in report.rows if row.metric == "acc") < 160
    assert run.ledger.total.usd <= 1.5 and any("The budget is spent" in text for text in told)


def test_a_budget_that_pays_for_nothing_ends_with_an_empty_report(recipe, scripted, make_run):
    engine = scripted(score=varied)

    def spent(requests):
        yield from ()
        raise BudgetError("budget: usd", found="$0", expected="$1", mend="")

    engine.answers = spent
    report = run_tasks(recipe("fruit"), make_run(), engine)
    assert report.rows == [] and report.context["tasks"]["kinds"]["answered"] == 0


def test_a_question_that_is_repeated_is_sampled_with_other_seeds(tmp_path, recipe, scripted, make_run):
    told = {"until": ["\n"], "do_sample": True, "temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    write_tasks(tmp_path, SUMS | {"task": "often", "repeats": 3, "generation_kwargs": told}, n=5)
    engine = scripted(lambda prompt: "fig")
    run_tasks(recipe("often", include_path=(tmp_path,)), make_run(), engine)
    assert {(one.seed, one.temperature, one.top_p, one.max_new_tokens) for one in engine.asked} == {
        (seed, 0.5, 0.9, 7) for seed in range(3)
    }
    write_tasks(tmp_path, SUMS | {"task": "often", "repeats": 3}, n=5)
    greedy = scripted(lambda prompt: "fig")
    run_tasks(recipe("often", include_path=(tmp_path,)), make_run(), greedy)
    assert len(greedy.asked) == 5, "what can only be the same is asked once"


def test_a_conversation_is_written_by_the_model_s_template(tmp_path, recipe, scripted, make_run):
    write_tasks(tmp_path, SUMS, KINDS, SUMS | {"task": "begun", "gen_prefix": "It is"}, n=5)
    engine = scripted(lambda prompt: "fig", varied)
    run = make_run()
    names = ("sums", "kinds", "begun")
    report = run_tasks(recipe(*names, include_path=(tmp_path,), template="chat", num_fewshot=1), run, engine)
    written = [request.prompt for request in engine.asked if isinstance(request, Generate)]
    assert sum(prompt.endswith("\nIt is") for prompt in written) == 5
    assert all(prompt.startswith("user: ") and prompt.count("assistant: ") == 1 for prompt in written)
    assert all(request.continuation in WORDS for request in engine.asked if isinstance(request, Score))
    plain = run_tasks(recipe("sums", include_path=(tmp_path,)), make_run(), scripted(lambda prompt: "fig"))
    assert report.context["template"] and plain.context["template"] is None
    assert lm_eval_results(run)["chat_template"] == "user: ?\n"


def test_hashes_tell_tasks_prompts_and_templates_apart(tmp_path, recipe, scripted, make_run):
    (tmp_path / "own.py").write_text("def ask(doc):\n    return doc['question']\n")

    def hashes(text="!function own.ask", n=20, **told) -> tuple[str, str]:
        write_tasks(tmp_path, KINDS, n=n)
        path = tmp_path / "kinds.yaml"
        path.write_text(path.read_text().replace("doc_to_text: '{{question}}\n\n  Answer:'", f"doc_to_text: {text}"))
        assert text in path.read_text()
        run = make_run()
        found = run_tasks(recipe("kinds", include_path=(tmp_path,), **told), run, scripted(score=varied))
        return found.context["tasks"]["kinds"]["task"], found.context["tasks"]["kinds"]["prompts"]

    task, prompts = hashes()
    assert hashes() == (task, prompts) == hashes(limit=5)
    assert hashes(num_fewshot=1) != (task, prompts)
    assert hashes(n=21)[0] != task
    assert hashes(template="chat")[0] == task and hashes(template="chat")[1] != prompts
    (tmp_path / "own.py").write_text("def ask(doc):\n    return doc['question'] + '?'\n")
    assert hashes()[0] != task and hashes()[1] != prompts


def items(n: int) -> list[Item]:
    draw = random.Random(n)
    found = []
    for number in range(n):
        options = tuple(f" {word}" for word in draw.sample(WORDS, 3))
        found.append(Item("choose", f"{number} {{{{braces}}}} of ", options[number % 3], options))
        found.append(Item("write", f"say {number}:\n", f"{number}", max_new_tokens=8 + number))
        found.append(Item("bytes", f"[{number}]", f" [{number}]", stop=("#", "\n")))
    return found


def test_items_score_the_same_through_lm_eval_as_when_they_are_asked(tmp_path, recipe, scripted, make_run):
    write_items(tmp_path / "own.jsonl", items(40))
    by_task = {task: [item for item in items(40) if item.task == task] for task in ("choose", "write", "bytes")}

    def write(prompt: str) -> str:
        return prompt.strip("say:[]\n") + ("\nmore" if len(prompt) % 2 else "0")

    run, same = make_run(), make_run()
    asked = ask(by_task, AskRecipe(model="m", url="http://nowhere"), run, scripted(write, varied))
    report = run_tasks(recipe(f"items:{tmp_path / 'own.jsonl'}"), same, scripted(write, varied))
    assert [(row.task, row.metric, row.value, row.n) for row in report.rows] == [
        (row.task, row.metric, row.value, row.n) for row in asked.rows
    ]
    assert [row.stderr for row in report.rows] == pytest.approx([row.stderr for row in asked.rows])
    assert {row.value for row in report.rows} - {0.0, 1.0}
    first, second = (
        {(one.task, one.gold.strip(), one.said, one.logprobs, tuple(one.scores.items())) for one in read_outcomes(path)}
        for path in (run.folder / SAMPLES, same.folder / SAMPLES)
    )
    assert first == second


def test_every_generator_of_ours_is_a_task_of_lm_eval(scripted, recipe, make_run):
    manager = TaskManager(include_path=str(suite.lm_tasks.PATH), include_defaults=False)
    assert manager.all_subtasks == sorted(f"espalier_iq_{name}" for name in iq.TASKS)
    groups = {group: f"espalier_iq_{group.replace(' ', '_').replace('-', '_')}" for group in iq.GROUPS}
    assert manager.all_groups == sorted(["espalier_iq", *groups.values()])
    engine = scripted(score=varied)
    report = run_tasks(recipe("espalier_iq", limit=3, include_path=()), make_run(), engine)
    assert report.context["groups"] == {"espalier_iq": list(groups.values())} | {
        name: [f"espalier_iq_{task.name}" for task in iq.TASKS.values() if task.group == group]
        for group, name in groups.items()
    }
    asked = ask(
        {"espalier_iq_topic": list(iq.TASKS["topic"].items(iq.TASKS["topic"].n))},
        AskRecipe(model="m", url="http://nowhere", limit=3),
        make_run(),
        scripted(score=varied),
    )
    assert asked.value("espalier_iq_topic", "acc") == report.value("espalier_iq_topic", "acc")


def test_what_lm_eval_says_is_in_the_run_s_log_and_nowhere_else(recipe, scripted, make_run, capfd):
    run = make_run()
    run_tasks(recipe("kinds", "last"), run, scripted(score=varied))
    assert "Building contexts for kinds" in (run.folder / LOG).read_text()
    out, err = capfd.readouterr()
    assert "Building" not in out + err and "%|" not in err


@pytest.mark.parametrize(
    ("name", "mend"),
    [("kind", "'kinds'"), ("espalier_iq_countin", "'espalier_iq_counting'"), ("zzz", "lm-eval ls"), ("no.yaml", "ls")],
)
def test_an_unknown_task_is_answered_with_the_nearest(recipe, scripted, make_run, name, mend):
    with pytest.raises(RecipeError, match=name) as refused:
        run_tasks(recipe("kinds", name), make_run(), scripted())
    assert mend in refused.value.mend


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"unsafe_code": True}, RecipeError, "unsafe_code=run"),
        ({"doc_to_image": "question"}, RecipeError, "text alone"),
        ({"dataset_path": "nobody/nothing", "dataset_kwargs": {}}, DataError, "HF_HUB_OFFLINE"),
        ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, DataError, "log has the traceback"),
        ({"doc_to_text": "{{question"}, DataError, "log has the traceback"),
        ({"doc_to_choice": "!"}, DataError, "log has the traceback"),
        ({"test_split": "none"}, DataError, "none"),
        ({"metric_list": [{"metric": "nothing"}]}, DataError, "log has the traceback"),
        ({"metric_list": [{"metric": "acc", "aggregation": "men"}]}, DataError, "no aggregation of acc"),
        ({"metric_list": [{"metric": "f1"}]}, DataError, "multiclass"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_task_that_cannot_be_run_is_refused(tmp_path, recipe, scripted, make_run, change, error, said):
    write_tasks(tmp_path, KINDS | change, n=3)
    if "test" in (change.get("dataset_kwargs") or {}).get("data_files", {}):
        (tmp_path / "kinds.yaml").write_text(
            yaml.safe_dump(KINDS | {"dataset_path": "json", "test_split": "test"} | change)
        )
    with pytest.raises(error, match=said):
        run_tasks(recipe("kinds", include_path=(tmp_path,)), make_run(), scripted(score=varied))


def test_unsafe_code_is_run_where_the_recipe_says_so(tmp_path, recipe, scripted, make_run):
    write_tasks(tmp_path, KINDS | {"unsafe_code": True}, n=3)
    told = recipe("kinds", include_path=(tmp_path,), unsafe_code="run")
    assert run_tasks(told, make_run(), scripted(score=varied)).rows[0].n == 3


def test_a_setting_that_no_engine_knows_is_refused(tmp_path, recipe, scripted, make_run):
    write_tasks(tmp_path, SUMS | {"generation_kwargs": {"until": ["\n"], "num_beams": 4}}, n=3)
    with pytest.raises(RecipeError, match=r"sums: generation_kwargs\.num_beams"):
        run_tasks(recipe("sums", include_path=(tmp_path,)), make_run(), scripted())


def test_items_of_two_kinds_in_one_task_are_refused(tmp_path, recipe, scripted, make_run):
    path = tmp_path / "mixed.jsonl"
    write_items(path, [Item("a", "x", "y"), Item("a", "x", "y", ("y", "z"))])
    with pytest.raises(DataError, match="Give each kind a task"):
        run_tasks(recipe(f"items:{path}"), make_run(), scripted())
    with pytest.raises(DataError, match="No such file"):
        run_tasks(recipe(f"items:{tmp_path / 'none.jsonl'}"), make_run(), scripted())


def test_a_folder_that_is_not_there_is_refused(tmp_path, recipe, scripted, make_run):
    with pytest.raises(RecipeError, match="include_path"):
        run_tasks(recipe("kinds", include_path=(tmp_path / "no",)), make_run(), scripted())


def test_a_missing_lm_eval_is_answered_with_how_to_install_it(recipe, make_run, monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"pip install 'espalier\[tasks\]'"):
        evaluate_tasks(recipe("kinds"), make_run())
