"""What a ModelSpec computes: its operators, their parameters and their FLOPs per token.

Only matrix products are counted, a product of (m, k) by (k, n) as 2·m·k·n FLOPs, which is how
`torch.utils.flop_counter.FlopCounterMode` counts. Attention is counted as whole T x T products: that half of the
scores are masked saves arithmetic only in kernels that skip them, and isn't subtracted. Look-ups, norms, rotary
positions and softmax are left out (parameters of the norms are counted).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

from espalier.spec import ModelSpec

# What the backward pass computes again: nothing, the attention scores (as fused attention kernels do), or the layers
# (activation checkpointing) up to the last result that a gradient needs.
Recompute = Literal["none", "scores", "layers"]


@dataclass(frozen=True)
class Operator:
    """One kind of operator, which occurs `count` times in the model.

    flops       FLOPs per token of the forward pass, of one occurrence
    parameters  learned numbers, of one occurrence, all copies together
    inputs      numbers a token that a product with one copy's weights reads; 0 for other operators
    outputs     numbers a token that it writes
    copies      how many weights there are to choose from (experts), of which a token passes `used`
    """

    name: str
    flops: int
    parameters: int
    count: int = 1
    inputs: int = 0
    outputs: int = 0
    copies: int = 1
    used: int = 1


@lru_cache(maxsize=256)  # a comparison of layouts asks for the same ones again and again
def operators(spec: ModelSpec, sequence_length: int) -> tuple[Operator, ...]:
    """The operators of a model in the order of the forward pass, on rows of `sequence_length` tokens."""
    hidden, layers = spec.hidden_size, spec.num_hidden_layers
    query, key_value = spec.query_size, spec.key_value_size
    bias = spec.attention_bias
    scores = 2 * sequence_length * query
    head = 0 if spec.tie_word_embeddings else spec.vocab_size * hidden
    return (
        Operator("embedding", 0, spec.vocab_size * hidden),
        _linear("q", hidden, query, layers, bias=bias),
        _linear("k", hidden, key_value, layers, bias=bias),
        _linear("v", hidden, key_value, layers, bias=bias),
        Operator("scores", scores, 0, layers),
        Operator("values", scores, 0, layers),
        _linear("o", query, hidden, layers, bias=bias and spec.family != "qwen2"),
        *_feed_forward(spec),
        Operator("norms", 0, 2 * hidden + _head_norms(spec), layers),
        Operator("final_norm", 0, hidden),
        Operator("lm_head", 2 * hidden * spec.vocab_size, head, inputs=hidden, outputs=spec.vocab_size),
    )


def parameters(spec: ModelSpec) -> int:
    """The exact number of parameters; tied embeddings count once."""
    return sum(op.parameters * op.count for op in operators(spec, 1))


def active_parameters(spec: ModelSpec) -> int:
    """The parameters that one token passes: of the experts, those that it is sent to."""
    return sum(op.parameters // op.copies * op.used * op.count for op in operators(spec, 1))


def forward_flops(spec: ModelSpec, sequence_length: int) -> int:
    """FLOPs per token of a forward pass over rows of `sequence_length` tokens, logits at every position."""
    return sum(op.flops * op.count for op in operators(spec, sequence_length))


def training_flops(spec: ModelSpec, sequence_length: int, recompute: Recompute = "none") -> int:
    """FLOPs per token of forward and backward; the backward takes two products for each of the forward.

    Of recomputed layers no gradient needs what `down` makes, unless it is an expert's: that of its gate does.
    """
    layer = ("q", "k", "v", "scores", "values", "o", "router", "gate", "up")
    again = {"none": (), "scores": ("scores",), "layers": (*layer, "down") if spec.num_experts else layer}
    repeated = sum(op.flops * op.count for op in operators(spec, sequence_length) if op.name in again[recompute])
    return 3 * forward_flops(spec, sequence_length) + repeated


def is_expert(op: Operator, spec: ModelSpec) -> bool:
    """Whether an operator is a mixture's, with a weight for each expert."""
    return spec.num_experts > 0 and op.name in ("gate", "up", "down")


def prefill_flops(spec: ModelSpec, prompt: int) -> int:
    """FLOPs of reading a prompt of `prompt` tokens, logits at its last position alone."""
    head = operators(spec, prompt)[-1].flops
    return prompt * (forward_flops(spec, prompt) - head) + head


def decode_flops(spec: ModelSpec, context: int) -> int:
    """FLOPs of one more token with a key-value cache, when it attends to `context` tokens, itself among them."""
    return forward_flops(spec, context)  # its share of a row as long, where every token attends to the whole row


def narayanan_flops(spec: ModelSpec, sequence_length: int, recompute: Literal["none", "full"] = "none") -> float:
    """FLOPs per token of training by the published estimate, for comparison with published totals.

    k·L·d²·(1 + s/(6·d) + V/(16·L·d)) with L layers, width d, s tokens a row, V vocabulary, k = 72, or 96 with
    recomputation. It supposes 12·d² weights a layer (no grouped heads, two feed-forward matrices 4·d wide) and
    logits that aren't recomputed; k = 72 counts three quarters of the logits' FLOPs, since only k = 96 was derived.
    Narayanan et al., arXiv 2104.04473, eq. 3; k = 72 as FLM-101B uses it, arXiv 2309.03852.
    """
    layers, hidden = spec.num_hidden_layers, spec.hidden_size
    factor = {"none": 72, "full": 96}[recompute]
    attention = sequence_length / (6 * hidden)
    head = spec.vocab_size / (16 * layers * hidden)
    return factor * layers * hidden**2 * (1 + attention + head)


def _feed_forward(spec: ModelSpec) -> list[Operator]:
    """A layer's gated MLP, or its router and experts."""
    hidden, inner, layers = spec.hidden_size, spec.intermediate_size, spec.num_hidden_layers
    product = partial(_linear, copies=max(spec.num_experts, 1), used=max(spec.num_experts_per_tok, 1))
    return [
        *([_linear("router", hidden, spec.num_experts, layers)] if spec.num_experts else []),
        product("gate", hidden, inner, layers),
        product("up", hidden, inner, layers),
        product("down", inner, hidden, layers),
    ]


def _linear(
    name: str, inputs: int, outputs: int, count: int, *, bias: bool = False, copies: int = 1, used: int = 1
) -> Operator:
    weights = copies * (inputs * outputs + outputs * bias)
    return Operator(name, 2 * used * inputs * outputs, weights, count, inputs, outputs, copies, used)


def _head_norms(spec: ModelSpec) -> int:
    """Parameters of a layer's norms over queries and keys."""
    return {"none": 0, "each": 2 * spec.head_dim, "all": spec.query_size + spec.key_value_size}[spec.normed_heads]
