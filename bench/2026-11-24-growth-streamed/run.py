"""Growing a model folder tensor by tensor: memory, and speed beside copying, at three sizes.

    python bench/2026-11-24-growth-streamed/run.py [FOLDER]

A Granite model of random bf16 weights is written, then grown in three ways, each in a process of its own. The baseline
copies the grown files with `cp` and flushes them to the disk, as growth does, right after they were grown; rounds
alternate. Copying the files that were grown from is measured too. Before each, memory is touched and freed: on a
virtual machine fresh pages come from the host, at a tenth of the disk cache's speed. Speeds are bytes written a second.
Resident memory is VmHWM above what the process had after its imports and the discovery of the axes.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from espalier.grow import depth, width

HERE = Path(__file__).parent
LAYERS = (4, 10, 23)  # 0.7, 1.5 and 3.1 GB
ROUNDS = 3
TOUCHED = 12_000_000_000
SIZES = {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
# Into files of 5 GB at most, as a user would have them.
GROWTHS = {
    "stack x2": lambda shape: depth.stack(shape, shape.changed(num_hidden_layers=2 * shape.num_hidden_layers)),
    "zero_pad": lambda shape: width.zero_pad(
        shape, shape.changed(hidden_size=2304, num_attention_heads=20, intermediate_size=9216)
    ),
    "fpi": lambda shape: width.fpi(shape, shape.changed(intermediate_size=12_288)),
}


def make(folder: Path, layers: int) -> None:
    """A bare model folder with random weights, written tensor by tensor."""
    import torch
    from transformers import AutoConfig

    from espalier.model import shards
    from espalier.model.axes import discover

    config = AutoConfig.for_model("granite", **SIZES, num_hidden_layers=layers, num_key_value_heads=4).to_dict()
    layout = discover(config)
    folder.mkdir(parents=True)
    planned = [shards.Planned(name, layout.sizes(name), torch.bfloat16) for name in layout.tensors]
    shards.write(folder, planned, lambda name: torch.randn(layout.sizes(name)).to(torch.bfloat16) * 0.02)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def peak() -> int:
    """The most memory that was resident since the last reset, in bytes."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def grow(parent: Path, out: Path, name: str) -> None:
    """One growth in this process; prints seconds and bytes as JSON."""
    from espalier.folder import ModelFolder
    from espalier.grow import apply
    from espalier.model.axes import discover
    from espalier.model.mup import Parametrization

    shape = discover(json.loads((parent / "config.json").read_text())).shape
    growth = GROWTHS[name](shape)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.monotonic()
    apply.grow_folder(
        ModelFolder.open(parent),
        out,
        [growth],
        seed=0,
        std_of=Parametrization(kind="standard").std_of(growth.after),
        finish=lambda folder: None,
        tell=print,
    )
    print(json.dumps({"seconds": time.monotonic() - began, "peak": peak() - before}))


def copy(folder: Path, out: Path) -> float:
    """Copy a folder, with memory touched before; the bytes of its weights a second."""
    touch()
    began = time.monotonic()
    subprocess.run(["cp", "-r", folder, out], check=True)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    speed = weight_bytes(out) / (time.monotonic() - began)
    shutil.rmtree(out)
    return speed


def touch() -> None:
    """Let the host back as much memory as the next step takes."""
    script = f"import torch; torch.ones({TOUCHED}, dtype=torch.uint8)"
    subprocess.run([sys.executable, "-c", script], check=True)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(place: Path) -> None:
    rows = []
    for layers in LAYERS:
        parent, out = place / f"model-{layers}", place / "grown"
        subprocess.run([sys.executable, __file__, "make", str(parent), str(layers)], check=True)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in GROWTHS}
        for _ in range(ROUNDS):
            parent_copied = copy(parent, place / "copy")
            for name in GROWTHS:
                touch()
                command = [sys.executable, __file__, "grow", str(parent), str(out), name]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                speed = weight_bytes(out) / found["seconds"]
                rounds[name].append(
                    {
                        "bytes_per_second": speed,
                        "of_copying_the_grown": speed / copy(out, place / "copy"),
                        "of_copying_the_parent": speed / parent_copied,
                        "peak_mb": found["peak"] / 1e6,
                    }
                )
                shutil.rmtree(out)
        for name, found in rounds.items():
            medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
            rows.append({"growth": name, "gigabytes": weight_bytes(parent) / 1e9, **medians})
            print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(parent)
    (HERE / "result.json").write_text(json.dumps({"rows": rows, "load": os.getloadavg()}, indent=2) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", folder, layers]:
            make(Path(folder), int(layers))
        case ["grow", parent, out, name]:
            grow(Path(parent), Path(out), name)
        case _:
            with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
                main(Path(folder))
