"""Fine-tuning: parameters, FLOPs and bytes against a model that has adapters put on by hand, and refusals that help."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from espalier import files
from espalier.budget import finetune as module
from espalier.budget import flops, memory, rows
from espalier.budget.finetune import ALL_LINEAR, FinetuneRecipe, WayRecipe, estimate, need_of
from espalier.budget.hardware import catalogue
from espalier.data.stream import Batch
from espalier.errors import BudgetError, ModelError, RecipeError
from espalier.model.build import build
from espalier.model.mup import Parametrization
from espalier.recipe import parse
from espalier.report import Report
from espalier.run import RESULTS
from espalier.spec import DENSE, MIXTURES, ModelSpec
from espalier.train.device import Device
from espalier.train.loop import backward
from espalier.train.objectives import CHUNK, NextToken
from espalier.untrusted import read_json

ROOM = 2**50
BIG = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
       "num_key_value_heads": 8, "vocab_size": 128_256, "family": "llama"}  # fmt: skip


def small(family="llama", **sizes):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352} | sizes
    return ModelSpec(**{"family": family, "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3} | sizes)


def recipe_of(**told) -> FinetuneRecipe:
    return FinetuneRecipe(**{"model": "model", "rows": 1000, "tokens": 10**6, "hardware": "h100-80g"} | told)


class Adapted(nn.Module):
    """A frozen linear layer and what low rank adds to it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 100)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + functional.linear(functional.linear(x, self.down), self.up)


def adapted(spec, way):
    """A model whose base is frozen, in the compute dtype, with float32 adapters."""
    model = build(spec, Parametrization(kind="standard"), seed=0).to(getattr(torch, way.compute))
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in way.target:
            model.get_submodule(name.rpartition(".")[0]).__setattr__(name.rpartition(".")[2], Adapted(layer, way.rank))
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def a_batch(spec, way) -> Batch:
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (way.batch, way.sequence_length + 1))
    return Batch(ids[:, :-1], ids[:, 1:], None)


ways = st.builds(
    WayRecipe,
    rank=st.integers(1, 64),
    target=st.lists(st.sampled_from(ALL_LINEAR), min_size=1, unique=True).map(tuple),
)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(ways, st.sampled_from(DENSE))
def test_adapters_have_the_parameters_that_the_layers_shapes_ask_for(way, family):
    spec = small(family, head_dim=16)
    with torch.device("meta"):
        model = adapted(spec, way)
    assert module.adapter_parameters(spec, way) == sum(parameter.numel() for parameter in trained(model))


@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize("target", [ALL_LINEAR, ("q_proj", "v_proj")])
@pytest.mark.parametrize("family", ["granite", "qwen3"])
def test_flops_of_adapters_are_those_that_torch_counts(family, target, recompute):
    spec, way = small(family), WayRecipe(rank=8, target=target, recompute=recompute, sequence_length=160, batch=2)
    model = adapted(spec, way.changed(compute="float32"))
    Device(attention="eager", recompute=recompute).place(model)
    with FlopCounterMode(display=False) as counter:
        backward(model, a_batch(spec, way), 2, NextToken(), Device())
    head = 2 * spec.hidden_size * spec.vocab_size
    assert counter.get_total_flops() / 320 == pytest.approx(module.flops_per_token(spec, way), rel=0.02)
    assert module.flops_per_token(spec, way) < flops.training_flops(spec, 160, recompute) - head / 2


def test_flops_of_full_fine_tuning_are_those_of_training():
    way = WayRecipe(method="full", sequence_length=40, recompute="layers")
    assert module.flops_per_token(small(), way) == flops.training_flops(small(), 40, "layers")


