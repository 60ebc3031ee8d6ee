"""A server answers as its model would, or fails in every way there is: answers are right, come once, are paid once."""

import importlib.util
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from espalier import files
from espalier.errors import BudgetError, DataError, RecipeError, ResourceError, RunError
from espalier.infer import remote
from espalier.infer.engine import Answer, Generate, Score, answer_all, open_engine
from espalier.infer.recipe import EngineRecipe
from espalier.ledger import Cost, Ledger
from espalier.run import LEDGER

STUB = Path(__file__).with_name("stub.py")
spec = importlib.util.spec_from_file_location("stub", STUB)
stub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stub)

PROMPTS = [f"Tree {number} says" for number in range(40)]
SCORES = [Score(prompt, option) for prompt in PROMPTS for option in (" yes", " no, never")]
WRITTEN = [Generate(prompt, max_new_tokens=8) for prompt in PROMPTS]


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)


@pytest.fixture
def serve():
    """Start a stub."""
    started = []

    def serve(**settings):
        started.append(stub.Stub(**settings).__enter__())
        return started[-1]

    yield serve
    for each in started:
        each.__exit__()


@pytest.fixture
def connect(make_run):
    """Open an engine that asks a stub; `cap` is the run's."""
    opened = []

    def connect(server, *, cap=None, model="hash", **settings):
        recipe = EngineRecipe(model=model, url=server.url, remote={"timeout_seconds": 5.0, **settings})
        opened.append(open_engine(recipe, make_run(**(cap or {}))))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()


def until(condition) -> None:
    """Wait until something holds, ten seconds at most."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def require_right(request, answer: Answer) -> None:
    """The answer is the one that the stub's model gives."""
    model = stub.Model()
    if isinstance(request, Score):
        tokens, logprobs, greedy = model.score(request.prompt, request.continuation)
        assert (answer.text, answer.tokens) == (request.continuation, tokens)
        assert (answer.logprobs, answer.greedy, answer.finish) == (logprobs, greedy, "scored")
    else:
        sampled = request.temperature and request.seed
        text = "".join(model.write(request.prompt, request.max_new_tokens, request.stop, sampled))
        assert answer.text == stub._cut(text, request.stop)


def require_all_right(requests, answers) -> None:
    assert len(answers) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        require_right(request, answer)


# What is asked, and what is understood of the reply


@pytest.mark.parametrize("mark", ["", "<s>"])
def test_a_continuation_has_the_probabilities_of_its_own_tokens(serve, connect, mark):
    odd = [("A frame, ", "and a tree"), ("It gro", "ws"), ("Two\n\n", "lines"), ("a", " b")]
    requests = SCORES + [Score(*pair) for pair in odd]
    answers = answer_all(connect(serve(mark=mark)), requests)
    require_all_right(requests, answers)
    assert {answer.greedy for answer in answers} == {True, False}
    assert answers[0].prompt_tokens == len(stub.Model.tokens(PROMPTS[0])) + bool(mark)
    assert answers[0].completion_tokens == 1


def test_what_is_written_scores_as_it_was_written(serve, connect):
    engine = connect(serve())
    written = answer_all(engine, WRITTEN)
    again = [Score(request.prompt, answer.text) for request, answer in zip(WRITTEN, written, strict=True)]
    scored = answer_all(engine, again)
    for one, other in zip(written, scored, strict=True):
        assert (one.tokens, one.logprobs, one.greedy) == (other.tokens, other.logprobs, other.greedy)


def test_scores_of_one_text_after_different_prompts_are_different_requests(serve, connect):
    requests = [Score("a tree", " on a frame"), Score("a tree on", " a frame")]
    require_all_right(requests, answer_all(connect(serve()), requests))


