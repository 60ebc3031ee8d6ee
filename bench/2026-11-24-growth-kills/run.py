"""Kill growths at random moments inside them, from folder to folder and inside a run: never a half-grown model.

    python bench/2026-11-24-growth-kills/run.py [KILLS] [SEED]

A warm parent forks a child for each attempt. A timer in the child kills it with SIGKILL at a random moment between the
start of the growth and the time that an undisturbed one takes. After each kill what is there must be whole: no folder
(streamed), a newest checkpoint that matches its manifest and whose stage fits its shape (in a run). When all kills are
used up the growth is left to finish; the end must equal that of an undisturbed one, byte for byte.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent

import espalier  # isort: skip  # noqa: E402, F401  (before torch)
import torch  # noqa: E402
import yaml  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from espalier import files, pipeline  # noqa: E402
from espalier.folder import ModelFolder  # noqa: E402
from espalier.grow import apply, operators, progressive  # noqa: E402
from espalier.model import shards  # noqa: E402
from espalier.model.axes import discover  # noqa: E402
from espalier.model.mup import Parametrization  # noqa: E402

SIZES = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
SHARD_BYTES = 10_000_000


def resume_recipe() -> dict:
    """The recipe of the bench that kills anywhere in a run."""
    path = HERE.parent / "2026-11-24-resume" / "run.py"
    spec = importlib.util.spec_from_file_location("resume", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RECIPE


def kill_in(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer


def forked(work: Callable[[], None]) -> bool:
    """Do the work in a child; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, "a child failed by itself"
    return not os.WIFSIGNALED(status)


def make(folder: Path) -> None:
    config = AutoConfig.for_model("granite", **SIZES, num_hidden_layers=4, num_key_value_heads=8).to_dict()
    layout = discover(config)
    folder.mkdir(parents=True)
    planned = [shards.Planned(name, layout.sizes(name), torch.bfloat16) for name in layout.tensors]
    shards.write(folder, planned, lambda name: torch.randn(layout.sizes(name)).to(torch.bfloat16))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def grow(parent: Path, out: Path) -> None:
    """Width and depth in one step, in many small shards."""
    shape = discover(json.loads((parent / "config.json").read_text())).shape
    sizes = {"hidden_size": 640, "num_attention_heads": 10, "num_key_value_heads": 10, "num_hidden_layers": 7}
    growths = operators.plan_growth(shape, shape.changed(**sizes), depth="interpolate", width="zero_pad")
    apply.grow_folder(
        ModelFolder.open(parent),
        out,
        growths,
        seed=5,
        std_of=Parametrization(kind="standard").std_of(growths[-1].after),
        finish=lambda folder: None,
        tell=print,
        shard_bytes=SHARD_BYTES,
    )


def streamed(place: Path, kills: int, dice: random.Random) -> dict:
    make(place / "small")
    began = time.monotonic()
    grow(place / "small", place / "undisturbed")
    seconds = time.monotonic() - began
    done, resumed, finished = 0, 0, 0
    while done < kills:

        def work(moment: float = dice.uniform(0, seconds)) -> None:
            kill_in(moment)
            grow(place / "small", place / "large")

        if forked(work):
            finished += 1  # quicker than the kill: begin anew
            shutil.rmtree(place / "large")
            continue
        done += 1
        assert not (place / "large").exists() or files.damage(place / "large") is None
        journal = place / ".resumable-large" / "journal.json"
        resumed += journal.exists()
        shutil.rmtree(place / "large", ignore_errors=True)
    forked(lambda: grow(place / "small", place / "large"))
    same = ModelFolder.open(place / "large").fingerprint() == ModelFolder.open(place / "undisturbed").fingerprint()
    left = [path.name for path in place.iterdir() if path.name.startswith(".")]
    return {"kills": done, "with_finished_shards": resumed, "same_bits": same, "left_behind": left, "seconds": seconds}


def in_a_run(place: Path, kills: int, dice: random.Random) -> dict:
    recipe = resume_recipe()
    grow_stage, durations = progressive._grow, []

    def carry_out(runs: Path) -> None:
        pipeline.main(runs / "run.yaml", [], runs=runs, dry_run=False, tell=lambda line: None)

    def begin(runs: Path) -> None:
        runs.mkdir()
        (runs / "run.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def timed(*arguments):
        began = time.monotonic()
        grown = grow_stage(*arguments)
        durations.append(time.monotonic() - began)
        return grown

    begin(place / "undisturbed")
    progressive._grow = timed
    carry_out(place / "undisturbed")
    begin(place / "disturbed")
    done, torn = 0, 0
    while done < kills:
        seconds = dice.uniform(0, max(durations))

        def killed(*arguments, seconds=seconds):
            timer = kill_in(seconds)
            grown = grow_stage(*arguments)
            timer.cancel()
            return grown

        progressive._grow = killed
        if forked(lambda: carry_out(place / "disturbed")):
            shutil.rmtree(place / "disturbed")  # both growths were quicker than their kills
            begin(place / "disturbed")
            continue
        done += 1
        newest = max((place / "disturbed" / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        stage = json.loads((newest / "trainer" / "progress.json").read_text())["stage"]
        layers = json.loads((newest / "config.json").read_text())["num_hidden_layers"]
        torn += files.damage(newest) is not None or layers != recipe["stages"][stage]["num_hidden_layers"]
    progressive._grow = grow_stage
    forked(lambda: carry_out(place / "disturbed"))
    ends = [ModelFolder.open(place / name / "run" / "final").path for name in ("undisturbed", "disturbed")]
    same = files.sha256(ends[0] / "model.safetensors") == files.sha256(ends[1] / "model.safetensors")
    return {"kills": done, "torn": torn, "same_bits": same, "growth_seconds": durations}


def main(kills: int, seed: int) -> None:
    dice = random.Random(seed)
    result = {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "streamed").mkdir()
        result["streamed"] = streamed(place / "streamed", kills, dice)
        print(result["streamed"], flush=True)
        (place / "run").mkdir()
        result["in_a_run"] = in_a_run(place / "run", kills, dice)
        print(result["in_a_run"], flush=True)
    (HERE / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(numbers[0] if numbers else 25, numbers[1] if len(numbers) > 1 else 1)
