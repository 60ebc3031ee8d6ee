"""A folder answers in this process as transformers and lm-eval say that it would, whatever it is asked beside."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier.budget import flops
from espalier.errors import DataError, ModelError, RecipeError, ResourceError
from espalier.folder import ModelFolder
from espalier.infer.engine import Generate, Score, answer_all, open_engine
from espalier.infer.recipe import EngineRecipe
from espalier.ledger import Rates

TREES = ("granite", "llama", "llama-tied", "qwen3", "gpt2", "mixtral", "wide-windowed")
OTHERS = ("windowed", "softcapped", "recurrent")
CLOSE = 1e-5
WORDS = ("the", " cat", " sat", "\n", " on the mat", " é", "zz", " ")
TEXT = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
PROMPTED = st.lists(TEXT.filter(str.strip), min_size=2, max_size=3).map("".join)
SCORES = st.builds(Score, st.sampled_from(["", " ", "the cat", "the cat sat on the mat. ", "zz\n"]) | TEXT, TEXT)
TEXTS = st.builds(
    Generate, PROMPTED, st.integers(1, 12), st.sampled_from([(), ("\n",), ("t", "zz")]), st.sampled_from([0.0, 0.8])
)


@pytest.fixture(scope="module")
def reference(folder):
    """A model and its tokenizer as transformers opens them."""
    opened = {}

    def reference(name):
        if name not in opened:
            path = folder(name)
            opened[name] = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        return opened[name]

    return reference


@pytest.fixture
def engine(folder, make_run):
    def engine(name="llama", path=None, **told):
        recipe = EngineRecipe(model=str(path or folder(name)), local={"threads": 1, "batch_tokens": 96} | told)
        return open_engine(recipe, make_run())

    return engine


@pytest.fixture
def copy(folder, tmp_path):
    """A folder that may be changed."""

    def copy(name="llama"):
        return shutil.copytree(folder(name), tmp_path / "copy")

    return copy


def ids(tokenizer, request):
    """What lm-eval takes for a score's prompt and continuation."""
    prompt = request.prompt.rstrip()
    rest = request.prompt[len(prompt) :] + request.continuation
    if not prompt:
        return [0], tokenizer(rest).input_ids
    context, whole = tokenizer(prompt).input_ids, tokenizer(prompt + rest).input_ids
    return context, whole[len(context) :]


@torch.inference_mode()
def forward(model, context, continuation, limit=10**9):
    """(log-probabilities, whether each is the most probable) by a plain pass over each window."""
    tokens, found = context + continuation, []
    for begin in range(len(context), len(tokens), limit):
        end = min(begin + limit, len(tokens))
        logits = model(torch.tensor([tokens[max(end - 1 - limit, 0) : end - 1]])).logits[0].float().log_softmax(-1)
        for place, token in zip(range(begin - end, 0), tokens[begin:end], strict=True):
            found.append((float(logits[place, token]), int(logits[place].argmax()) == token))
    return found


@torch.inference_mode()
def generated(model, tokenizer, prompt, count):
    tokens = torch.tensor([tokenizer(prompt).input_ids])
    told = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "do_sample": False}
    return model.generate(tokens, max_new_tokens=count, **told)[0, tokens.shape[1] :].tolist()


def assert_same(one, other):
    """Two answers are the same but for rounding and for what they cost."""
    told = ("text", "tokens", "greedy", "prompt_tokens", "completion_tokens", "finish")
    assert [getattr(one, name) for name in told] == [getattr(other, name) for name in told]
    assert one.logprobs == pytest.approx(other.logprobs, abs=CLOSE)


SHARED = [Score("the cat sat on the mat and", option) for option in (" the", " the dog", " the dog ran", "?", " the")]
LONG = "the dog that saw the zebra at 4 o'clock"
MIXED = [
    *SHARED,
    *(Score(LONG, option) for option in (" ran", " sat on the mat")),
    Score("the cat ", "sat"),
    Score("", "the cat"),
    Score("a", " the cat sat on the mat"),
    Score("é", "é"),
]


@pytest.mark.parametrize("name", TREES + OTHERS)
def test_scores_are_those_of_a_plain_pass(name, engine, reference):
    model, tokenizer = reference(name)
    asked = engine(name)
    assert asked.passes.reads_trees == (name in TREES)
    for request, answer in zip(MIXED, answer_all(asked, MIXED), strict=True):
        context, continuation = ids(tokenizer, request)
        true = forward(model, context, continuation)
        assert answer.tokens == tuple(continuation) and answer.text == request.continuation
        assert answer.logprobs == pytest.approx([value for value, _ in true], abs=CLOSE)
        assert answer.greedy == all(best for _, best in true)
        assert (answer.prompt_tokens, answer.completion_tokens) == (len(context), len(continuation))
        assert answer.finish == "scored" and answer.cost.flops > 0