@pytest.mark.parametrize(
    ("api", "refuses"),
    # Only chat has another name for max_tokens.
    [
        ("completions", ()),
        ("completions", ("logprobs",)),
        ("chat", ()),
        ("chat", ("logprobs",)),
        ("chat", ("max_tokens",)),
    ],
    ids=str,
)
def test_text_is_written_with_or_without_probabilities(serve, connect, api, refuses):
    requests = [
        *WRITTEN,
        Generate(PROMPTS[0], 30, stop=("frame", " is")),
        Generate(PROMPTS[1], temperature=1.0, seed=3),
    ]
    answers = answer_all(connect(serve(refuses=refuses), api=api), requests)
    require_all_right(requests, answers)
    for answer in answers:
        assert "".join(answer.tokens) == (answer.text if not refuses else "")
        assert len(answer.logprobs) == len(answer.tokens)
    assert answers[0].finish == "length" and answers[-2].finish == "stop"


def test_a_stop_that_a_server_leaves_in_is_cut_off(serve, connect, monkeypatch):
    server = serve()
    told = server.complete

    def sloppy(body):
        reply = told(body)
        reply["choices"][0]["text"] = "".join(reply["choices"][0]["logprobs"]["tokens"])
        return reply

    monkeypatch.setattr(server, "complete", sloppy)
    request = Generate(PROMPTS[0], 30, stop=("frame", " is"))
    [answer] = answer_all(connect(server), [request])
    require_right(request, answer)
    assert answer.finish == "stop"


def test_a_refused_way_of_asking_is_tried_once(serve, connect):
    server = serve(refuses=("logprobs",))
    engine = connect(server, concurrency=1)
    sent = []
    post = engine._client.post
    engine._client.post = lambda *args, **more: sent.append(json.loads(more["content"])) or post(*args, **more)
    answer_all(engine, WRITTEN[:5])
    assert ["logprobs" in body for body in sent] == [True, *[False] * 5]


def test_seeds_and_temperatures_are_asked_apart(serve, connect):
    requests = [Generate("A", 20, temperature=temperature, seed=seed) for temperature in (0.0, 1.0) for seed in (0, 1)]
    texts = [answer.text for answer in answer_all(connect(serve()), requests)]
    assert texts[0] == texts[1] and len(set(texts)) == 3


@pytest.mark.parametrize("server", [{"hides": True}, {"refuses": ("echo",)}], ids=str)
def test_a_server_that_tells_no_probabilities_cant_score(serve, connect, server):
    with pytest.raises(RunError, match=r"echo") as refused:
        answer_all(connect(serve(**server)), SCORES[:1])
    assert "status 400" in str(refused.value) or "'Tree 0 says yes" in refused.value.found


def test_what_a_server_writes_isnt_taken_for_what_it_was_given(serve, connect, monkeypatch):
    server = serve()
    told = server.complete
    monkeypatch.setattr(server, "complete", lambda body: told({k: v for k, v in body.items() if k != "echo"}))
    [written] = server.model.write("Tree 0 says the", 1)
    with pytest.raises(RunError, match="echo"):
        answer_all(connect(server), [Score("Tree 0 says the", written)])


def test_nothing_is_said_of_a_text_that_the_server_didnt_echo(serve, connect, monkeypatch):
    server = serve()
    told = server.complete
    monkeypatch.setattr(server, "complete", lambda body: told(body | {"prompt": body["prompt"].upper()}))
    with pytest.raises(RunError, match="TREE 0 SAYS YES"):
        answer_all(connect(server), SCORES[:1])


def test_a_first_token_has_no_probability_and_a_mark_before_it_gives_it_one(serve, connect):
    with pytest.raises(RunError, match="give a prompt"):
        answer_all(connect(serve()), [Score("", "grows a tree")])
    with pytest.raises(RunError, match="finds the tokens"):
        answer_all(connect(serve()), [Score("gro", "ws")])
    requests = [Score("", "grows a tree"), Score("gro", "ws")]
    require_all_right(requests, answer_all(connect(serve(mark="<s>")), requests))


def test_no_text_has_no_probability(serve, connect):
    with pytest.raises(DataError, match="at least a character"):
        answer_all(connect(serve()), [*SCORES, Score("A tree", "")])


