"""Growing models in memory and folders on disk."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from espalier import files
from espalier.errors import ModelError
from espalier.folder import WEIGHTS, ModelFolder
from espalier.grow import operators
from espalier.grow.apply import grow_folder, grow_model, grow_moments, plan_weights
from espalier.grow.depth import identity, stack
from espalier.grow.width import fpi, zero_pad
from espalier.model.axes import discover
from espalier.model.build import load
from espalier.model.mup import Parametrization
from espalier.model.shards import Weights


def test_a_growth_planned_from_another_shape_is_refused(spec, make, grow):
    other = spec.changed(rms_norm_eps=1e-5)
    with pytest.raises(ModelError, match="rms_norm_eps"):
        grow(make(spec), stack(other, other.changed(num_hidden_layers=6)))


def test_the_old_model_and_the_random_state_stay_as_they_were(spec, make, grow):
    small = make(spec).train()
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    state = torch.random.get_rng_state()
    large = grow(small, identity(spec, spec.changed(num_hidden_layers=4)))
    assert torch.equal(state, torch.random.get_rng_state()) and large.training
    with torch.no_grad():
        for weight in large.parameters():
            weight += 1
    assert all(torch.equal(weight, before[name]) for name, weight in small.state_dict().items())


def test_no_growth_gives_a_copy_that_shares_nothing(spec, make):
    small = make(spec)
    same = grow_model(small, [], seed=0, std_of=lambda name, shape: 0.0)
    for name, weight in same.named_parameters():
        old = small.get_parameter(name)
        assert torch.equal(weight, old) and weight.data_ptr() != old.data_ptr()


def test_what_the_growth_does_not_touch_in_the_config_stays(spec, make, grow):
    small = make(spec)
    small.config.attention_dropout, small.config.eos_token_id = 0.25, 7
    large = grow(small, zero_pad(spec, spec.changed(hidden_size=40)))
    assert large.config.attention_dropout == 0.25 and large.config.eos_token_id == 7
    assert large.config.rms_norm_eps == pytest.approx(spec.rms_norm_eps * 24 / 40)


def test_a_trained_model_goes_on_with_the_moments_of_its_optimizer(spec, make, grow, input_ids):
    small = make(spec).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    small(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    names = {weight: name for name, weight in small.named_parameters()}
    state = {names[weight]: dict(moments) for weight, moments in optimizer.state.items()}
    growths = [stack(spec, spec.changed(num_hidden_layers=6))]
    large = grow(small, *growths)
    grown = grow_moments(state, growths, discover(small.config.to_dict()))
    further = torch.optim.AdamW(large.parameters(), lr=1e-3)
    for name, weight in large.named_parameters():
        further.state[weight] = grown[name]
    large(input_ids, labels=input_ids).loss.backward()
    further.step()
    assert torch.equal(grown["model.layers.5.mlp.up_proj.weight"]["step"], torch.tensor(2.0))
    assert torch.equal(state["model.layers.2.mlp.up_proj.weight"]["step"], torch.tensor(1.0))


def std_of(growths):
    return Parametrization(kind="standard").std_of(growths[-1].after)


def streamed(parent: Path, out: Path, growths, *, tell=print, **more) -> PreTrainedModel:
    finish = lambda folder: None  # noqa: E731
    growth = {"seed": 3, "std_of": std_of(growths), "finish": finish, "tell": tell}
    grow_folder(ModelFolder.open(parent), out, growths, **growth, **more)
    return load(ModelFolder.open(out), dtype="auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", operators.WIDTH)
def test_folder_to_folder_gives_the_same_bits_as_in_memory(width, dtype, granite, make, tmp_path):
    small = make(granite).to(dtype)
    small.save_pretrained(tmp_path / "small", max_shard_size="10KB")
    shape = discover(small.config.to_dict()).shape
    after = shape.changed(hidden_size=48, intermediate_size=56, num_attention_heads=8, num_hidden_layers=4)
    growths = operators.plan_growth(shape, after, width=width, depth="interpolate")
    large = streamed(tmp_path / "small", tmp_path / "large", growths, shard_bytes=20_000)
    expected = grow_model(small, growths, seed=3, std_of=std_of(growths))
    assert large.dtype == dtype
    assert len(ModelFolder.open(tmp_path / "large").weight_files()) > 1
    for name, weight in expected.state_dict().items():
        assert torch.equal(large.state_dict()[name], weight), name
    own = {"architectures": None, "_name_or_path": None}
    assert large.config.to_dict() | own == expected.config.to_dict() | own


CONVERTED = {
    "gpt_neox": {},
    "granitemoe": {"num_local_experts": 4, "num_key_value_heads": 2},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
}


@pytest.fixture(params=CONVERTED)
def converted(request) -> PreTrainedModel:
    """A model of a family whose tensors transformers renames or joins as it loads them."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = AutoConfig.for_model(request.param, **sizes, **special, intermediate_size=24, **CONVERTED[request.param])
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.mark.parametrize("depth", ["stack", "identity"])
def test_converted_families_are_grown_to_the_files_that_transformers_would_write(depth, converted, tmp_path, input_ids):
    converted.save_pretrained(tmp_path / "small")
    shape = discover(converted.config.to_dict()).shape
    sizes = {"moe_intermediate_size": 40} if "moe_intermediate_size" in shape.fields() else {"intermediate_size": 40}
    growths = operators.plan_growth(shape, shape.changed(num_hidden_layers=4, **sizes), width="zero_pad", depth=depth)
    told: list[str] = []
    large = streamed(tmp_path / "small", tmp_path / "large", growths, tell=told.append, shard_bytes=20_000)
    expected = grow_model(load(ModelFolder(tmp_path / "small"), dtype="auto"), growths, seed=3, std_of=std_of(growths))
    expected.save_pretrained(tmp_path / "expected")
    assert told == []
    ours, theirs = (Weights.open(ModelFolder(tmp_path / name)) for name in ("large", "expected"))
    assert set(ours.names) == set(theirs.names)
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("large", "expected")]
    assert configs[0] == configs[1]
    with torch.no_grad():
        assert torch.equal(large(input_ids).logits, expected.eval()(input_ids).logits)