@pytest.mark.parametrize("name", TREES + OTHERS)
def test_greedy_texts_are_those_of_generate(name, engine, reference):
    prompts = ["the cat sat", "the cat sat on the mat and the dog", "zz", "the cat sat on the mat. the cat sat on"]
    requests = [Generate(prompt, count) for prompt, count in zip(prompts, (1, 9, 14, 30), strict=True)]
    for request, answer in zip(requests, answer_all(engine(name), requests), strict=True):
        true = generated(*reference(name), request.prompt, request.max_new_tokens)
        assert list(answer.tokens) == true and answer.greedy
        assert answer.finish == ("stop" if 0 in true else "length")
        model, tokenizer = reference(name)
        values = forward(model, tokenizer(request.prompt).input_ids, true)
        assert answer.logprobs == pytest.approx([value for value, _ in values], abs=CLOSE)


def test_a_long_header_is_read_once_and_changes_nothing(engine, reference, monkeypatch):
    monkeypatch.setattr("espalier.infer.trees.STEM_SAVES", 8)
    monkeypatch.setattr("espalier.infer.decode.STEM_SAVES", 8)
    asked, header = engine("granite", batch_tokens=24), "the cat sat on the mat and the dog ran to the man. "
    model, tokenizer = reference("granite")
    requests = [Score(f"{header}{word * 3} the man", f" {last}") for word in ("zz", "cat", "é") for last in "abc"]
    stems = [group.stem for group in asked._plant(asked._windows(requests)) if group.stem]
    assert stems
    for request, answer in zip(requests, answer_all(asked, requests), strict=True):
        true = forward(model, *ids(tokenizer, request))
        assert answer.logprobs == pytest.approx([value for value, _ in true], abs=CLOSE)
    texts = [Generate(header + word, 8) for word in ("zz", "cat", "é")]
    for request, answer in zip(texts, answer_all(asked, texts), strict=True):
        assert list(answer.tokens) == generated(model, tokenizer, request.prompt, 8)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(SCORES | TEXTS, min_size=1, max_size=8), batch_tokens=st.sampled_from([1, 40, 1000]))
def test_neither_order_nor_company_nor_batches_change_an_answer(requests, batch_tokens, shared_engine):
    shared_engine.batch_tokens = shared_engine.writer.batch_tokens = 96
    alone = [answer_all(shared_engine, [request])[0] for request in requests]
    shared_engine.batch_tokens = shared_engine.writer.batch_tokens = batch_tokens
    for one, other in zip(alone, reversed(answer_all(shared_engine, requests[::-1])), strict=True):
        assert_same(one, other)


@pytest.fixture(scope="module")
def shared_engine(folder, tmp_path_factory):
    from espalier.recipe import Recipe
    from espalier.run import Run

    with Run.start(tmp_path_factory.mktemp("run") / "run", Recipe(), tell=lambda line: None) as run:
        yield open_engine(EngineRecipe(model=str(folder("qwen3")), local={"threads": 1}), run)


def test_what_is_too_long_loses_its_beginning(engine, reference):
    model, tokenizer = reference("llama")
    prompt = "the cat sat on a mat; é " * 12
    asked = engine()
    assert len(tokenizer(prompt).input_ids) > asked.context == 64
    [score, text] = answer_all(asked, [Score(prompt, "zz?"), Generate(prompt, 10)])
    context, continuation = ids(tokenizer, Score(prompt, "zz?"))
    true = forward(model, (context + continuation)[-65 : -len(continuation)], continuation)
    assert score.logprobs == pytest.approx([value for value, _ in true], abs=CLOSE)
    assert score.prompt_tokens == 65 - len(continuation)
    tokens = torch.tensor([tokenizer(prompt).input_ids[-54:]])
    told = {"attention_mask": torch.ones_like(tokens), "pad_token_id": 0, "do_sample": False}
    assert list(text.tokens) == model.generate(tokens, max_new_tokens=10, **told)[0, 54:].tolist()
    assert text.prompt_tokens == 54