def test_chat_cant_score(serve, connect):
    server = serve()
    with pytest.raises(RecipeError, match=r"remote\.api=completions"):
        answer_all(connect(server, api="chat"), SCORES[:1])
    assert not server.came


# A tokenizer of one's own


@pytest.fixture
def words(tmp_path) -> Path:
    """A tokenizer that splits as the stub's does."""
    folder = tmp_path / "words"
    folder.mkdir()
    vocabulary = {token: number for number, token in enumerate(["<end>", "?"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\W"), "isolated")
    made.add_special_tokens(["<end>"])
    made.save(str(folder / "tokenizer.json"))
    template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template += "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[me]{% endif %}"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "bos_token": "<end>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_tokenizer_counts_and_finds_the_same_tokens(serve, connect, words):
    engine = connect(serve(), tokenizer=words)
    assert engine.exact and engine.count("a tree, grown") == 4
    requests = [*SCORES[:10], Score("It gro", "ws"), Score("Two\n\n", "lines")]
    require_all_right(requests, answer_all(engine, requests))


def test_a_tokenizer_finds_tokens_that_dont_add_up_to_the_text(serve, connect, words, monkeypatch):
    server = serve()
    told = server._columns
    monkeypatch.setattr(server, "_columns", lambda *a: (c := told(*a)) | {"tokens": [t.strip() for t in c["tokens"]]})
    [answer] = answer_all(connect(server, tokenizer=words), [Score("a tree", " on a frame")])
    assert answer.logprobs == stub.Model().score("a tree", " on a frame")[1]
    with pytest.raises(RunError, match=r"remote\.tokenizer=FOLDER"):
        answer_all(connect(server), [Score("a tree", " on a frame")])


def test_another_models_tokenizer_is_noticed(serve, connect, words):
    with pytest.raises(RunError, match="the tokenizer of the model that is asked"):
        answer_all(connect(serve(mark="<s>"), tokenizer=words), SCORES[:1])


def test_a_score_without_a_prompt_comes_after_an_end_of_text(serve, connect, words, monkeypatch):
    server = serve()
    tokens = server.model.tokens
    server.model.tokens = lambda text: ["<end>", *tokens(text[5:])] if text.startswith("<end>") else tokens(text)
    [answer] = answer_all(connect(server, tokenizer=words), [Score("", "a tree")])
    assert answer.tokens == ("a", " tree")
    assert answer.logprobs == tuple(stub.Model.logprob(*pair) for pair in (("<end>", "a"), ("<end>a", " tree")))


def test_without_a_tokenizer_tokens_are_estimated(serve, connect):
    engine = connect(serve())
    assert not engine.exact
    assert [engine.count(text) for text in ("", "a", "four", "eights..", "é€", "\ud800")] == [0, 1, 1, 2, 2, 1]


def test_a_conversation_is_written_by_whose_template_it_is(serve, connect, words):
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert connect(serve(), tokenizer=words).chat(talk) == "<end>[system]Be short.[user]Hi[me]"
    marking = Tokenizer.from_file(str(words / "tokenizer.json"))
    marking.post_processor = processors.TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 0)])
    marking.save(str(words / "tokenizer.json"))
    assert connect(serve(), tokenizer=words).chat(talk) == "[system]Be short.[user]Hi[me]", "the server marks it"
    assert connect(serve(), api="chat").chat(talk) == "Be short.\n\nHi"
    assert connect(serve(), api="chat").chat(talk[1:]) == "Hi"
    with pytest.raises(RecipeError, match=r"remote\.tokenizer=FOLDER"):
        connect(serve()).chat(talk)
    with pytest.raises(DataError, match="no tools"):
        connect(serve(), tokenizer=words).chat([{"role": "tool", "content": "4"}])
    with pytest.raises(RecipeError, match="several turns"):
        connect(serve(), api="chat").chat([*talk, {"role": "assistant", "content": "Yes?"}])


# Faults


