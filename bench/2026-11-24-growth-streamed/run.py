"""Growing a model folder tensor by tensor: memory, and speed beside copying, at three sizes.

    python bench/2026-11-24-growth-streamed/run.py [FOLDER]

A Granite model of random bf16 weights is written, then grown in three ways, each in a process of its own. The baseline
copies the same files with `cp` and flushes them to the disk, as growth does; rounds alternate. Before each, memory is
touched and freed: on a virtual machine fresh pages come from the host, at a tenth of the speed of the disk cache.
Speeds are bytes written a second. Resident memory is VmHWM above what the process had after its imports and the
discovery of the axes.
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

HERE = Path(__file__).parent
LAYERS = (4, 10, 23)  # 0.7, 1.5 and 3.1 GB
ROUNDS = 2
TOUCHED = 12_000_000_000
SIZES = {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
# Operator, and the sizes to reach; streams of 5 GB files, as a user would have them.
GROWTHS = {
    "stack x2": {"depth": "stack", "factor": 2},
    "zero_pad": {"width": "zero_pad", "hidden_size": 2304, "num_attention_heads": 20, "intermediate_size": 9216},
    "fpi": {"width": "fpi", "intermediate_size": 12_288},
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
    from espalier.grow import apply, operators
    from espalier.model.axes import discover
    from espalier.model.mup import Parametrization

    sizes = dict(GROWTHS[name])
    shape = discover(json.loads((parent / "config.json").read_text())).shape
    build = operators.OPERATORS[sizes.pop("depth", None) or sizes.pop("width")]
    if "factor" in sizes:
        sizes = {"num_hidden_layers": sizes["factor"] * shape.num_hidden_layers}
    growth = build(shape, shape.changed(**sizes))
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


def copy(parent: Path, out: Path) -> float:
    began = time.monotonic()
    subprocess.run(["cp", "-r", parent, out], check=True)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.monotonic() - began


def touch() -> None:
    """Let the host back as much memory as the next step takes."""
    script = f"import torch; torch.ones({TOUCHED}, dtype=torch.uint8)"
    subprocess.run([sys.executable, "-c", script], check=True)


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(place: Path) -> None:
    rows = []
    for layers in LAYERS:
        parent = place / f"model-{layers}"
        subprocess.run([sys.executable, __file__, "make", str(parent), str(layers)], check=True)
        size = weight_bytes(parent)
        speeds: dict[str, list[float]] = {"cp": []}
        peaks: dict[str, list[int]] = {}
        for _ in range(ROUNDS):
            touch()
            speeds["cp"].append(size / copy(parent, place / "copy"))
            shutil.rmtree(place / "copy")
            for name in GROWTHS:
                out = place / "grown"
                touch()
                command = [sys.executable, __file__, "grow", str(parent), str(out), name]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                speeds.setdefault(name, []).append(weight_bytes(out) / found["seconds"])
                peaks.setdefault(name, []).append(found["peak"])
                shutil.rmtree(out)
        shutil.rmtree(parent)
        for name in GROWTHS:
            row = {
                "growth": name,
                "gigabytes": size / 1e9,
                "bytes_per_second": statistics.median(speeds[name]),
                "of_cp": statistics.median(a / b for a, b in zip(speeds[name], speeds["cp"], strict=True)),
                "peak_mb": max(peaks[name]) / 1e6,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        rows.append({"growth": "cp", "gigabytes": size / 1e9, "bytes_per_second": statistics.median(speeds["cp"])})
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