@pytest.mark.parametrize("prompt", ["", "the cat"])
def test_what_is_longer_than_the_context_is_scored_in_windows(prompt, engine, reference):
    model, tokenizer = reference("gpt2")
    request = Score(prompt, " a long, long text: é" * 15)
    [answer] = answer_all(engine("gpt2"), [request])
    context, continuation = ids(tokenizer, request)
    true = forward(model, context, continuation, 64)
    assert len(continuation) > 128 and answer.tokens == tuple(continuation)
    assert answer.logprobs == pytest.approx([value for value, _ in true], abs=CLOSE)


def test_an_empty_continuation_is_certain_and_an_empty_prompt_is_the_end_of_a_text(engine, reference):
    [nothing, spaces, text] = answer_all(engine(), [Score("the", ""), Score("   ", "x"), Generate("", 5)])
    assert nothing.logprob == 0 and nothing.tokens == () and nothing.finish == "scored"
    model, tokenizer = reference("llama")
    true = forward(model, [0], tokenizer("   x").input_ids)
    assert spaces.logprobs == pytest.approx([value for value, _ in true], abs=CLOSE)
    assert list(text.tokens) == generated(model, tokenizer, "<|endoftext|>", 5)


def test_a_continuation_that_melts_into_the_prompt_still_has_a_token(engine, reference):
    """'the' is one token of this tokenizer, and so is 'th'."""
    _, tokenizer = reference("llama")
    assert len(tokenizer("th").input_ids) == len(tokenizer("the").input_ids) == 1
    [answer] = answer_all(engine("llama"), [Score(" the cat th", "e")])
    assert answer.completion_tokens == 1 and answer.logprob < 0


def test_a_text_ends_at_the_first_stop_and_without_it(engine):
    asked = engine()
    [free] = answer_all(asked, [Generate("the cat", 30)])
    stop = free.text[6:8]
    begin = free.text.find(stop)
    [cut, whole] = answer_all(asked, [Generate("the cat", 30, ("never", stop)), Generate("the cat", 30, ("never", ""))])
    assert_same(whole, free)
    assert cut.text == free.text[:begin] and cut.finish == "stop"
    assert free.tokens[: len(cut.tokens)] == cut.tokens and len(cut.tokens) < len(free.tokens)


def test_a_text_ends_where_the_model_ends_it(copy, engine):
    path = copy()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens are as probable, and the first of them ends a text
    model.save_pretrained(path)
    [answer] = answer_all(engine(path=path), [Generate("the cat", 30)])
    assert (answer.text, answer.tokens, answer.finish) == ("", (0,), "stop")


def test_draws_follow_the_probabilities_and_the_seed(engine, reference):
    model, tokenizer = reference("llama")
    asked = engine()
    drawn = answer_all(asked, [Generate("the cat", 1, temperature=1.5, seed=seed) for seed in range(600)])
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer("the cat").input_ids])).logits[0, -1]
    expected = torch.softmax(logits / 1.5, -1)
    for answer in drawn:
        assert answer.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[answer.tokens[0]]), abs=CLOSE)
    likely = expected.topk(5)
    share = sum(answer.tokens[0] in likely.indices.tolist() for answer in drawn) / 600
    sigma = (float(likely.values.sum() * (1 - likely.values.sum())) / 600) ** 0.5
    assert abs(share - float(likely.values.sum())) < 4 * sigma
    top_p = float(likely.values[:2].sum()) - 1e-6
    few = answer_all(asked, [Generate("the cat", 1, temperature=1.5, top_p=top_p, seed=seed) for seed in range(50)])
    assert {answer.tokens[0] for answer in few} == set(likely.indices[:2].tolist())
    [again] = answer_all(asked, [Generate("the cat", 1, temperature=1.5, seed=7)])
    assert_same(again, drawn[7])


@pytest.mark.parametrize("name", ["llama", "windowed"])
def test_guesses_change_no_draw(name, engine, monkeypatch):
    requests = [Generate("the cat sat on the mat the cat sat on", 24, temperature=0.3, seed=seed) for seed in range(3)]
    asked = engine(name)
    guessed = [answer_all(asked, [request])[0] for request in requests]
    monkeypatch.setattr("espalier.infer.guess.MOST", 0)
    monkeypatch.setattr("espalier.infer.guess.FEW", 0)
    for one, other in zip(guessed, answer_all(asked, requests), strict=True):
        assert_same(one, other)


def test_guesses_save_passes(engine, monkeypatch):
    """A model that writes the same token again and again is asked a few times, not once a token."""
    asked, passes = engine(), []
    with torch.no_grad():
        asked.passes.model.lm_head.weight.zero_()
    asked.writer.ends = frozenset()
    handle = asked.passes.model.register_forward_pre_hook(lambda *_: passes.append(1))
    [answer] = answer_all(asked, [Generate("the cat", 40)])
    handle.remove()
    assert answer.tokens == (0,) * 40 and len(passes) < 16