@pytest.mark.parametrize("fault", stub.FAULTS)
@pytest.mark.parametrize("api", ["completions", "chat"])
def test_after_any_fault_the_answer_is_right(serve, connect, fault, api):
    server = serve(script=lambda number: fault if number < 1 else None)
    requests = WRITTEN[:2] if api == "chat" else [WRITTEN[0], SCORES[0]]
    patience = 1.0 if fault in ("hang", "drip") else 5.0
    answers = answer_all(connect(server, api=api, timeout_seconds=patience), requests)
    require_all_right(requests, answers)
    assert server.faults[fault] == 2 and set(server.answered.values()) == {1}


def test_of_many_faults_none_loses_doubles_or_changes_an_answer(serve, connect):
    server = serve(faults=0.3, seed=1)
    requests = [Score(f"Text {number}", " and so on") for number in range(200)]
    engine = connect(server, timeout_seconds=2.0, concurrency=16)
    require_all_right(requests, answer_all(engine, requests))
    assert server.faults.total() > 40 and len(server.faults) > 8
    assert len(server.answered) == 200 and set(server.answered.values()) == {1}
    require_all_right(requests, answer_all(engine, requests))
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("fault", ["hang", "drip", "500", "no json", "hang up"])
def test_a_deadline_holds_whatever_the_server_does(serve, connect, fault):
    server = serve(script=lambda number: fault)
    began = time.monotonic()
    with pytest.raises(RunError, match="an answer within 800 ms") as late:
        answer_all(connect(server, timeout_seconds=0.3, deadline_seconds=0.8), WRITTEN[:1])
    assert time.monotonic() - began < 4
    [tries] = server.came.values()
    told = sum(int(word.split(" ×")[0]) for word in late.value.found.split("; "))
    assert tries > 1 and 0 <= told - tries <= 1, "the last may be on its way when the time is up"


def test_when_one_is_given_up_the_others_were_yielded_and_are_kept(serve, connect):
    bad = WRITTEN[3].prompt
    server = serve(script=lambda number: None)
    fault = server.fault
    server.fault = lambda asked: "500" if asked == bad else fault(asked)
    got = []
    with pytest.raises(RunError, match="status 500"):
        got.extend(connect(server, deadline_seconds=0.5, concurrency=4).answers(WRITTEN[:10]))
    assert {number for number, _ in got} == set(range(10)) - {3}
    server.fault = fault
    require_all_right(WRITTEN[:10], answer_all(connect(server), WRITTEN[:10]))
    assert set(server.answered.values()) == {1}


def test_what_comes_at_the_same_moment_as_an_error_is_yielded_before_it(serve, connect):
    engine = connect(serve())

    async def ask(key, request, purse):
        if request == WRITTEN[0]:
            raise RunError("", found="", expected="", mend="")
        purse.untaken[key] = 0.0
        return Answer("", (), (), True, 0, 0, "stop")

    engine._ask, got = ask, []
    with pytest.raises(RunError):
        got.extend(engine.answers(WRITTEN[:8]))
    assert len(got) == 7


@pytest.mark.parametrize(("fault", "least"), [("429 and wait", 0.2), ("429 and a date", 0.9)])
def test_a_server_is_given_the_time_that_it_asks_for(serve, connect, fault, least):
    server = serve(script=lambda number: fault if number == 0 else None)
    answer_all(connect(server), WRITTEN[:1])
    [(first, second)] = server.times.values()
    assert least <= second - first < least + 4


