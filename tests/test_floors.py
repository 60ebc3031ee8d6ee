"""The house stands: every file imports its own folder and the floors below it, and the command line starts light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import espalier

ROOT = Path(espalier.__file__).parent
# From the ground up; the parts of one floor are strangers to each other. Files of the root that aren't named
# further up are the nouns, floor 0. The roof is built in the order in which one file leans on another.
FLOORS = (
    {"budget", "data", "model"},
    {"train", "infer"},
    {"grow", "adapt", "shrink", "synth", "evaluate"},
    {"serve", "agents"},
    {"planner", "story"},
    {"pipeline"},
    {"trials", "offers", "launch"},
    {"compare", "ladder", "propose", "tune"},
    {"cli"},
    {"__main__"},
)
NOUNS = 0
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "optuna")


def part_of(module: tuple[str, ...]) -> str:
    """The part of the house that a module below the package belongs to: a folder, or a file of the root."""
    return module[0] if module else "__init__"


def floor_of(part: str) -> int:
    return next((floor for floor, parts in enumerate(FLOORS, start=1) if part in parts), NOUNS)


def may_import(own: str, other: str) -> bool:
    """Whether a file of one part may import another part."""
    nouns = floor_of(own) == floor_of(other) == NOUNS
    return own == other or nouns or floor_of(other) < floor_of(own)


def imports(path: Path, root: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, module below the package) of every import of the package in a file, in functions too."""
    package = root.name
    folder = (package, *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            stem = (*above, *(node.module.split(".") if node.module else ()))
            names = [(*stem, alias.name) for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == package:
                yield node.lineno, _modules_in(name[1:], root)


def _modules_in(name: tuple[str, ...], root: Path) -> tuple[str, ...]:
    """The leading parts of a dotted name that are folders or files; what follows is a thing inside the file."""
    for length in range(len(name), 0, -1):
        place = root.joinpath(*name[:length])
        if place.is_dir() or place.with_suffix(".py").is_file():
            return name[:length]
    return ()


def violations(root: Path) -> list[str]:
    """Every import that goes up or sideways, as 'file:line imports part'."""
    found = []
    for path in sorted(root.rglob("*.py")):
        own = part_of(path.relative_to(root).with_suffix("").parts)
        for line, module in imports(path, root):
            other = part_of(module)
            if not may_import(own, other):
                found.append(f"{path.relative_to(root)}:{line} imports {other}")
    return found


def test_every_file_imports_its_own_folder_and_the_floors_below():
    assert violations(ROOT) == []


def test_every_folder_has_its_floor():
    folders = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")}
    assert folders <= set().union(*FLOORS)


def test_the_house_is_not_empty():
    """The imports are really read: the known ones are among them."""
    read = {part_of(module) for path in ROOT.rglob("*.py") for _, module in imports(path, ROOT)}
    assert {"errors", "files", "spec", "recipe", "budget", "data", "model", "train", "pipeline"} <= read


@pytest.fixture
def house(tmp_path):
    """A small house without a fault; plant one with `house(file, source)` and get the violations."""
    root = tmp_path / "espalier"
    sound = {
        "__init__.py": "import os",
        "errors.py": "",
        "files.py": "from espalier.errors import UserError\nimport torch",
        "budget/__init__.py": "",
        "budget/price.py": "from espalier import files\nfrom espalier.budget import plan",
        "budget/plan.py": "from . import price\nfrom .price import rates\nfrom ..files import home",
        "model/build.py": "import espalier.errors as e",
        "train/loop.py": "def f():\n    from espalier.model.build import build",
        "infer/__init__.py": "",
        "data/ops/dedup.py": "from ..sources import read",
        "data/sources.py": "from espalier.data.ops import dedup",
        "grow/depth.py": "from espalier.train import loop",
        "evaluate/loss.py": "from espalier import __version__",
        "pipeline.py": "from espalier import grow, story",
        "story.py": "from espalier.budget import plan",
        "planner.py": "",
        "cli/app.py": "from espalier import pipeline",
        "__main__.py": "from espalier.cli import app",
    }
    for name, source in sound.items():
        _write(root / name, source)

    def plant(name: str, source: str) -> list[str]:
        _write(root / name, source)
        return violations(root)

    assert violations(root) == []
    return plant


def _write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("errors.py", "from espalier import budget", "errors.py:1 imports budget"),
        ("errors.py", "import espalier.train.loop", "errors.py:1 imports train"),
        ("errors.py", "import os, espalier.model as m", "errors.py:1 imports model"),
        ("errors.py", "from espalier.pipeline import main", "errors.py:1 imports pipeline"),
        ("files.py", "x = 1\ndef f():\n    from espalier.story import tell", "files.py:3 imports story"),
        ("files.py", "if TYPE_CHECKING:\n    from espalier.grow.depth import stack", "files.py:2 imports grow"),
        ("files.py", "from .model.build import build", "files.py:1 imports model"),
        ("budget/price.py", "from espalier.model import build", "budget/price.py:1 imports model"),
        ("budget/plan.py", "from ..data import sources", "budget/plan.py:1 imports data"),
        ("budget/plan.py", "from .. import train", "budget/plan.py:1 imports train"),
        ("data/ops/dedup.py", "from ...train import loop", "data/ops/dedup.py:1 imports train"),
        ("model/build.py", "from espalier.data import sources", "model/build.py:1 imports data"),
        ("train/loop.py", "class A:\n    def f(self):\n        import espalier.infer", "train/loop.py:3 imports infer"),
        ("train/loop.py", "from espalier.grow.depth import stack", "train/loop.py:1 imports grow"),
        ("grow/depth.py", "from espalier.evaluate.loss import loss", "grow/depth.py:1 imports evaluate"),
        ("evaluate/loss.py", "from espalier import pipeline as p", "evaluate/loss.py:1 imports pipeline"),
        ("story.py", "from espalier.pipeline import main", "story.py:1 imports pipeline"),
        ("story.py", "from espalier import planner", "story.py:1 imports planner"),
        ("pipeline.py", "from espalier.cli.app import app", "pipeline.py:1 imports cli"),
    ],
)
def test_a_planted_violation_is_found(house, name, source, found):
    assert house(name, source) == [found]


@pytest.mark.parametrize(
    "start",
    [
        "import espalier",
        "from espalier.cli.app import run_app; run_app(['--help'])",
        "from espalier.cli.app import run_app; run_app(['--version'])",
        "from espalier.cli.app import run_app; run_app(['methods'])",
        "from espalier.cli.app import run_app; run_app(['grow'])",
    ],
    ids=lambda start: start[-15:],
)
def test_the_command_line_starts_without_anything_heavy(start):
    code = f"import sys\n{start}\nprint([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_what_counts_as_heavy_would_be_noticed():
    code = f"import sys, numpy\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['numpy']\n"
