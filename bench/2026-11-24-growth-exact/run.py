"""The exactness of every growth operator on every family: what it says, and what was measured.

    python bench/2026-11-24-growth-exact/run.py

The models are those of tests/grow/test_families.py: small, every weight random and of ordinary size, fp32, tied and
untied embeddings. Measured is the largest logit difference over the largest logit, on random tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import espalier  # noqa: F401  (before torch)

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent / "tests" / "grow"))

import test_families as families  # noqa: E402

from espalier.grow import operators, preserve  # noqa: E402
from espalier.grow.apply import grow_model  # noqa: E402
from espalier.model.axes import discover  # noqa: E402
from espalier.model.mup import Parametrization  # noqa: E402

LARGER = {
    **families.GROWTHS,
    "fpi, width x 1.5": lambda shape: {"hidden_size": 48, "num_attention_heads": 6, **_kv(shape, 3)},
    "stack_top": lambda shape: {"num_hidden_layers": 5},
    "stack_middle": lambda shape: {"num_hidden_layers": 5},
    "gradual": lambda shape: {"num_hidden_layers": 3},
    "overlap": lambda shape: {"num_hidden_layers": 4},
}


def _kv(shape, heads: int) -> dict[str, int]:
    return {"num_key_value_heads": heads} if "num_key_value_heads" in shape.fields() else {}


def measure(model, name: str) -> dict:
    shape = discover(model.config.to_dict()).shape
    growth = (operators.DEPTH | operators.WIDTH)[name.partition(",")[0]](shape, shape.changed(**LARGER[name](shape)))
    std_of = Parametrization(kind="standard").std_of(growth.after)
    grown = grow_model(model, [growth], seed=1, std_of=std_of)
    grown.set_attn_implementation("eager")
    learned = preserve.learning(grown, families.IDS, [growth])
    return {
        "says_exact": growth.exact,
        "difference": preserve.check(model, grown, families.IDS).relative_difference,
        "dead": len(learned.dead),
        "alike": list(learned.symmetric),
    }


def cell(found: dict) -> str:
    return f"{'**' if found['says_exact'] else ''}{found['difference']:.0e}{'**' if found['says_exact'] else ''}"


def main() -> None:
    rows = {}
    for family in families.FAMILIES:
        for tied in (False, True):
            model = families.built(family, tied=tied)
            rows[f"{family}, {'tied' if tied else 'untied'}"] = {name: measure(model, name) for name in LARGER}
    (HERE / "result.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("| family | " + " | ".join(LARGER) + " |")
    print("|---" * (len(LARGER) + 1) + "|")
    for row, found in rows.items():
        print(f"| {row} | " + " | ".join(cell(found[name]) for name in LARGER) + " |")
    every = [value for found in rows.values() for value in found.values()]
    worst = max(value["difference"] for value in every if value["says_exact"])
    least = min(value["difference"] for value in every if not value["says_exact"])
    print(f"exact where it says so: at most {worst:.1e}; elsewhere at least {least:.1e}; dead slots", end=" ")
    print(sum(value["dead"] for value in every))


if __name__ == "__main__":
    main()