def test_texts_that_are_done_leave_their_slots_to_others(engine, told):
    one = engine()
    [alone] = answer_all(one, [Generate("the cat sat", 40)])
    token = one.passes.token_bytes
    assert token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, size, fp32
    few = engine(cache_gb=token * 110 / 1e9)
    requests = [Generate("the cat sat", 40), *(Generate(f"{number} dogs", number + 1) for number in range(9))]
    answers = answer_all(few, requests)
    assert "10 texts to write, 2 at a time, " in told[-1]
    assert_same(answers[0], alone)
    assert [answer.completion_tokens for answer in answers[1:]] == list(range(1, 10))


def test_passes_are_no_larger_than_allowed(engine):
    asked, seen = engine(batch_tokens=50), []
    note = lambda _, __, named: seen.append(named["input_ids"].shape)  # noqa: E731
    asked.passes.model.register_forward_pre_hook(note, with_kwargs=True)
    prompts = [f"{number} dogs and the cat" for number in range(20)]
    answer_all(asked, [*(Score(prompt, " ran") for prompt in prompts), *(Generate(prompt, 2) for prompt in prompts)])
    assert max(rows * tokens for rows, tokens in seen) <= 50


def test_memory_is_bounded_by_the_pass_not_by_the_number_of_requests(engine, peak_bytes):
    asked = engine(batch_tokens=128)
    some = [Score(f"{number} dogs ran to the cat", " and sat") for number in range(16)]
    many = [Score(f"{number} dogs ran to the cat", " and sat") for number in range(160)]
    assert peak_bytes(lambda: answer_all(asked, many)) < 1.5 * peak_bytes(lambda: answer_all(asked, some))


def test_closing_ends_the_work(engine):
    asked, passes = engine(batch_tokens=16), []
    asked.passes.model.register_forward_pre_hook(lambda *_: passes.append(1))
    stream = asked.answers([Score(f"{number} cats", " ran") for number in range(50)] + [Generate("the", 20)])
    next(stream)
    begun = len(passes)
    stream.close()
    assert begun == len(passes) and begun < 5


@pytest.mark.parametrize("name", ["granite", "gpt2", "mixtral", "windowed"])
def test_the_estimate_is_what_is_charged(name, engine):
    asked = engine(name)
    asked.run.price(Rates(usd_per_hour=3600.0, watts=10.0))
    requests = [*MIXED, *(Generate(f"{word} the cat", 12) for word in ("zz", "é", "dogs"))]
    expected = asked.estimate(requests)
    real = sum(answer.cost.flops for answer in answer_all(asked, requests))
    assert real / 2 < expected.flops < 2 * real
    assert 0 < expected.seconds < 60 and expected.usd == pytest.approx(expected.seconds) and expected.kwh > 0


def test_flops_are_those_of_reading_a_prompt_and_of_each_token_after_it(engine):
    asked = engine("granite")
    [score, text] = answer_all(asked, [Score("the cat sat", "?"), Generate("the cat sat", 2)])
    prompt = score.prompt_tokens
    assert score.completion_tokens == 1
    assert score.cost.flops == flops.prefill_flops(asked.passes.spec, prompt)
    assert text.cost.flops == score.cost.flops + flops.decode_flops(asked.passes.spec, prompt + 1)


def test_nothing_costs_nothing(engine):
    asked = engine()
    assert asked.estimate([]).flops == asked.estimate([]).seconds == 0 and answer_all(asked, []) == []


def test_it_says_what_it_is(engine, folder, reference):
    asked = engine("llama")
    assert asked.identity == ModelFolder.open(folder("llama")).fingerprint()
    assert asked.exact and asked.context == 64
    assert asked.count("the cat sat") == len(reference("llama")[1]("the cat sat").input_ids)
    assert asked.count("") == 0
    asked.close()


def test_a_conversation_is_written_by_the_models_template(copy, engine):
    path = copy()
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (path / "chat_template.jinja").write_text(template)
    asked = engine(path=path)
    assert asked.chat([{"role": "user", "content": "Hello?"}]) == "[user] Hello?\n[assistant]"
    with pytest.raises(DataError, match="no tools"):
        asked.chat([{"role": "tool", "content": "1"}])


def test_a_folder_without_a_template_has_no_conversations(engine):
    with pytest.raises(ModelError, match="without a chat template"):
        engine().chat([{"role": "user", "content": "Hello?"}])


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_without_a_tokenizer_is_refused(missing, copy, engine):
    path = copy()
    (path / missing).unlink()
    with pytest.raises(DataError, match="tokenizer"):
        engine(path=path)