def test_a_folder_that_transformers_loads_with_a_warning_is_grown_in_memory(spec, make, tmp_path, input_ids):
    small = make(spec)
    small.save_pretrained(tmp_path / "small")
    weights = load_file(tmp_path / "small" / WEIGHTS)
    save_file(weights | {"surprise": torch.ones(2)}, tmp_path / "small" / WEIGHTS)
    shape = discover(spec.to_config()).shape
    told: list[str] = []
    growths = [identity(shape, shape.changed(num_hidden_layers=4))]
    large = streamed(tmp_path / "small", tmp_path / "large", growths, tell=told.append)
    assert len(told) == 1 and "the whole model is held in memory" in told[0]
    with torch.no_grad():
        assert torch.allclose(small(input_ids).logits, large(input_ids).logits, atol=1e-5)


def test_shares_and_initial_values_tell_interrupted_growths_apart(spec, make, tmp_path):
    """Finished shards of one growth are never taken for those of another."""
    make(spec).save_pretrained(tmp_path / "small")
    shape = discover(spec.to_config()).shape
    wide = shape.changed(hidden_size=48)

    def broken_off(folder):
        raise ModelError("here", found="a kill", expected="none", mend="Go on.")

    def grow(growth, std, finish):
        grow_folder(
            ModelFolder.open(tmp_path / "small"),
            tmp_path / "large",
            [growth],
            seed=3,
            std_of=lambda name, size: std,
            finish=finish,
            tell=lambda line: None,
            shard_bytes=20_000,
        )
        return ModelFolder.open(tmp_path / "large").fingerprint()

    cases = [(fpi(shape, wide, 0.2), 0.1), (fpi(shape, wide, 0.4), 0.1), (zero_pad(shape, wide), 0.1)]
    cases.append((zero_pad(shape, wide), 0.2))
    whole = [grow(growth, std, lambda folder: None) for growth, std in cases]
    assert len(set(whole)) == len(cases)
    for (growth, std), expected in zip(cases, whole, strict=True):
        for other in cases:
            with pytest.raises(ModelError, match="a kill"):
                grow(*other, broken_off)
            assert grow(growth, std, lambda folder: None) == expected


def test_a_broken_promise_leaves_the_folder_as_it_was(spec, make, tmp_path):
    make(spec).save_pretrained(tmp_path / "small")
    shape = discover(spec.to_config()).shape
    growths = [identity(shape, shape.changed(num_hidden_layers=4))]
    streamed(tmp_path / "small", tmp_path / "large", growths)
    before = ModelFolder.open(tmp_path / "large").fingerprint()

    def refuse(folder):
        raise ModelError("here", found="a broken promise", expected="a kept one", mend="None.")

    with pytest.raises(ModelError, match="a broken promise"):
        grow_folder(
            ModelFolder.open(tmp_path / "small"),
            tmp_path / "large",
            [stack(shape, shape.changed(num_hidden_layers=6))],
            seed=3,
            std_of=std_of(growths),
            finish=refuse,
            tell=lambda line: None,
        )
    assert ModelFolder.open(tmp_path / "large").fingerprint() == before


