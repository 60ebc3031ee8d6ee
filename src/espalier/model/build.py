"""Build, load and save models: Hugging Face's own classes, with initial values that are a function of seed and name."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import logging as transformers_logging

from espalier import untrusted
from espalier.errors import ModelError
from espalier.folder import ModelFolder
from espalier.model.mup import Parametrization
from espalier.model.shards import Weights
from espalier.spec import ModelSpec

transformers_logging.disable_progress_bar()

# What families call their number of layers.
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def build(spec: ModelSpec, parametrization: Parametrization, *, seed: int, eos_token_id: int = 0) -> PreTrainedModel:
    """A new fp32 model of this shape on the CPU; every tensor is drawn from (seed, its name) alone."""
    special = {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "pad_token_id": None}
    config = AutoConfig.for_model(**spec.to_config(), **special)
    config.architectures = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    std_of = parametrization.std_of(spec)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                weight.copy_(draw(name, tuple(weight.shape), std_of(name, tuple(weight.shape)), seed))
    return model


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
    untrusted.require_plain(folder.path)
    names = Weights.open(folder).names
    _require_layers(folder, len(names))
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


def _require_layers(folder: ModelFolder, tensors: int) -> None:
    """Refuse a config with more layers than the files have tensors, before a module is made for each."""
    for key in LAYER_KEYS:
        if isinstance(layers := folder.config.get(key), int) and layers > tensors:
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


def save(model: PreTrainedModel, path: Path, tokenizer: Path | None) -> None:
    """Write the model and its tokenizer's files into a folder."""
    model.save_pretrained(path)
    if tokenizer:
        copy_tokenizer(tokenizer, path)


def copy_tokenizer(source: Path, path: Path, *, also: tuple[str, ...] = ()) -> None:
    """Copy the tokenizer's files, and others, from one folder to another, those that are there."""
    for name in (*TOKENIZER_FILES, *also):
        if (source / name).exists():
            shutil.copy(source / name, path / name)