@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method, target, batch, sizes",
    [
        ("full", ALL_LINEAR, 4, {}),
        ("lora", ALL_LINEAR, 8, {"vocab_size": 64}),
        ("lora", ("q_proj", "v_proj"), 8, {"vocab_size": 64, "num_hidden_layers": 6}),
        ("lora", ALL_LINEAR, 4, {"vocab_size": 4096, "family": "qwen3"}),
        ("lora", ("down_proj",), 1, {"hidden_size": 512, "intermediate_size": 1024}),
    ],
)
def test_memory_is_within_20_percent_of_what_the_allocator_reports(
    peak_bytes, method, target, batch, sizes, compute, recompute
):
    spec = small(**{"family": "llama"} | sizes)
    way = WayRecipe(
        method=method, target=target, rank=8, batch=batch, sequence_length=128, compute=compute, recompute=recompute
    )
    model = build(spec, Parametrization(kind="standard"), seed=0) if method == "full" else adapted(spec, way)
    device = Device(compute=compute, recompute=recompute)
    device.place(model)
    optimizer = torch.optim.AdamW(trained(model), fused=True)

    def update():
        backward(model, a_batch(spec, way), batch, NextToken(), device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    update()
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    need = need_of(spec, way)
    assert need.total - need.framework == pytest.approx(held + peak_bytes(update), rel=0.2)


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(ways)
def test_what_is_trained_has_weights_gradients_and_two_moments(way):
    spec = small()
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in trained(adapted(spec, way)))
    need = need_of(spec, way)
    assert (need.adapters, need.gradients, need.optimizer) == (6 * numbers, 4 * numbers, 8 * numbers)
    assert need.weights == 2 * flops.parameters(spec), "what is frozen is stored in bfloat16"


def test_the_loss_s_chunk_is_that_of_the_objective():
    assert module.LOSS_CHUNK == CHUNK


def test_each_way_of_saving_saves_and_says_where():
    spec, full = ModelSpec(**BIG), WayRecipe(method="full")
    lora, qlora = full.changed(method="lora"), full.changed(method="qlora")
    needs = [need_of(spec, way) for way in (full, lora, qlora)]
    assert needs[0].total > 6 * needs[1].total > 12 * needs[2].total
    assert needs[1].optimizer < 0.02 * needs[0].optimizer
    linear = memory.layer_matrices(spec)
    assert (needs[1].weights - needs[2].weights) / linear == pytest.approx(2 - 0.5 - 1 / 64, rel=0.001)
    for way in (full, lora, qlora):
        again = need_of(spec, way.changed(batch=8, recompute="layers"))
        assert again.activations < need_of(spec, way.changed(batch=8)).activations / 5


@pytest.mark.parametrize("gigabytes", [1, 3, 8, 24])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_largest_batch_fits_and_one_more_does_not(method, gigabytes):
    spec, way = small(num_hidden_layers=12, hidden_size=512), WayRecipe(method=method)
    largest = module.largest_batch(spec, way, gigabytes * 10**9)
    assert need_of(spec, way.changed(batch=max(largest, 1))).total <= gigabytes * 10**9
    assert need_of(spec, way.changed(batch=largest + 1)).total > gigabytes * 10**9


@pytest.mark.parametrize("hardware", ["rtx-4090", "a100-80g"])
@pytest.mark.parametrize("method, batch", [("full", 1), ("lora", 64), ("qlora", 512)])
@pytest.mark.parametrize("layers", [8, 20, 32])
def test_following_the_mend_makes_it_fit(method, batch, layers, hardware):
    spec = ModelSpec(**BIG | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": layers,
                              "num_attention_heads": 32})  # fmt: skip
    way, room = WayRecipe(method=method, batch=batch), memory.of_one_device(catalogue(files.home())[hardware])
    if need_of(spec, way).total <= room:
        return
    changes = dict(
        item.split("=") for item in re.fullmatch(r"Set (.+)\.", module.mend(spec, way, room)).group(1).split()
    )
    assert need_of(spec, way.changed(**changes)).total <= room


