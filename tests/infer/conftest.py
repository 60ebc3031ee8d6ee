"""Folders of tiny models with random weights, of several families, and a tokenizer with tokens of all lengths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

EOS, POSITIONS = "<|endoftext|>", 64
SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.3}
MAMBA = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}
# What transformers calls a family, and its sizes; the last four have windows, or what a mask of ours can't say.
MODELS = {
    "granite": ("granite", SIZES | {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7}),
    "llama": ("llama", SIZES),
    "llama-tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 16}),
    "gpt2": ("gpt2", GPT2),
    "mixtral": ("mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "windowed": ("mistral", SIZES | {"sliding_window": 16}),
    "wide-windowed": ("mistral", SIZES | {"sliding_window": 24}),
    "softcapped": ("gemma2", SIZES | {"head_dim": 16, "sliding_window": 16}),
    "recurrent": ("mamba", MAMBA),
}
SAMPLE = "the cat sat on the mat and the dog that saw the cat ran to the man in the hat\n" * 3


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a model of MODELS; not to be changed."""
    root = tmp_path_factory.mktemp("models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            family, sizes = MODELS[name]
            ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **sizes, **ends)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
            _write_tokenizer(path)
        return path

    return folder


def _write_tokenizer(path: Path) -> None:
    """Byte-level BPE: id 0 ends a text, then come the bytes, then what the sample is made of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SAMPLE], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS}
    (path / "tokenizer_config.json").write_text(json.dumps(told | {"clean_up_tokenization_spaces": False}))
