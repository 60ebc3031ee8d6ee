"""Completions of a few prompts, to see what a model writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel


def complete(model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """The most likely continuation of each prompt, without the prompt; a mild penalty keeps it from repeating."""
    completions = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids
        written = model.generate(
            torch.tensor([ids], device=model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=model.config.eos_token_id,
        )
        completions.append(tokenizer.decode(written[0, len(ids) :].tolist()))
    return completions