def test_a_server_that_asks_for_more_time_than_there_is_isnt_waited_for(serve, connect):
    began = time.monotonic()
    with pytest.raises(RunError, match="asks to wait 1 h"):
        answer_all(connect(serve(script=lambda number: "429 and an hour")), WRITTEN[:1])
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_no_retry_mends_is_told_at_once(serve, connect, status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = serve(script=lambda number: str(status))
    with pytest.raises((RunError, RecipeError), match=f"status {status}: Internal Server Error") as refused:
        answer_all(connect(server), WRITTEN[:1])
    assert server.came.total() == (2 if status in (400, 422) else 1)
    assert ("OPENAI_API_KEY" in refused.value.mend) == (status in (401, 403))


def test_waits_double_are_never_longer_than_the_limit_and_differ():
    for failures in (0, 3, 10, 10_000):
        limit = min(remote.FIRST_WAIT * 2 ** min(failures, 20), remote.LONGEST_WAIT)
        waits = [remote._backoff(failures, random.Random(seed)) for seed in range(50)]
        assert 0 <= min(waits) < limit / 4 and limit * 3 / 4 < max(waits) <= limit


@pytest.mark.parametrize(
    "text", ["", "soon", "-3", "9" * 400, "nan", "inf", "1e3", "Wed, 99 Foo 2020", "Wed, 21 Oct 2015 07:28:00 GMT"]
)
def test_a_wait_that_cant_be_read_or_is_over_is_none(text):
    assert remote._retry_after({"Retry-After": text}) == 0


# One at a time, once, and whoever closes


def test_answers_come_as_they_are_done_and_only_so_many_are_asked_at_a_time(serve, connect):
    server = serve(seconds=0.05)
    stream = connect(server, concurrency=4).answers(WRITTEN)
    began = time.monotonic()
    next(stream)
    assert time.monotonic() - began < 3
    assert len(list(stream)) == len(WRITTEN) - 1
    assert 3 <= server.most_at_work <= 4


def test_closing_ends_what_is_in_flight(serve, connect):
    server = serve(script=lambda number: "hang")
    fault = server.fault
    server.fault = lambda asked: fault(asked) if asked != PROMPTS[0] else None
    engine = connect(server, concurrency=4)
    stream = engine.answers(WRITTEN)
    assert next(stream)[0] == 0
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 3
    engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "espalier-background"]
    until(lambda: server.at_work == 0)
    assert server.came.total() <= 8


def test_an_engine_that_is_closed_leaves_no_iterator_waiting(serve, connect):
    server = serve(script=lambda number: "hang")
    engine = connect(server)
    stream = engine.answers(WRITTEN)

    def take():
        with pytest.raises(CancelledError):
            next(stream)

    taker = threading.Thread(target=take, daemon=True)
    taker.start()
    until(lambda: server.came.total())
    engine.close()
    taker.join(10)
    assert not taker.is_alive()


def test_equal_requests_are_sent_and_paid_once(serve, connect):
    server = serve()
    requests = [WRITTEN[0], SCORES[0], WRITTEN[0], WRITTEN[0]]
    answers = answer_all(connect(server, usd_per_million_prompt_tokens=1e6), requests)
    require_all_right(requests, answers)
    assert set(server.answered.values()) == {1}
    assert [answer.cost.usd > 0 for answer in answers] == [True, True, False, False]


def test_what_was_answered_is_known_to_the_next_run_and_costs_nothing(serve, connect, told):
    server = serve()
    prices = {"usd_per_million_prompt_tokens": 1e6, "usd_per_million_completion_tokens": 2e6}
    first = answer_all(connect(server, **prices), WRITTEN + SCORES)
    for request, answer in zip(WRITTEN, first, strict=False):
        words = len(stub.Model.tokens(request.prompt))
        assert answer.cost == Cost(usd=pytest.approx(words + 2 * answer.completion_tokens))
    engine = connect(server, **prices)
    assert engine.estimate(WRITTEN) == Cost()
    again = answer_all(engine, WRITTEN + SCORES)
    assert [vars(answer) | {"cost": None} for answer in again] == [vars(answer) | {"cost": None} for answer in first]
    assert all(answer.cost == Cost() for answer in again)
    engine.close()
    assert told[-1].startswith("120 of 120 answers of hash were known from before and cost nothing")
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize(
    "changed",
    [{"model": "other"}, {"api": "chat"}, {"cache": "refresh"}, {"cache": "off"}],
    ids=str,
)
def test_another_model_or_api_or_a_cache_that_isnt_used_is_asked_anew(serve, connect, changed):
    server = serve()
    answer_all(connect(server), WRITTEN[:3])
    answer_all(connect(server, **changed), WRITTEN[:3])
    assert set(server.answered.values()) == {2}