def test_a_tokenizer_of_another_model_is_refused(copy, engine):
    path = copy()
    told = json.loads((path / "tokenizer.json").read_text())
    token = told["added_tokens"][0] | {"special": False}
    told["added_tokens"] += [token | {"id": 300 + n, "content": f"<{n}>"} for n in range(40)]
    (path / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match=r"a tokenizer of 3\d\d ids and an embedding of 320 rows"):
        engine(path=path)


def test_a_special_token_without_a_row_is_refused_where_it_is_written(copy, engine):
    path = copy()
    told = json.loads((path / "tokenizer.json").read_text())
    token = told["added_tokens"][0] | {"special": True}
    told["added_tokens"] += [token | {"id": 300 + n, "content": f"<{n}>"} for n in range(40)]
    (path / "tokenizer.json").write_text(json.dumps(told))
    opened = engine(path=path)
    list(opened.answers([Generate("x = 1", 2)]))
    with pytest.raises(ModelError, match=r"the token '<39>'"):
        list(opened.answers([Generate("x = <39>", 2)]))


@pytest.mark.parametrize("count", [0, 64, 100])
def test_an_answer_that_the_context_has_no_room_for_is_refused(count, engine):
    with pytest.raises(RecipeError, match="1 to 63"):
        next(engine().answers([*SHARED, Generate("the cat", count)]))


def test_a_cache_that_holds_no_text_is_refused(engine):
    with pytest.raises(ResourceError, match="cache_gb"):
        answer_all(engine(cache_gb=1e-6), [Generate("the cat", 40)])


def test_scores_of_bfloat16_are_near_those_of_float32(engine):
    exact, rough = (answer_all(engine("granite", dtype=dtype), MIXED) for dtype in ("float32", "bfloat16"))
    gaps = [abs(one.logprob - other.logprob) for one, other in zip(exact, rough, strict=True)]
    assert 0 < max(gaps) < 0.5


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["granite", "gpt2", "windowed"])
def test_answers_are_those_of_lm_evals_own_backend(name, engine, folder, reference):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=reference(name)[0], tokenizer=reference(name)[1], batch_size=3)
    long = Score("the cat sat on a mat; é " * 12, " zz?")
    scores = [*MIXED, long]
    rolled = ["the cat sat on the mat", " a long, long text: é" * 15]
    texts = [Generate(f"{word} the cat", 12, ("t", "\n")) for word in ("zz", "é", "dogs")] + [Generate(long.prompt, 9)]
    answers = answer_all(engine(name), [*scores, *(Score("", text) for text in rolled), *texts])
    told = [Instance("loglikelihood", {}, (one.prompt, one.continuation), 0) for one in scores]
    for answer, (logprob, greedy) in zip(answers, theirs.loglikelihood(told, disable_tqdm=True), strict=False):
        assert answer.logprob == pytest.approx(logprob, abs=1e-4, rel=1e-6) and answer.greedy == greedy
    found = theirs.loglikelihood_rolling([Instance("", {}, (text,), 0) for text in rolled], disable_tqdm=True)
    assert [answer.logprob for answer in answers[len(scores) : len(scores) + 2]] == pytest.approx(found, rel=1e-6)
    for answer, text in zip(answers[-len(texts) :], texts, strict=True):
        wanted = {"until": list(text.stop), "max_gen_toks": text.max_new_tokens, "do_sample": False}
        assert [answer.text] == theirs.generate_until([Instance("", {}, (text.prompt, wanted), 0)], disable_tqdm=True)


@pytest.mark.parametrize("count", range(8, 13))
def test_guesses_of_a_text_do_no_harm_to_one_that_ends_with_the_context(count, engine):
    asked = engine("gpt2")
    with torch.no_grad():
        asked.passes.model.lm_head.weight.zero_()
    asked.writer.ends = frozenset()
    answers = answer_all(asked, [Generate("a cat; " * 40, count), Generate("the cat", 40)])
    assert [answer.tokens for answer in answers] == [(0,) * count, (0,) * 40]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plain_model_is_read_as_trees_whatever_its_dtype(dtype, engine):
    assert engine("llama", dtype=dtype).passes.reads_trees


def test_a_text_that_is_no_unicode_is_refused(engine):
    with pytest.raises(DataError, match="valid Unicode"):
        answer_all(engine("gpt2"), [Generate("a \ud83d cat", 4)])
