"""How fast a model folder answers in this process, against lm-eval's `hf` backend and transformers' `generate`.

    python bench/2026-11-25-engine/run.py throughput
    python bench/2026-11-25-engine/run.py decode RUN/final ...

1. throughput: 500 items of mixed lengths, most of them of four options, some with a header in common, some to be
   written, asked of a Granite with random weights; `hf` with batches of 1, 8 or 32, whichever is fastest ("auto" tries
   64 and more first). Answers are compared one by one.
2. decode: one prompt at a time, 192 tokens each, greedily, against `generate` with its default cache and a static one.
   What a model repeats decides how many guesses come true, so the folders named are asked (trained models), and
   models with random weights. Drawn at temperature 1 a text hardly repeats itself: that is the other end.

Times are CPU time of this process on one thread, ours and theirs in turn, medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import transformers
from tokenizers import Tokenizer

from espalier import files
from espalier.data import tokenizer as words
from espalier.data.prepare import VALIDATION, DataRecipe, prepare
from espalier.infer import guess
from espalier.infer.engine import Answer, Generate, Request, Score, answer_all
from espalier.infer.local import Local
from espalier.infer.recipe import EngineRecipe, LocalRecipe
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.recipe import Recipe
from espalier.run import Run
from espalier.spec import ModelSpec

HERE = Path(__file__).parent
SEED, ROUNDS = 0, 2
VOCABULARY, POSITIONS = 8192, 1024
SIZES = {
    "5M": {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64},
    "55M": {"hidden_size": 640, "num_hidden_layers": 10, "head_dim": 64},
}
CHOSEN, HEADED, WRITTEN = 300, 150, 50  # items: options alone, options after a shared header, answers to be written
WAYS = ("ours", "without_guesses", "generate", "generate_static", "ours_drawn", "generate_drawn")
WRITES, PROMPTS = 192, 3  # tokens of an answer, and prompts, of the second question


def texts() -> list[str]:
    """The documents that questions are cut out of: held-out sources of Python's standard library."""
    return list(prepare(DataRecipe(), home=files.home(), tell=print).texts(VALIDATION))


def folder(name: str, where: Path) -> Path:
    """A model of random weights with a tokenizer of the same text."""
    dataset = prepare(DataRecipe(), home=files.home(), tell=print)
    spec = ModelSpec(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, tie_word_embeddings=True, **SIZES[name])
    model = build.build(spec, Parametrization(kind="standard"), seed=SEED)
    build.save(model, where / name, words.train(dataset, VOCABULARY, home=files.home(), tell=print))
    return where / name


def items(tokenizer: Any) -> list[list[Request]]:
    """What 500 items ask: four scores each, or one text to write."""
    chance, documents = random.Random(SEED), texts()
    tokens = [number for text in documents for number in tokenizer.encode(text).ids]

    def piece(least: int, most: int) -> str:
        begin = chance.randrange(len(tokens) - most)
        return tokenizer.decode(tokens[begin : begin + chance.randint(least, most)])

    def options(prompt: str, longest: int) -> list[Request]:
        return [Score(prompt, " " + piece(1, longest).strip()) for _ in range(4)]

    header = piece(400, 401)
    found = [options(piece(20, 700), chance.choice([1, 4, 16])) for _ in range(CHOSEN)]
    found += [options(header + piece(20, 120), chance.choice([1, 8])) for _ in range(HEADED)]
    found += [[Generate(piece(20, 300), max_new_tokens=32, stop=("\n\n",))] for _ in range(WRITTEN)]
    chance.shuffle(found)
    return found