def test_the_estimate_prices_the_work_and_lists_who_holds_it_cheapest_first(tmp_path):
    spec, recipe = ModelSpec(**BIG | {"num_hidden_layers": 24}), recipe_of(epochs=3, utilization=0.5)
    made = estimate(spec, recipe, rows.Counted(1000, 10**6), tmp_path)
    row = catalogue(tmp_path)["h100-80g"]
    assert made.cost.tokens == 3e6
    assert made.cost.flops == 3e6 * module.flops_per_token(spec, recipe)
    assert made.cost.seconds == pytest.approx(made.cost.flops / (0.5 * row.peak_flops["bfloat16"]))
    assert made.cost.usd == pytest.approx(made.cost.seconds / 3600 * row.usd_per_hour)
    known = catalogue(tmp_path)
    assert set(made.held_by) == {
        key for key, gpu in known.items() if gpu.kind == "cuda" and gpu.memory_bytes >= made.need.total
    }
    assert list(made.held_by.values()) == sorted(made.held_by.values()) and "rtx-4090" not in made.held_by
    assert made.held_by["h100-80g"] == pytest.approx(made.cost.usd)
    there = estimate(spec, recipe_of(hardware="rtx-4090"), rows.Counted(1000, 10**6), tmp_path)
    assert there.mend and "doesn't fit" in str(there) and not made.mend


def test_a_model_that_fits_nowhere_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(BudgetError, match="method=qlora") as refused:
        estimate(ModelSpec(**BIG | {"num_hidden_layers": 120}), recipe_of(method="full"), rows.Counted(1, 1), tmp_path)
    assert refused.value.exit_code == 8 and "192 GB" in refused.value.expected
    with pytest.raises(BudgetError, match="smaller model"):
        estimate(ModelSpec(**BIG | {"num_hidden_layers": 1000}), recipe_of(), rows.Counted(1, 1), tmp_path)


@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_on_a_mixture_are_refused_and_all_of_it_may_be_trained(tmp_path, family):
    spec = small(family, num_experts=6, num_experts_per_tok=2)
    for method in ("lora", "qlora"):
        with pytest.raises(ModelError, match="method=full"):
            estimate(spec, recipe_of(method=method), rows.Counted(1, 1), tmp_path)
    made = estimate(spec, recipe_of(method="full"), rows.Counted(1, 1), tmp_path)
    assert made.trained == made.parameters == flops.parameters(spec)
    assert "lora" not in module.mend(spec, recipe_of(method="full"), 10**6)


def test_hardware_that_is_not_known_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match="Did you mean 'rtx-4090'"):
        estimate(small(), recipe_of(hardware="rtx4090"), rows.Counted(1, 1), tmp_path)


@pytest.mark.parametrize(
    "override, said",
    [
        ("rank=0", "rank: found 0"),
        ("target=[lm_head]", "target"),
        ("target=[]", "target"),
        ("data=rows.jsonl", "either data=FILE"),
        ("tokens=null", "either data=FILE"),
        ("rows=0", "rows: found 0"),
    ],
)
def test_settings_that_say_nothing_are_refused(override, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        parse(FinetuneRecipe, "{model: model, rows: 10, tokens: 100}", [override], where="recipe.yaml")


def test_the_verb_writes_what_it_tells(make_run, tmp_path):
    folder = tmp_path / "model"
    build(small(), Parametrization(kind="standard"), seed=0).save_pretrained(folder)
    run = make_run()
    made = module.finetune(recipe_of(model=folder), run)
    kept = Report.load(run.folder / RESULTS)
    assert kept.value("fine-tuning", "memory") == made.need.total and kept.context["cost"]["flops"] == made.cost.flops
    assert f"{module.adapter_parameters(small(), recipe_of()):,}"[:3] in str(made)


def test_a_family_that_no_spec_states_is_refused_by_name(make_run, tmp_path):
    folder = tmp_path / "model"
    build(small(), Parametrization(kind="standard"), seed=0).save_pretrained(folder)
    config = read_json(folder / "config.json") | {"model_type": "gpt2"}
    files.write_json(folder / "config.json", config)
    with pytest.raises(ModelError, match="'gpt2'"):
        module.finetune(recipe_of(model=folder), make_run())


def test_a_gpu_among_several_has_its_own_memory_alone():
    row = catalogue(files.home())["h100-80g"]
    assert memory.of_one_device(replace(row, count=8, memory_bytes=8 * row.memory_bytes)) == row.memory_bytes
