"""The command line: every verb answers, light ones at once, and what can't be done says so with its exit code."""

import json
import subprocess
import sys

import pytest

from espalier import __version__, recipe, records
from espalier.cli.app import run_app
from espalier.errors import RunError
from espalier.method import VERBS, cards, default, find
from espalier.pipeline import PretrainRecipe
from espalier.report import Report, Row
from espalier.run import PAGE, RECIPE, RESULTS, STATE
from espalier.spec import ModelSpec

METHODS = sorted(card.full_name for card in cards())


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """Carry out a command line here; its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def cli(*arguments: object) -> tuple[int, str, str]:
        code = run_app([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return cli


def test_help_names_every_command(cli):
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("run", "demo", "launch", "runs", "show", "report", "methods", "schema", "env", *VERBS):
        assert command in out
        assert cli(command, "--help")[0] == 0


def test_help_and_methods_need_no_torch():
    program = (
        "import sys\nfrom espalier.cli.app import run_app\n"
        "assert [run_app(a) for a in (['--help'], ['methods'], ['runs'], ['schema', 'run'])] == [0, 0, 0, 0]\n"
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_version_is_printed(cli):
    assert cli("--version") == (0, f"espalier {__version__}\n", "")


def test_methods_are_listed_all_or_of_one_verb(cli):
    _, out, _ = cli("methods")
    assert all(name in out for name in METHODS)
    _, of_grow, _ = cli("methods", "grow")
    assert cli("grow")[1] == of_grow
    assert {name for name in METHODS if name in of_grow} == {name for name in METHODS if name.startswith("grow.")}


@pytest.mark.parametrize("name", [*METHODS, "run"])
def test_every_recipe_has_a_schema(cli, name):
    code, out, _ = cli("schema", name)
    schema = json.loads(out)
    assert code == 0 and schema["type"] == "object" and schema["properties"]


def test_a_method_s_recipe_is_printed_without_doing_anything(cli, tmp_path):
    code, out, _ = cli("grow", "stack", "model=small", "out=large", "factor=2", "--dry-run")
    assert code == 0
    kind = next(card for card in cards() if card.full_name == "grow.stack").recipe()
    assert recipe.parse(kind, out, [], where="printed").factor == 2
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("tasks", [("tasks=[arc_easy, 'mmlu_*']",), ("tasks", "arc_easy", "mmlu_*")])
def test_a_verb_whose_method_is_clear_takes_its_settings_at_once(cli, tasks):
    code, out, err = cli("evaluate", *tasks, "model=small", "--dry-run")
    assert code == 0, err
    kind = find("evaluate.tasks").recipe()
    assert recipe.parse(kind, out, [], where="printed") == kind(model="small", tasks=("arc_easy", "mmlu_*"))
    assert kind(model="small", tasks="arc_easy").tasks == ("arc_easy",)
    assert default("grow") is None and cli("grow", "model=small")[0] == 2


def test_a_dry_run_prints_a_recipe_that_reads_back_and_a_price(cli, recipe_file, shared_home, monkeypatch, tmp_path):
    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))
    code, out, _ = cli("run", recipe_file, "seed=5", "train.batch_tokens=128", "--dry-run")
    assert code == 0 and not (tmp_path / "runs").exists()
    printed, _, price = out.partition("training on ")
    resolved = recipe.parse(PretrainRecipe, printed, [], where="printed")
    assert (resolved.seed, resolved.train.batch_tokens, resolved.name) == (5, 128, "tiny")
    assert recipe.dump(resolved).strip() == printed.strip()
    assert price.startswith("a machine for tests, estimated: 2,560 tokens, 743 MFLOP, ")
    assert "$" in price and "Wh" in price and "from scratch at the final size: " in price


def test_the_demo_s_recipe_is_sound(cli, shared_home, monkeypatch):
    monkeypatch.setenv("ESPALIER_HOME", str(shared_home))
    code, out, _ = cli("demo", "--dry-run")
    assert code == 0 and "training on a machine for tests" in out


SKY = ("--storage", "s3://runs", "--setup", "pip install espalier")


@pytest.mark.parametrize(
    "scheduler, more, name, command",
    [("slurm", (), "second.sbatch", "sbatch"), ("skypilot", SKY, "second.sky.yaml", "sky jobs launch")],
)
def test_a_launch_writes_a_job_with_its_recipe_and_says_how_to_start_it(
    cli, recipe_file, tmp_path, scheduler, more, name, command
):
    overrides = ("name=second", "data.sources=stdlib", "budget.usd=5")
    arguments = ("launch", scheduler, recipe_file, *overrides, "--hardware", "h100-80g", *more, "--out", "my jobs")
    code, out, err = cli(*arguments)
    assert code == 0, err
    told, path, start = out.splitlines()
    assert told == "second on NVIDIA H100 80GB HBM3: 2 h and $5.00 at most, by its budget"
    assert path == f"my jobs/{name}" and start == f"Start it with: {command} 'my jobs/{name}'"
    kept = tmp_path / "my jobs" / "second.recipe.yaml"
    assert recipe.load(PretrainRecipe, kept) == recipe.load(PretrainRecipe, recipe_file, list(overrides))
    assert str(kept) in (tmp_path / path).read_text()
    # Slurm opens its log in the folder of the runs, and makes none.
    assert (tmp_path / "runs").is_dir() == (scheduler == "slurm")
    assert not any(tmp_path.glob("runs/*"))


def test_slurm_calls_the_espalier_that_wrote_the_script(cli, recipe_file, tmp_path):
    assert cli("launch", "slurm", recipe_file, "--hardware", "t4")[0] == 0
    assert f" {sys.executable} -m espalier run " in (tmp_path / "tiny.sbatch").read_text()


@pytest.mark.parametrize(
    "more, code, said",
    [
        (("--hardware", "h1000"), 2, "Did you mean"),
        (("--hardware", "t4", "--devices", "3"), 2, "a multiple of 3"),
        (("--hardware", "t4", "--devices", "0"), 2, "--devices"),
        (("--hardware", "t4", "stages.0.duration=10%"), 8, "no limit"),
        (("--hardware", "t4", "stages.1.hidden_size=abc"), 2, "stages.1.hidden_size"),
        (("--hardware", "t4", "--partition", "a b"), 2, "without spaces"),
        (("--hardware", "t4", "--hours", "0.05"), 8, "--notice"),
        (("--hardware", "t4", "--notice", "5"), 2, "--notice"),
        ((), 2, "--hardware"),
    ],
)
def test_a_job_that_cannot_run_is_not_written(cli, recipe_file, tmp_path, more, code, said):
    found, _, err = cli("launch", "slurm", recipe_file, *more)
    assert (found, said in err, "bug" in err) == (code, True, False), err
    assert not any(tmp_path.iterdir())


def test_runs_are_listed_shown_and_reported(cli, copy_of_finished):
    code, out, _ = cli("runs")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("tiny"))
    assert "finished" in line and " 40 " in line and "$" in line
    for name in ("tiny", copy_of_finished):
        code, out, _ = cli("show", name)
        assert code == 0 and "Stage 2" in out and "final" in out
    (copy_of_finished / PAGE).unlink()
    code, out, _ = cli("report", "tiny")
    assert code == 0 and out.strip().endswith(PAGE) and (copy_of_finished / PAGE).exists()


def test_what_a_method_found_is_shown_and_its_page_is_left_as_it_is(cli, tmp_path):
    folder = tmp_path / "runs" / "asked"
    folder.mkdir(parents=True)
    (folder / RECIPE).write_text("model: m\n")
    (folder / PAGE).write_text("a method's own")
    records.write(folder / STATE, {"status": "finished"})
    assert cli("show", "asked") == (0, "runs/asked\nruns/asked/report.html\n", "")
    Report("m", [Row("sums", "acc", 0.5, stderr=0.1, n=25)]).save(folder / RESULTS)
    assert cli("show", "asked") == (0, "sums  acc  0.5 ± 0.1\nruns/asked/report.html\n", "")
    assert cli("report", "asked") == (0, "runs/asked/report.html\n", "")
    assert (folder / PAGE).read_text() == "a method's own"
    (folder / RESULTS).write_text('{"need": 1}')
    code, _, err = cli("show", "asked")
    assert code == RunError.exit_code and "no report" in err


def test_a_finished_method_is_not_carried_out_again(cli, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(ModelSpec(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2).to_config())
    )
    command = ("budget", "count", "model=config.json", "hardware=a100-80g", "--name", "counted")
    assert cli(*command)[0] == 0
    folder = tmp_path / "runs" / "counted"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, _ = cli(*command)
    assert (code, out) == (0, "runs/counted is finished; nothing to do. Choose another --name to run it again.\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_that_has_no_state_yet_is_listed_as_unfinished(cli, tmp_path):
    folder = tmp_path / "runs" / "new"
    folder.mkdir(parents=True)
    (folder / RECIPE).write_text("name: new\n")
    (tmp_path / "runs" / "other").mkdir()
    code, out, _ = cli("runs")
    assert code == 0 and "unfinished" in out and "other" not in out


def test_without_runs_the_list_says_how_to_make_one(cli):
    assert cli("runs") == (0, "No runs in runs. `espalier demo` makes one.\n", "")


def test_the_environment_names_what_a_bug_report_needs(cli):
    code, out, _ = cli("env")
    assert code == 0
    for name in ("python", "torch", "transformers", "tokenizers", "datasets"):
        assert any(line.startswith(f"{name} ") for line in out.splitlines())


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (("sing",), 2, "sing"),
        (("runs", "--loudly"), 2, "--loudly"),
        (("run",), 2, "recipe"),
        (("run", "no.yaml"), 2, "no.yaml"),
        (("grow", "stak", "model=a"), 2, "Did you mean 'grow.stack'?"),
        (("schema", "grow.stak"), 2, "grow.stack"),
        (("grow", "stack", "model=a", "out=b", "factr=2"), 2, "factor"),
        (("grow", "stack", "model=a", "out=b", "factor"), 2, "key=value"),
        (("grow", "stack", "model=a", "out=b"), 2, "either factor or layers"),
        (("grow", "stack", "model=nowhere", "out=b", "factor=2"), 4, "config.json|no such folder"),
        (("show", "nothing"), 5, "espalier runs"),
        (("report", "nothing"), 5, "espalier runs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said_with_its_exit_code(cli, arguments, code, said):
    found, _, err = cli(*arguments)
    assert found == code
    assert any(words in err for words in said.split("|")), err
    assert "Traceback" not in err and "bug" not in err


def test_a_bug_is_called_one_and_its_traceback_kept(cli, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("espalier.cli.runs.Ledger", broken)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / RECIPE).write_text("name: one\n")
    code, _, err = cli("runs")
    assert code == 1 and "This is a bug in Espalier" in err and "of all things" in err
    assert "Traceback" not in err
    assert "ZeroDivisionError" in (tmp_path / "home" / "bug.txt").read_text()
