"""Count: the command's figures are those of flops, memory and parallel, from a folder or from sizes, without torch."""

import json
import subprocess
import sys

import pytest

from espalier import recipe
from espalier.budget import flops, memory, parallel
from espalier.budget.count import CountRecipe, count
from espalier.errors import ModelError, RecipeError
from espalier.report import Report
from espalier.run import RESULTS, Run
from espalier.spec import ModelSpec

SPEC = ModelSpec(
    family="mixtral",
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
)
LAYOUT = {"data": 4, "tensor": 2, "expert": 2, "sharding": "zero1"}
LINKS = {"within": 3e11, "between": 5e10}


@pytest.fixture
def counted(tmp_path):
    """Run the method; what it prints, and its report."""

    def counted(**settings) -> tuple[str, Report]:
        resolved = CountRecipe(**{"model": SPEC, "sequence_length": 128, "batch": 16, **settings})
        with Run.start(tmp_path / "run", resolved, tell=lambda line: None) as run:
            printed = count(resolved, run)
        return printed, Report.load(tmp_path / "run" / RESULTS)

    return counted


@pytest.fixture
def config(tmp_path):
    """A folder with a config.json and no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SPEC.to_config()))
    return folder


def test_operators_add_up_to_the_model(counted):
    printed, report = counted()
    names = [row.task for row in report.rows if row.metric == "count"]
    assert names == [op.name for op in flops.operators(SPEC, 128)]
    for metric, total in (("parameters", flops.parameters(SPEC)), ("FLOPs a token", flops.forward_flops(SPEC, 128))):
        assert sum(report.value(name, metric) for name in names) == total
        assert f"{total:,}" in printed
    assert sum(report.value(name, "share") for name in names) == pytest.approx(1)
    assert report.value("model", "active parameters") == flops.active_parameters(SPEC)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_memory_is_told_by_optimizer_and_recomputation(counted, optimizer, recompute):
    need = memory.training_memory(
        SPEC,
        rows=16,
        sequence_length=128,
        optimizer=optimizer,
        compute="bfloat16",
        loss_chunk=16 * 128,
        attention="sdpa",
        recompute=recompute,
    )
    _, report = counted()
    task = optimizer if recompute == "none" else f"{optimizer}, recomputing"
    assert report.value(task, "total") == need.total
    assert report.value(task, "activations") == need.activations


def test_one_device_has_no_ranks(counted):
    printed, report = counted()
    assert "rank" not in printed and not any("rank" in row.task for row in report.rows)


def test_a_layout_tells_what_a_rank_holds_and_sends_and_how_long_an_update_takes(counted):
    settings = {"layout": LAYOUT, "links": LINKS, "hardware": "h100-80g", "micro_batch": 2}
    printed, report = counted(**settings)
    layout, update = parallel.Layout(**LAYOUT), parallel.Update(16, 2, 128)
    assert report.value("a rank of 8", "total") == parallel.rank_memory(SPEC, layout, update).total
    moved = {row.metric: row.value for row in report.rows if row.task == "sent by a rank"}
    assert moved == {f"{m.axis} {m.kind}": m.bytes for m in parallel.traffic(SPEC, layout, update) if m.bytes}
    total = report.value("an update", "total")
    assert total == sum(row.value for row in report.rows if row.task == "an update" and row.note == "seconds") / 2
    assert report.value("an update", "tokens/s") == pytest.approx(16 * 128 / total)
    assert "expert all-to-all" in printed and "tokens/s" in printed
    parts = [line.split()[0] for line in printed.split("\nbytes ")[1].splitlines()[1:]]
    alone = [row.metric for row in report.rows if row.task == "adamw"]
    ranks = [row.metric for row in report.rows if row.task == "a rank of 8"]
    assert set(parts) == {*alone, *ranks} and parts[-1] == "total"


def test_rows_go_through_a_rank_at_once_where_no_micro_batch_is_stated():
    assert CountRecipe(model=SPEC, batch=16).update().micro_rows == 16
    assert CountRecipe(model=SPEC, batch=16, layout={"data": 4}).update().micro_rows == 4
    assert CountRecipe(model=SPEC, batch=16, layout={"data": 4}, micro_batch=2).update().micro_rows == 2


def test_a_folder_its_config_and_the_sizes_give_the_same(counted, config):
    _, by_sizes = counted()
    for number, model in enumerate((config, config / "config.json")):
        resolved = CountRecipe(model=model, sequence_length=128, batch=16)
        with Run.start(config.parent / f"run-{number}", resolved, tell=lambda line: None) as run:
            count(resolved, run)
        report = Report.load(config.parent / f"run-{number}" / RESULTS)
        assert (report.rows, report.context) == (by_sizes.rows, by_sizes.context)


def test_sizes_are_read_from_the_command_line_and_a_slip_is_told():
    sizes = ["model.family=llama", "model.vocab_size=9", "model.hidden_size=8", "model.num_hidden_layers=1"]
    assert recipe.load(CountRecipe, None, [*sizes, "model.head_dim=4"]).model.num_attention_heads == 2
    with pytest.raises(RecipeError, match="hidden_siz") as refused:
        recipe.load(CountRecipe, None, [*sizes, "model.head_dim=4", "model.hidden_siz=4"])
    assert refused.value.mend == "Did you mean 'hidden_size'?"


@pytest.mark.parametrize(
    "settings, where",
    [
        ({"hardware": "abacus"}, "hardware"),
        ({"hardware": "h100-80g", "layout": {"data": 2}}, "links"),
        ({"layout": {"tensor": 3}}, "layout.tensor"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_its_key(counted, settings, where):
    with pytest.raises(RecipeError) as refused:
        counted(**settings)
    assert refused.value.where == where


def test_a_config_that_is_not_there_is_refused(counted, tmp_path):
    with pytest.raises(ModelError, match=r"nowhere"):
        counted(model=tmp_path / "nowhere")


def test_counting_imports_no_torch(config, tmp_path):
    command = ["budget", "count", f"model={config}", "hardware=a100-80g", "--runs", str(tmp_path / "runs")]
    code = (
        f"import sys\nfrom espalier.cli.app import run_app\ncode = run_app({command})\n"
        "print(code, [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "0 []\n"
    assert f"{flops.parameters(SPEC):,}" in done.stdout