def test_another_server_is_asked_anew(serve, connect):
    for server in (serve(), serve()):
        answer_all(connect(server), WRITTEN[:3])
        assert server.answered.total() == 3


def test_a_cache_that_is_off_keeps_nothing_and_refresh_keeps(serve, connect, tmp_path):
    server = serve()
    answer_all(connect(server, cache="off"), WRITTEN[:3])
    assert not (tmp_path / "home").exists()
    answer_all(connect(server, cache="refresh"), WRITTEN[:3])
    answer_all(connect(server), WRITTEN[:3])
    assert set(server.answered.values()) == {2}


def test_a_damaged_cache_is_told(serve, connect, tmp_path):
    path = tmp_path / "home" / "answers" / "answers.sqlite"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(ResourceError, match=r"answers\.sqlite.*delete the file"):
        connect(serve())


CLIENT = """
import sys
from pathlib import Path
from espalier.infer.engine import Generate, open_engine
from espalier.infer.recipe import EngineRecipe
from espalier.recipe import Recipe
from espalier.run import Run
recipe = EngineRecipe(model="hash", url=sys.argv[1], remote={"concurrency": 4})
with Run.start(Path(sys.argv[2]), Recipe()) as run:
    engine = open_engine(recipe, run)
    for number, answer in engine.answers([Generate(f"Text {number}", 8) for number in range(200)]):
        print(number, flush=True)
"""


def test_a_killed_client_goes_on_without_asking_again(serve, connect, tmp_path):
    server = serve(seconds=0.01)
    command = [sys.executable, "-c", CLIENT, server.url, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ)) as client:
        for _ in range(60):
            assert client.stdout.readline()
        client.send_signal(signal.SIGKILL)
    asked = len(server.answered)
    assert 60 <= asked < 200
    requests = [Generate(f"Text {number}", 8) for number in range(200)]
    require_all_right(requests, answer_all(connect(server, concurrency=4), requests))
    assert len(server.answered) == 200
    assert sum(count - 1 for count in server.answered.values()) <= 4, "only what was in flight"


def test_two_processes_may_use_the_cache_at_a_time(serve, tmp_path):
    server = serve()
    clients = [
        subprocess.Popen([sys.executable, "-c", CLIENT, server.url, str(tmp_path / name)], stdout=subprocess.PIPE)
        for name in ("one", "two")
    ]
    for client in clients:
        out, _ = client.communicate(timeout=60)
        assert (client.returncode, len(out.split())) == (0, 200)
    with sqlite3.connect(tmp_path / "home" / "answers" / "answers.sqlite") as table:
        assert table.execute("SELECT count(*) FROM answers").fetchone() == (200,)
    table.close()


# Money


PRICES = {"usd_per_million_prompt_tokens": 1000.0, "usd_per_million_completion_tokens": 10_000.0}


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("faults", [0.0, 0.3])
def test_a_cap_holds_however_many_are_in_flight(serve, connect, concurrency, faults):
    server = serve(faults=faults, kinds=("500", "no json", "hang up"), seconds=0.005)
    engine = connect(server, cap={"usd": 1.5}, concurrency=concurrency, **PRICES)
    got = []
    with pytest.raises(BudgetError, match=r"which the next of \d+ requests may cost"):
        got.extend(engine.answers([Generate(f"Text {number}", 8) for number in range(100)]))
    spent = sum(answer.cost.usd for _, answer in got)
    assert 1.5 - engine._most(Generate("Text 99", 8)) <= spent <= 1.5
    assert server.answered.total() == len(got)


def test_what_the_ledger_holds_is_spent_already(serve, connect):
    engine = connect(serve(), cap={"usd": 1.5}, **PRICES)
    engine.run.charge("before", usd=1.45)
    with pytest.raises(BudgetError):
        answer_all(engine, WRITTEN)


