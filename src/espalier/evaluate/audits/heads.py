"""Attention heads while a model reads a prompt: what the last token asks of the options, and heads that are silenced.

Legend: R rows (tokens that are looked at), T tokens, H query heads, K key heads, D head size, O options, L layers.
Queries and keys are caught where the projections put them out, so before rotary positions, whatever kernel follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from espalier.errors import ModelError

Vectors = Literal["normed", "projected"]
# One projection for queries, keys and values: one after another, or head by head.
STACKED, INTERLEAVED = ("qkv_proj", "c_attn"), ("query_key_value",)
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


@dataclass(frozen=True)
class Attention:
    """An attention layer; query head h reads the keys of head h // (H / K)."""

    module: nn.Module
    heads: int
    key_heads: int
    head_dim: int

    @property
    def sources(self) -> tuple[nn.Module, nn.Module]:
        """What puts out queries and what puts out keys; the same where they are fused."""
        fused = _child(self.module, STACKED + INTERLEAVED)
        query, key = (fused or self.module.get_submodule(name) for name in ("q_proj", "k_proj"))
        return query, key

    @property
    def output(self) -> nn.Module:
        """What reads the heads' outputs, [.., H * D]."""
        found = _child(self.module, OUTPUTS)
        assert found is not None, "attention_layers has looked"
        return found

    def query(self, put_out_RX: Tensor, vectors: Vectors) -> Tensor:
        """Queries [R, H, D] from rows that their source put out."""
        return self._split(self._part(put_out_RX, 0, self.heads), self.heads, "q_norm", vectors)

    def key(self, put_out_RX: Tensor, vectors: Vectors) -> Tensor:
        """Keys [R, K, D] from rows that their source put out."""
        return self._split(self._part(put_out_RX, 1, self.key_heads), self.key_heads, "k_norm", vectors)

    def _part(self, put_out_RX: Tensor, part: int, heads: int) -> Tensor:
        """The queries (part 0) or keys (part 1) of what may be fused, [R, heads * D]."""
        if _child(self.module, INTERLEAVED):
            each_RHX = put_out_RX.unflatten(-1, (self.heads, 3 * self.head_dim))
            return each_RHX.chunk(3, dim=-1)[part].flatten(-2)
        if _child(self.module, STACKED):
            start = part * self.heads * self.head_dim
            return put_out_RX[:, start : start + heads * self.head_dim]
        return put_out_RX

    def _split(self, flat: Tensor, heads: int, name: str, vectors: Vectors) -> Tensor:
        """Into heads, normed if wanted and there is a norm: over all at once, as in OLMo 2, or each, as in Qwen 3."""
        norm = getattr(self.module, name, None) if vectors == "normed" else None
        if norm is not None and norm.weight.shape == flat.shape[-1:]:
            flat, norm = norm(flat), None
        split = flat.unflatten(-1, (heads, self.head_dim))
        return norm(split) if norm is not None else split


@dataclass(frozen=True)
class Seen:
    """What a pass over one prompt showed, in float32.

    next_V         log-probabilities of the token after it
    qk_LHO         query of the last token times the keys at the options
    attention_LHO  weight that the last token gives the options; None unless the model computes it (eager attention)
    """

    next_V: Tensor
    qk_LHO: Tensor
    attention_LHO: Tensor | None


def attention_layers(model: PreTrainedModel) -> list[Attention]:
    """A decoder's attention layers in their order; `ModelError` where they have no queries and keys to catch."""
    config = model.config.get_text_config()
    layers = []
    for module in model.modules():
        if _is_attention(module):
            heads = config.num_attention_heads
            key_heads = getattr(config, "num_key_value_heads", None) or heads
            head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
            layers.append(Attention(module, heads, key_heads, head_dim))
    if not layers or not all(map(_fits, layers)):
        raise ModelError(
            f"model type {config.model_type}",
            found="attention without projections that put out a query and a key for each head",
            expected=f"q_proj and k_proj, or one of {', '.join(STACKED + INTERLEAVED)}; and {' or '.join(OUTPUTS)}",
            mend="Take a decoder with ordinary attention, such as Llama, Qwen, Granite, GPT-2 or GPT-NeoX.",
        )
    return layers


@torch.inference_mode()
def look(
    model: PreTrainedModel, layers: Sequence[Attention], ids: Sequence[int], share_OT: Tensor, vectors: Vectors
) -> Seen:
    """One pass over a prompt.

    share_OT  of which tokens an option consists, each row with the sum 1: a key is their mean
    """
    share_OT = share_OT.to(model.device)
    rows_R = share_OT.any(0).nonzero().squeeze(1)
    share_OR = share_OT[:, rows_R]
    last = torch.tensor([len(ids) - 1], device=model.device)
    kept: dict[tuple[int, str], Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(layers):
            query, key = layer.sources
            for module, hook in (
                (query, _rows(kept, (number, "query"), last)),
                (key, _rows(kept, (number, "key"), rows_R)),
                (layer.module, _weights(kept, (number, "weights"), rows_R)),
            ):
                hooks.callback(module.register_forward_hook(hook).remove)
        out = model(torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    qk, attention = [], []
    for number, layer in enumerate(layers):
        query_HD = layer.query(kept[number, "query"], vectors)[0].float()
        key_RKD = layer.key(kept[number, "key"], vectors).float()
        key_OHD = torch.einsum("or,rkd->okd", share_OR, key_RKD).repeat_interleave(layer.heads // layer.key_heads, 1)
        qk.append(torch.einsum("hd,ohd->ho", query_HD, key_OHD))
        if (number, "weights") in kept:
            attention.append(kept[number, "weights"].float() @ share_OR.T)
    return Seen(
        out.logits[0, -1].float().log_softmax(-1).cpu(),
        torch.stack(qk).cpu(),
        torch.stack(attention).cpu() if attention else None,
    )


@contextlib.contextmanager
def silenced(layers: Sequence[Attention], heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """While this is open the outputs of these (layer, head) are zero."""

    def zero(head: int, head_dim: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            heads_BTX = inputs[0].clone()
            heads_BTX[..., head * head_dim : (head + 1) * head_dim] = 0
            return heads_BTX, *inputs[1:]

        return hook

    with contextlib.ExitStack() as hooks:
        for number, head in heads:
            layer = layers[number]
            hooks.callback(layer.output.register_forward_pre_hook(zero(head, layer.head_dim)).remove)
        yield


def _rows(kept: dict, name: tuple[int, str], rows: Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[name] = output[0, rows]

    return hook


def _weights(kept: dict, name: tuple[int, str], rows: Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        if output[1] is not None:  # fused kernels never have them
            kept[name] = output[1][0, :, -1, rows]

    return hook


def _child(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _is_attention(module: nn.Module) -> bool:
    return (hasattr(module, "q_proj") and hasattr(module, "k_proj")) or _child(
        module, STACKED + INTERLEAVED
    ) is not None


def _fits(layer: Attention) -> bool:
    """Whether the projections have the sizes that heads of this size would have."""
    query, key = layer.sources
    sizes = layer.heads * layer.head_dim, layer.key_heads * layer.head_dim
    wanted = sizes if query is not key else (sizes[0] + 2 * sizes[1],) * 2
    weights = [module.get_parameter("weight") for module in (query, key)]
    # GPT-2 holds its weights [inputs, outputs], others [outputs, inputs].
    fit = all(size in weight.shape for size, weight in zip(wanted, weights, strict=True))
    return fit and _child(layer.module, OUTPUTS) is not None