def test_nothing_is_read_for_a_growth_that_transformers_would_build_differently(spec):
    growth = stack(spec, spec.changed(num_hidden_layers=6))
    layers = copy.copy(growth.layers)
    object.__setattr__(layers, "source", growth.layers.source[:5])
    broken = copy.copy(growth)
    object.__setattr__(broken, "layers", layers)
    read = lambda name: pytest.fail(f"{name} was read")  # noqa: E731
    with pytest.raises(ModelError, match="as transformers builds it"):
        plan_weights(spec.to_config(), [broken], read, seed=0, std_of=std_of([growth]))


KILLED = """
import os, signal, sys
from pathlib import Path
from espalier.folder import ModelFolder
from espalier.grow import apply, operators
from espalier.model import shards
from espalier.model.axes import discover
from espalier.model.mup import Parametrization

parent, out, left = ModelFolder.open(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
read, pieces = shards.Weights.read, shards.Stored.pieces

def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

shards.Weights.read = lambda self, name: (count(), read(self, name))[1]
shards.Stored.pieces = lambda self, buffers: (count(), pieces(self, buffers))[1]
shape = discover(parent.config).shape
growths = [operators.DEPTH["stack"](shape, shape.changed(num_hidden_layers=6))]
if len(sys.argv) > 4:
    growths.append(operators.WIDTH["zero_pad"](growths[0].after, growths[0].after.changed(**{sys.argv[4]: 40})))
std_of = Parametrization(kind="standard").std_of(growths[-1].after)
finish = lambda folder: None
apply.grow_folder(parent, out, growths, seed=3, std_of=std_of, finish=finish, tell=print, shard_bytes=20_000)
"""


def grown_in_a_process(parent: Path, out: Path, kill_at: int, *wider: str) -> subprocess.CompletedProcess:
    """Stack a folder to six layers, and widen `wider`, in a process that kills itself at a tensor from the files."""
    command = [sys.executable, "-c", KILLED, str(parent), str(out), str(kill_at), *wider]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True)


NEVER = 10**6


def require_taken_up(parent: Path, place: Path, kill_at: int, *wider: str) -> None:
    """A growth that is killed with some shards finished goes on to the bits of one that wasn't."""
    assert grown_in_a_process(parent, place / "whole", NEVER, *wider).returncode == 0
    assert grown_in_a_process(parent, place / "large", kill_at, *wider).returncode == -signal.SIGKILL
    assert not (place / "large").exists()
    assert json.loads((place / ".resumable-large" / "journal.json").read_text())["files"]
    done = grown_in_a_process(parent, place / "large", NEVER, *wider)
    assert done.returncode == 0, done.stderr.decode()
    assert files.damage(place / "large") is None
    assert ModelFolder.open(place / "large").fingerprint() == ModelFolder.open(place / "whole").fingerprint()
    assert not (place / ".resumable-large").exists()


def test_a_growth_that_was_killed_goes_on_to_the_same_bits(spec, make, tmp_path):
    make(spec).save_pretrained(tmp_path / "small")
    require_taken_up(tmp_path / "small", tmp_path, 30)


@pytest.mark.parametrize("converted", ["mixtral"], indirect=True)
def test_a_growth_that_was_killed_among_the_pieces_of_a_tensor_goes_on_to_the_same_bits(converted, tmp_path):
    """Shards of 20 kB end within the experts of a layer."""
    converted.save_pretrained(tmp_path / "small")
    require_taken_up(tmp_path / "small", tmp_path, 45, "intermediate_size")


MEMORY = """
import sys
from pathlib import Path
import torch
from transformers import AutoConfig
from espalier.folder import ModelFolder
from espalier.grow import apply, operators
from espalier.model import build
from espalier.model.axes import discover

def peak_mb():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

def grow(parent, out):
    shape = discover(parent.config).shape
    growths = [operators.WIDTH["zero_pad"](shape, shape.changed(intermediate_size=320))]
    more = {"seed": 0, "std_of": lambda name, size: 0.1, "finish": lambda folder: None, "tell": print}
    apply.grow_folder(parent, out, growths, **more, shard_bytes=20_000_000)

small, large = (ModelFolder.open(path) for path in sys.argv[1:3])
grow(small, Path(sys.argv[3]))
Path("/proc/self/clear_refs").write_text("5")
before = peak_mb()
grow(large, Path(sys.argv[3]))
streamed = peak_mb()
model = build.load(large)
print(int(streamed - before), int(peak_mb() - before))
"""


def test_growing_stacked_experts_takes_the_memory_of_a_few_tensors(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 256, "intermediate_size": 256, "num_local_experts": 4}
    for layers in (1, 48):
        config = AutoConfig.for_model(
            "mixtral", **sizes, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(layers))
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in ("1", "48", "out"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    streamed_mb, loaded_mb = map(int, done.stdout.split())
    # The largest tensor has 2 MB; the allocator keeps up to 22, of however many.
    assert streamed_mb <= 50 and loaded_mb >= 150, "48 layers of 4 MB"
