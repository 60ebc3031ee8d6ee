"""Do attention heads know the right option where the letters' logits don't?

    python bench/2026-11-25-readout/run.py
    python bench/2026-11-25-readout/run.py 450

A two-layer model learns associative recall alone: six pairs of tokens, then the same pairs in another order, loss on
the second ones. It never sees a question. Then `evaluate readout` asks it which option is a given word, as prompts
that it was never trained on. The counter-check trains the same net to answer such prompts with the letter.

Given a number of steps, recall is trained for as many, and only the two sizes of questions are asked.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor

from espalier import files
from espalier.evaluate.audits.readout import HEADS, ReadoutRecipe, evaluate_readout
from espalier.evaluate.audits.synthetic import WORDS, SyntheticRecipe
from espalier.evaluate.questions import LETTERS
from espalier.run import Run

HERE = Path(__file__).parent
SEEDS = (0, 1, 2, 3)
STEPS, BATCH, PAIRS, RATE = 300, 48, 6, 2e-3
VOCABULARY = (*WORDS, *LETTERS[:12], ".", "\n")
IDS = {token: number for number, token in enumerate(VOCABULARY)}
N, IGNORED = 300, -100

Batch = tuple[Tensor, Tensor]


def model(seed: int) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer() -> Tokenizer:
    """A token a word, full stop or newline; spaces are none."""
    made = Tokenizer(models.WordLevel(IDS, unk_token="."))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\.|\n"), behavior="removed", invert=True)
    return made


def recall() -> Batch:
    """Pairs of a word and any token, twice; the second ones of the second time are to be known. [BATCH, 4 * PAIRS]"""
    keys = torch.rand(BATCH, len(WORDS)).argsort(1)[:, :PAIRS]
    pairs = torch.stack([keys, torch.randint(len(VOCABULARY), keys.shape)], -1)
    order = torch.rand(BATCH, PAIRS).argsort(1)
    again = pairs.gather(1, order[..., None].expand_as(pairs))
    ids, labels = torch.cat([pairs, again], 1), torch.full((BATCH, 2 * PAIRS, 2), IGNORED)
    labels[:, PAIRS:, 1] = again[..., 1]
    return ids.flatten(1), labels.flatten(1)


def letters() -> Batch:
    """Questions of four options as the audit shows them, and the right letter; loss on the letter."""
    words = torch.rand(BATCH, len(WORDS)).argsort(1)[:, :4]
    gold = torch.randint(4, (BATCH, 1))
    letter, point, newline = torch.tensor([IDS[each] for each in (*LETTERS[:4], ".", "\n")]).split((4, 1, 1))
    rest = (point.expand(BATCH, 4), words, newline.expand(BATCH, 4))
    lines = torch.stack([letter.expand(BATCH, 4), *rest], -1).flatten(1)
    ids = torch.cat([lines, words.gather(1, gold), letter[gold]], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids[:, -1]
    return ids, labels


def trained(seed: int, draw: Callable[[], Batch], steps: int = STEPS) -> transformers.PreTrainedModel:
    net = model(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    for _ in range(steps):
        ids, labels = draw()
        loss = net(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def saved(net: transformers.PreTrainedModel, folder: Path) -> Path:
    """A model folder that any verb takes."""
    net.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    files.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return folder


def audited(folder: Path, name: str, *, options: int = 4, **more: object) -> tuple[Path, dict]:
    """What `evaluate readout` finds, by metric, with its context."""
    questions = SyntheticRecipe(n=N, options=options, phrase="{word}", seed=options)
    shape = {
        "template": "{options}{question}",
        "cloze": "{question}",
        "also": ("attention",),
        "threads": 1,
        "validation": 0.1,
    }
    recipe = ReadoutRecipe(model=folder, questions=questions, **(shape | more))
    with Run.start(folder.with_name(name), recipe, tell=lambda line: None) as run:
        report = evaluate_readout(recipe, run)
    return run.folder, {row.metric: row.value for row in report.rows} | {"context": report.context}


def one(seed: int) -> dict:
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        work, begin = Path(place), time.process_time()
        net = trained(seed, recall)
        found["train_cpu_seconds"] = time.process_time() - begin
        folder = saved(net, work / "recall" / "model")
        run, found["four"] = audited(folder, "four")
        _, found["eight"] = audited(folder, "eight", options=8, heads=run / HEADS, silence=0)
        for token in ("content", "label"):
            _, found[token] = audited(folder, token, token=token, permutations=0, silence=0)
        folder = saved(trained(seed, letters, 2 * STEPS), work / "letters" / "model")
        _, found["letters"] = audited(folder, "letters")
        _, found["letters_content"] = audited(folder, "letters-content", token="content", permutations=0, silence=0)
    return found


def longer(seed: int) -> dict:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = saved(trained(seed, recall, int(sys.argv[1])), Path(place) / "recall" / "model")
        run, four = audited(folder, "four", silence=0)
        _, eight = audited(folder, "eight", options=8, heads=run / HEADS, silence=0)
    return {"four": four, "eight": eight}


SHOWN = ("logits", "qk", "attention", "logits_pa", "qk_pa", "qk_top", "qk_sum", "qk_unlabelled", "qk_gain")
CAUSES = ("logits_without_best", "logits_without_other", "shift_without_best", "shift_without_other")


def main() -> None:
    with ProcessPoolExecutor(len(SEEDS)) as pool:
        seeds = list(pool.map(longer if sys.argv[1:] else one, SEEDS))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"threads": 1, "load_at_end": psutil.getloadavg()},
        "parameters": model(0).num_parameters(),
        "seeds": seeds,
    }
    (HERE / "-".join(["result", *sys.argv[1:]])).with_suffix(".json").write_text(json.dumps(result) + "\n")
    for name in (name for name, found in seeds[0].items() if isinstance(found, dict)):
        print(name)
        for metric in (metric for metric in (*SHOWN, *CAUSES) if metric in seeds[0][name]):
            print(f"  {metric:22}", *(f"{found[name][metric]:7.3f}" for found in seeds))


if __name__ == "__main__":
    main()
