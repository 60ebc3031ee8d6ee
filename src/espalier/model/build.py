"""Build, load and save models: Hugging Face's own classes, with initial values that are a function of seed and name."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging

from espalier.errors import ModelError
from espalier.folder import TOKENIZER_FILES, ModelFolder
from espalier.model.mup import Parametrization
from espalier.model.shards import Weights
from espalier.spec import ModelSpec

transformers_logging.disable_progress_bar()

# What families call their number of layers.
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
GENERATION = "generation_config.json"


def build(spec: ModelSpec, parametrization: Parametrization, *, seed: int, eos_token_id: int = 0) -> PreTrainedModel:
    """A new fp32 model of this shape on the CPU; every tensor is drawn from (seed, its name) alone."""
    model = AutoModelForCausalLM.from_config(_config(new_config(spec, eos_token_id)), dtype=torch.float32)
    initial = initial_values(model, spec, parametrization, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(initial(name))
    return model


def new_config(spec: ModelSpec, eos_token_id: int = 0) -> dict[str, Any]:
    """The config of a new model of this shape."""
    return {**spec.to_config(), "bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None}


def initial_values(
    model: PreTrainedModel, spec: ModelSpec, parametrization: Parametrization, seed: int
) -> Callable[[str], Tensor]:
    """What makes the initial value of a parameter, by its name; the model only tells the shapes."""
    std_of = parametrization.std_of(spec)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}

    def initial(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        return draw(name, shape, std_of(name, shape), seed)

    return initial


def skeleton(config: dict[str, Any]) -> PreTrainedModel:
    """A model of this config whose weights aren't there: they are on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(config), dtype=torch.float32)


def _config(values: dict[str, Any]) -> PreTrainedConfig:
    config = AutoConfig.for_model(**values)
    config.architectures = None
    return config


def draw(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """Normal values of standard deviation `std`, the same for the same (seed, name, shape)."""
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
    return torch.randn(shape, generator=generator).mul_(std)


def load(folder: ModelFolder, *, dtype: torch.dtype | Literal["auto"] = torch.float32) -> PreTrainedModel:
    """The model of a folder on the CPU, in fp32; "auto" keeps the dtype of its weights.

    Runs no code and reads no pickle of the folder, whether or not it was opened with `ModelFolder.open`. `ModelError`
    for weights whose headers don't describe them, that aren't the model's, or that transformers can't load.
    """
    _require_layers(folder, folder.config, len(Weights.open(folder).names))
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises nothing narrower
        raise _not_loaded(folder, " ".join(str(error).split())[:200]) from error
    if told["missing_keys"]:
        raise _not_loaded(folder, f"no weights for {', '.join(sorted(told['missing_keys']))[:200]}")
    return model


def _require_layers(folder: ModelFolder, config: dict[str, Any], tensors: int) -> None:
    """Refuse a config with more layers than the files have tensors, before a module is made for each."""
    for key in LAYER_KEYS:
        if isinstance(layers := config.get(key), int) and layers > tensors:
            raise ModelError(
                f"{folder.path}/config.json: {key}",
                found=f"{layers} layers, and {tensors} tensors in the weight files",
                expected="the model that the weights are of",
                mend="Restore config.json, or the files that are missing.",
            )


def _not_loaded(folder: ModelFolder, found: str) -> ModelError:
    return ModelError(
        str(folder.path),
        found=f"what transformers can't load ({found})",
        expected="a config and the weights of one causal LM",
        mend="Restore the folder from its source; an architecture that is newer needs a newer transformers.",
    )


def save(model: PreTrainedModel, path: Path, tokenizer: Path | None, weights: dict[str, Tensor] | None = None) -> None:
    """Write the model and its tokenizer's files into a folder; `weights`, if given, in the place of the model's own."""
    model.save_pretrained(path, state_dict=weights)
    if tokenizer:
        copy_tokenizer(tokenizer, path)


def save_config(model: PreTrainedModel, path: Path, tokenizer: Path | None) -> None:
    """Write what a model folder has beside its weights."""
    config = copy.deepcopy(model.config)
    # Sharding derives a class of the model's own.
    config.architectures = [next(kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transf"))]
    config.dtype = model.dtype
    config.save_pretrained(path)
    if model.can_generate():
        model.generation_config.save_pretrained(path)
    if tokenizer:
        copy_tokenizer(tokenizer, path)


def copy_tokenizer(source: Path, path: Path, *, also: tuple[str, ...] = ()) -> None:
    """Copy the tokenizer's files, and others, from one folder to another, those that are there."""
    for name in (*TOKENIZER_FILES, *also):
        if (source / name).exists():
            shutil.copy(source / name, path / name)