def theirs(model: Any, requests: Sequence[Request], batch: int | str) -> list[Any]:
    """What lm-eval's `hf` backend answers: (log-probability, greedy) or a text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=batch, max_batch_size=64)
    asked: dict[str, list[tuple[int, Instance]]] = {"loglikelihood": [], "generate_until": []}
    for number, request in enumerate(requests):
        if isinstance(request, Score):
            kind, told = "loglikelihood", (request.prompt, request.continuation)
        else:
            wanted = {"until": list(request.stop), "max_gen_toks": request.max_new_tokens, "do_sample": False}
            kind, told = "generate_until", (request.prompt, wanted)
        asked[kind].append((number, Instance(kind, {}, told, number)))
    found: dict[int, Any] = {}
    for kind, pairs in asked.items():
        answers = getattr(lm, kind)([instance for _, instance in pairs], disable_tqdm=True)
        found |= dict(zip((number for number, _ in pairs), answers, strict=True))
    return [found[number] for number in range(len(requests))]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        begin = time.process_time()
        found = work()
        return time.process_time() - begin, found


def differences(requests: Sequence[Request], ours: Sequence[Answer], found: Sequence[Any]) -> dict[str, Any]:
    """How far two backends are apart, and how many texts, verdicts and chosen options differ."""
    pairs = [(request, one, other) for request, one, other in zip(requests, ours, found, strict=True)]
    scored = [(request, one, other) for request, one, other in pairs if isinstance(request, Score)]
    questions: dict[str, list[tuple[float, float]]] = {}
    for request, one, other in scored:
        questions.setdefault(request.prompt, []).append((one.logprob, other[0]))
    return {
        "largest_gap_nats": max(abs(one.logprob - other[0]) for _, one, other in scored),
        "largest_gap_nats_a_token": max(
            abs(one.logprob - other[0]) / one.completion_tokens for _, one, other in scored
        ),
        "verdicts": sum(one.greedy != other[1] for _, one, other in scored),
        "choices": sum(max(each)[0] != max(each, key=lambda pair: pair[1])[0] for each in questions.values()),
        "texts": sum(one.text != other for request, one, other in pairs if isinstance(request, Generate)),
    }


def peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def throughput(run: Run, where: Path) -> dict[str, Any]:
    path = folder("5M", where)
    engine = open_local(path, run)
    asked = items(Tokenizer.from_file(str(path / "tokenizer.json")))
    requests = [request for item in asked for request in item]
    before = psutil.Process().memory_info().rss / 1e6
    first, ours = seconds(lambda: answer_all(engine, requests))
    memory = {"resting": before, "ours": peak() - before}
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    some = [request for item in asked[:25] for request in item]
    tried = {str(batch): seconds(lambda b=batch: theirs(model, some, b))[0] for batch in (1, 8, 32)}
    print(tried, first, memory, flush=True)
    best = min(tried, key=lambda batch: tried[batch])
    rounds = []
    for _ in range(ROUNDS):
        hf, found = seconds(lambda: theirs(model, requests, int(best) if best.isdigit() else best))
        own, ours = seconds(lambda: answer_all(engine, requests))
        rounds.append({"ours": own, "hf": hf, "ratio": hf / own})
        print(rounds[-1], flush=True)
    memory["hf"] = peak() - before
    windows = list(engine._windows(requests))
    return {
        "items": len(asked),
        "requests": len(requests),
        "tokens": sum(len(window.inputs) for window in windows),
        "tokens_read": sum(len(tree) for group in engine._plant(windows) for tree in group.trees),
        "first": first,
        "hf_on_25_items": tried,
        "hf_batch": best,
        "rounds": rounds,
        "ratio": statistics.median(each["ratio"] for each in rounds),
        "memory_mb": memory,
        "differences": differences(requests, ours, found),
    }


def decode(run: Run, path: Path) -> dict[str, Any]:
    """ms a token of each way, prompts in turn; the first prompt is left out, since all is cold then."""
    engine, model = open_local(path, run), transformers.AutoModelForCausalLM.from_pretrained(path)
    # Every answer has its full length, whatever the model says.
    model.generation_config.eos_token_id, engine.writer.ends = None, frozenset()
    tokens = engine.tokenizer("\n".join(texts())).input_ids
    chance = random.Random(SEED)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    same, passes, used = 0, list[int](), list[int]()
    engine.passes.model.register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(PROMPTS + 1):
        begin = chance.randrange(len(tokens) - 100)
        prompt = engine.tokenizer.decode(tokens[begin : begin + 64])
        ids = torch.tensor([engine.tokenizer(prompt).input_ids])
        told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": WRITES, "do_sample": False, "pad_token_id": 0}
        request = [Generate(prompt, max_new_tokens=WRITES)]
        passes.clear()
        took, [answer] = seconds(lambda r=request: answer_all(engine, r))
        found["ours"].append(took)
        used.append(len(passes))
        with mock.patch.multiple(guess, MOST=0, FEW=0):
            found["without_guesses"].append(seconds(lambda r=request: answer_all(engine, r))[0])
        took, true = seconds(lambda i=ids, t=told: model.generate(i, **t))
        found["generate"].append(took)
        static = partial(model.generate, ids, cache_implementation="static", disable_compile=True, **told)
        found["generate_static"].append(seconds(static)[0])
        drawn = [Generate(prompt, max_new_tokens=WRITES, temperature=1.0)]
        found["ours_drawn"].append(seconds(lambda d=drawn: answer_all(engine, d))[0])
        sampled = partial(model.generate, ids, **told | {"do_sample": True, "temperature": 1.0, "top_k": 0})
        found["generate_drawn"].append(seconds(sampled)[0])
        same += list(answer.tokens) == true[0, ids.shape[1] :].tolist()
        print(used[-1], {name: round(1e3 * times[-1] / WRITES, 2) for name, times in found.items()}, flush=True)
    ms = {name: statistics.median(1e3 * took / WRITES for took in times[1:]) for name, times in found.items()}
    return {
        "parameters": engine.passes.parameters,
        "ms_a_token": ms,
        "ratio": statistics.median(
            theirs / own for own, theirs in zip(found["ours"][1:], found["generate"][1:], strict=True)
        ),
        "passes": used[1:],
        "same": [same, PROMPTS + 1],
        "times": found,
    }


def open_local(path: Path, run: Run) -> Local:
    return Local.open(EngineRecipe(model=str(path), local=LocalRecipe(threads=1)), run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["throughput", "decode"])
    parser.add_argument("folders", nargs="*", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        where = Path(scratch)
        with Run.start(where / "run", Recipe(), tell=lambda line: None) as run:
            if asked.question == "throughput":
                found: Any = throughput(run, where)
            else:
                random_weights = {name: decode(run, folder(name, where)) for name in SIZES}
                found = random_weights | {f"trained {path.parent.name}": decode(run, path) for path in asked.folders}
    result = json.loads((HERE / "result.json").read_text()) if (HERE / "result.json").exists() else {}
    result[asked.question] = found | {"load_at_end": psutil.getloadavg()}
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()
