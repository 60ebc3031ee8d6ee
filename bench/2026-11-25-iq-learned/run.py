"""Does a tiny model that was trained for minutes to repeat some letters repeat others, which it has never seen?

    python bench/2026-11-25-iq-learned/run.py

It reads Full Repeating on the train halves of all alphabets, and is asked on the test halves by `evaluate.iq`, beside
a model of the same initial values that wasn't trained, and on the train halves too. The tokenizer knows all letters,
one token each, as large models' do; the text trained on has none of the test halves. Times are CPU time of one thread.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers

from espalier import files
from espalier.data import tokenizer
from espalier.data.prepare import DataRecipe, prepare
from espalier.evaluate.intervals import paired_bootstrap
from espalier.evaluate.iq.alphabets import LETTERS
from espalier.evaluate.iq.tasks import TASKS
from espalier.evaluate.iq.verb import IqRecipe, evaluate_iq
from espalier.evaluate.items import SAMPLES, Outcome, read_outcomes
from espalier.model.build import build, save
from espalier.model.mup import Parametrization
from espalier.run import Run
from espalier.spec import ModelSpec
from espalier.train.optim import Optimizer
from espalier.train.recipe import OptimizerRecipe, ScheduleRecipe

HERE = Path(__file__).parent
TASK, LANGUAGES = "full_repeating", tuple(LETTERS)
SEEDS, ITEMS = (0, 1, 2), 180
ROW, ROWS = 192, 8
# Of two stretches: letters keep what stands for them, then it is drawn anew at every update.
FIXED, REDRAWN = 3_500_000, 1_100_000
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    # A letter that was never seen can be written only if what writes letters is what reads them ...
    "tie_word_embeddings": True,
    # ... and stays about where it was drawn: large enough to be told apart, and hardly trained.
    "initializer_range": 0.3,
}
PARAMETRIZATION = Parametrization(base_width=64)
OPTIMIZER = OptimizerRecipe(learning_rate=0.02, vector_learning_rate=1e-5)
SCHEDULE = ScheduleRecipe()


def vocabulary(folder: Path) -> Path:
    """A tokenizer that has a token for every letter: it is trained on nothing but lists of them."""
    letters = sorted(set("".join(LETTERS.values())))
    lists = [random.Random(number).sample(letters, len(letters)) for number in range(40)]
    rows = [json.dumps({"text": "\n".join([*each, "Input", "Output"])}) for each in lists]
    (folder / "letters.jsonl").write_text("\n".join(rows))
    dataset = prepare(DataRecipe(sources=(folder / "letters.jsonl",), held_out=0.2), home=folder, tell=print)
    return tokenizer.train(dataset, 4096, home=folder, tell=print)


def rows(words: tokenizers.Tokenizer, seed: int) -> Iterator[torch.Tensor]:
    """Rows of ROW tokens and the one after, of items with their answers, one after the other, without an end."""
    waiting: list[int] = []
    end = words.token_to_id(tokenizer.END_OF_TEXT)
    for item in TASKS[TASK].items(sys.maxsize, LANGUAGES, split="train", seed=seed):
        waiting += [*words.encode(f"{item.prompt}{item.gold}\n").ids, end]
        while len(waiting) > ROW:
            yield torch.tensor(waiting[: ROW + 1])
            waiting = waiting[ROW:]


def train(
    model: transformers.PreTrainedModel,
    spec: ModelSpec,
    words: tokenizers.Tokenizer,
    tokens: int,
    seed: int,
    redrawn: list[int],
) -> dict:
    """Train the model in place; what it took. Before every update the embeddings of the `redrawn` ids are new ones."""
    optimizer = Optimizer(model, spec, OPTIMIZER, PARAMETRIZATION)
    source, steps = rows(words, seed), tokens // (ROW * ROWS)
    embedding = model.get_input_embeddings().weight
    torch.manual_seed(seed)
    begin, losses = time.process_time(), []
    for step in range(steps):
        with torch.no_grad():
            embedding[redrawn] = torch.randn(len(redrawn), spec.hidden_size) * spec.initializer_range
        ids = torch.stack(list(itertools.islice(source, ROWS)))
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.clip()
        optimizer.set_factor(SCHEDULE.factor(step / steps))
        optimizer.step()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {losses[-1]:.3f}  {time.process_time() - begin:.0f} s", flush=True)
    return {"tokens": steps * ROW * ROWS, "cpu_seconds": time.process_time() - begin, "loss": sum(losses[-50:]) / 50}


def letter_ids(words: tokenizers.Tokenizer) -> list[int]:
    """The tokens of all letters, one each."""
    found = [words.encode(letter).ids for letter in sorted(set("".join(LETTERS.values())))]
    assert all(len(ids) == 1 for ids in found), "a letter is a token"
    return [number for [number] in found]


def asked(folder: Path, split: str) -> list[Outcome]:
    """The outcomes of a model folder's answers, in the order of the items."""
    recipe = IqRecipe(model=str(folder), tasks=(TASK,), languages=LANGUAGES, n=ITEMS, split=split, local={"threads": 1})
    with Run.start(folder.parent / f"{folder.name}-{split}", recipe) as run:
        evaluate_iq(recipe, run)
        return sorted(read_outcomes(run.folder / SAMPLES), key=lambda outcome: outcome.id)


def share(outcomes: list[Outcome]) -> float:
    return sum(outcome.scores["exact_match"] for outcome in outcomes) / len(outcomes)


def by_language(outcomes: list[Outcome]) -> dict[str, float]:
    return {name: share([one for one in outcomes if one.tags["language"] == name]) for name in LANGUAGES}


def compared(folder: Path, words_folder: Path, seed: int) -> dict:
    """One seed: the same model before training, after its first stretch, and after both."""
    words = tokenizer.load(words_folder)
    spec = ModelSpec.stated({"vocab_size": tokenizer.id_count(words), **SHAPE}, where="this record's shape")
    model = build(spec, PARAMETRIZATION, seed=seed)
    save(model, folder / f"untrained-{seed}", words_folder)
    before = asked(folder / f"untrained-{seed}", "test")
    result: dict = {"seed": seed, "untrained": share(before)}
    for number, (name, tokens, redrawn) in enumerate((("fixed", FIXED, []), ("redrawn", REDRAWN, letter_ids(words)))):
        took = train(model, spec, words, tokens, 2 * seed + number, redrawn)
        save(model, folder / f"{name}-{seed}", words_folder)
        result[name] = took | measured(folder / f"{name}-{seed}", before)
    return result


def measured(folder: Path, before: list[Outcome]) -> dict:
    """A trained model on letters that it has never seen, against the untrained one, and on those that it has."""
    after = asked(folder, "test")
    assert [one.id for one in before] == [one.id for one in after], "pairs are of the same item"
    first, second = ([one.scores["exact_match"] for one in outcomes] for outcomes in (before, after))
    return {
        "test_letters": share(after),
        "gain": asdict(paired_bootstrap(first, second)),
        "train_letters": share(asked(folder, "train")),
        "by_language": by_language(after),
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        words = vocabulary(Path(name))
        results = [compared(Path(name), words, seed) for seed in SEEDS]
    for result in results:
        print(result)
    about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "shape": SHAPE, "items": ITEMS}
    files.write_json(HERE / "result.json", about | {"results": results})


if __name__ == "__main__":
    main()