def test_what_was_paid_and_not_taken_is_in_the_ledger(serve, connect):
    server = serve()
    engine = connect(server, **PRICES)
    stream = engine.answers(WRITTEN)
    _, answer = next(stream)

    def known():
        return [request for request in WRITTEN if engine.estimate([request]) == Cost()]

    until(lambda: len(known()) > 3)
    stream.close()
    untaken = Ledger(engine.run.folder / LEDGER).spent(kind="untaken").usd
    paid = [engine._usd(each.prompt_tokens, each.completion_tokens) for each in answer_all(engine, known())]
    assert answer.cost.usd + untaken == pytest.approx(sum(paid))


def test_an_estimate_is_the_most_that_written_answers_cost(serve, connect, words):
    engine = connect(serve(), tokenizer=words, **PRICES)
    expected = engine.estimate([*WRITTEN, WRITTEN[0]])
    assert expected.seconds == 0
    spent = sum(answer.cost.usd for answer in answer_all(engine, WRITTEN))
    assert spent == pytest.approx(expected.usd)


# Opening


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "http://", "ftp://a/v1", "http://a/v1/completions", "https://a/v1/chat/completions/",
     "http://a/v1/models", "http://a:port/v1", "http://a/v1?version=1", "http://[::1/v1"],
)  # fmt: skip
def test_a_url_that_cant_be_right_is_refused(url):
    with pytest.raises(RecipeError, match="http://localhost:8000/v1"):
        remote._checked(url)


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "https://api.a.com/v1/", "http://[::1]:80", " http://a/b "]
)
def test_a_url_may_be_anywhere(url):
    assert remote._checked(url) == url.strip().rstrip("/")


def test_a_model_that_isnt_there_is_refused_with_the_nearest(serve, connect):
    server = serve(models=[{"id": "qwen-1b"}, {"id": "hash", "max_model_len": 512}])
    assert connect(server).context == 512
    assert connect(server, model="qwen-1b").context is None
    with pytest.raises(RecipeError, match="Did you mean 'qwen-1b'"):
        connect(server, model="qwen-2b")


@pytest.mark.parametrize("listed", [None, [], [3], [{}], {"a": 1}, "x"], ids=str)
def test_a_server_with_another_list_of_models_or_none_is_accepted(serve, connect, listed):
    engine = connect(serve(models=listed))
    assert engine.context is None
    require_all_right(WRITTEN[:1], answer_all(engine, WRITTEN[:1]))


def test_nobody_at_the_url_is_told_at_once(serve, connect):
    server = serve()
    server.__exit__()
    with pytest.raises(RunError, match="nobody who answers"):
        connect(server)


def test_a_key_opens_and_is_written_nowhere(serve, connect, monkeypatch, tmp_path, told):
    server = serve(key="sk-right", models=[{"id": "hash"}])
    monkeypatch.setenv("A_KEY", "sk-right")
    engine = connect(server, key_variable="A_KEY")
    require_all_right(WRITTEN[:2], answer_all(engine, WRITTEN[:2]))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(RecipeError, match=r"variable OPENAI_API_KEY") as refused:
        connect(server)
    assert "Bearer [the key] isn't a key" in str(refused.value)
    with pytest.raises(RecipeError, match="a URL with a name") as refused_url:
        remote._checked("http://me:sk-right@localhost/v1")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = f"{refused.value} {refused_url.value} {told} {engine.identity} {engine.recipe}".encode()
    assert b"A_KEY" in said and b"sk-" not in written + said


@pytest.mark.parametrize("key", ["sk-\u20ac", "sk\nline"])
def test_a_key_that_no_header_holds_is_refused_without_showing_it(serve, connect, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(RecipeError, match="OPENAI_API_KEY") as refused:
        connect(serve())
    assert key not in str(refused.value)


def test_home_is_where_caches_live(serve, connect):
    answer_all(connect(serve()), WRITTEN[:1])
    assert (files.home() / "answers" / "answers.sqlite").exists()
