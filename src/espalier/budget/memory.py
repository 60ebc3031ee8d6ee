"""Bytes that a ModelSpec needs: in memory while it trains, in the cache while it generates, on the disk when saved.

All results are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from espalier.budget.flops import Operator, operators, parameters
from espalier.spec import ModelSpec

Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Attention = Literal["eager", "sdpa"]
Recompute = Literal["none", "full"]
SIZE: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}

LAYER_INPUT = 4  # bytes a number: the residual stream is float32, under autocast too
TOKENIZER_BYTES_PER_ENTRY = 128  # a byte-level BPE entry and its merge in tokenizer.json take less
SMALL_FILES = 65_536  # config, manifest, made.json, headers of what isn't in a layer
HEADER_BYTES_PER_LAYER = 2048  # safetensors describes a tensor in about 120 bytes
HEADER_BYTES_PER_EXPERT = 512  # its gate, up and down, which are stored one by one


@dataclass(frozen=True)
class Memory:
    """What one training step holds when the backward pass begins, in bytes.

    weights      4 a parameter (float32 masters); under bfloat16 autocast 2 more for each weight of a product
    gradients    4 a parameter
    optimizer    8 a parameter (AdamW's two moments); 4 for those of the layers' matrices under Muon (one momentum),
                 which leaves experts to AdamW
    activations  what autograd keeps of the layers, see `activation_bytes_per_token`
    logits       3 float32 copies of one chunk's logits: themselves, their log-softmax, their gradient
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum. The interpreter, torch's libraries (some 400 MB) and allocator slack come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def training_memory(
    spec: ModelSpec,
    *,
    rows: int,
    sequence_length: int,
    optimizer: Optimizer,
    compute: Dtype,
    loss_chunk: int,
    attention: Attention = "eager",
    recompute: Recompute = "none",
) -> Memory:
    """Memory of one micro-batch of `rows` x `sequence_length` tokens on one device.

    The loss is taken over `loss_chunk` tokens at a time; rows * sequence_length of them is the plain loss.
    """
    tokens = rows * sequence_length
    in_products = sum(_matrix(op) for op in _products(spec)) + spec.vocab_size * spec.hidden_size
    casts = SIZE["bfloat16"] * in_products if compute == "bfloat16" else 0
    return Memory(
        weights=4 * parameters(spec) + casts,
        gradients=4 * parameters(spec),
        optimizer=optimizer_bytes(spec, optimizer),
        activations=tokens * activation_bytes_per_token(spec, sequence_length, compute, attention, recompute),
        logits=3 * 4 * min(loss_chunk, tokens) * spec.vocab_size,
    )


def activation_bytes_per_token(
    spec: ModelSpec,
    sequence_length: int,
    compute: Dtype,
    attention: Attention = "eager",
    recompute: Recompute = "none",
) -> int:
    """Bytes that autograd keeps per token for the backward pass when transformers runs the model op by op.

    Those of every layer, or with full recomputation (activation checkpointing of each layer) the float32 inputs of
    all and what one layer keeps while it is run again; and what the head keeps. A compiled model keeps less; results
    that live only inside one operator come on top.
    """
    layers, layer = spec.num_hidden_layers, layer_bytes_per_token(spec, sequence_length, compute, attention)
    last = head_bytes_per_token(spec, compute)
    if recompute == "full":
        return layers * LAYER_INPUT * spec.hidden_size + layer + last
    return layers * layer + last


def layer_bytes_per_token(spec: ModelSpec, sequence_length: int, compute: Dtype, attention: Attention) -> int:
    """What autograd keeps of one layer.

    With d, I, Q, K the hidden, feed-forward, query and key-value sizes, h and k the query and key-value heads,
    T = sequence_length, and c bytes a number of the compute dtype, a layer keeps

        norms         2·(8·d + 4)             float32 input and normalized input, 1/rms
        inputs        2·c·d, or 5·c·d         of q, k, v and of gate, up; bfloat16 autocast casts for each anew
        eager         4·c·Q + 4·h·T           q, output, and k, v repeated for each query head; float32 softmax,
                      (+ c·h·T)               and its cast under autocast
        or sdpa       2·c·(Q + K) + 4·h       q, output, k, v; log-sum-exp
        feed-forward  4·c·I                   gate, up, silu(gate), their product
        head norms    (4 + c)·(Q + K)         where there are some: input and normalized input,
                      + 4·(h + k), or 4·2     1/rms, over each head or over all together

    and a mixture of E experts, u of them used, in the place of the feed-forward part, with one input less to cast,

        router        4·E, or 4·u             softmax, in granitemoe over those chosen alone
                      + 32·u                  their gates and indices, where their tokens are
        experts       u·(4·c·I + 2·c·d + 4·d) as above for each; its input, its output before and after the gate
    """
    hidden, size = spec.hidden_size, SIZE[compute]
    heads, key_value_heads = spec.num_attention_heads, spec.num_key_value_heads
    query, key_value = spec.query_size, spec.key_value_size
    autocast = compute == "bfloat16"
    casts = (4 if spec.num_experts else 5) if autocast else 2
    layer = 2 * _norm(spec) + casts * size * hidden
    if attention == "eager":
        layer += 4 * size * query + (4 + size if autocast else 4) * heads * sequence_length
    else:
        layer += 2 * size * (query + key_value) + 4 * heads
    if spec.normed_heads != "none":
        normed = heads + key_value_heads if spec.normed_heads == "each" else 2
        layer += (4 + size) * (query + key_value) + 4 * normed
    expert = 4 * size * spec.intermediate_size
    if not spec.num_experts:
        return layer + expert
    used = spec.num_experts_per_tok
    weighed = used if spec.family == "granitemoe" else spec.num_experts
    return layer + 4 * weighed + 32 * used + used * (expert + 2 * size * hidden + 4 * hidden)


def head_bytes_per_token(spec: ModelSpec, compute: Dtype) -> int:
    """What autograd keeps of the last norm, and lm_head's input; logits are counted by themselves."""
    return _norm(spec) + SIZE[compute] * spec.hidden_size


def optimizer_bytes(spec: ModelSpec, optimizer: Optimizer) -> int:
    """The optimizer's state: float32 moments, two a parameter for AdamW, one for a matrix that Muon trains."""
    one_moment = sum(_matrix(op) for op in _products(spec) if op.copies == 1) if optimizer == "muon" else 0
    return 4 * (2 * parameters(spec) - one_moment)


def cache_bytes_per_token(spec: ModelSpec, dtype: Dtype) -> int:
    """The key-value cache of one token: keys and values of every layer."""
    return 2 * spec.num_hidden_layers * spec.key_value_size * SIZE[dtype]


def folder_bytes(spec: ModelSpec, dtype: Dtype) -> int:
    """The most that a model folder takes: weights, their headers, tokenizer and small files."""
    beside = SMALL_FILES + _header_bytes(spec)
    return SIZE[dtype] * parameters(spec) + beside + TOKENIZER_BYTES_PER_ENTRY * spec.vocab_size


def checkpoint_bytes(spec: ModelSpec, optimizer: Optimizer) -> int:
    """The most that a resumable checkpoint takes: a float32 model folder and the optimizer's state with headers."""
    headers = 2 * (SMALL_FILES + _header_bytes(spec))
    return folder_bytes(spec, "float32") + optimizer_bytes(spec, optimizer) + headers


def _header_bytes(spec: ModelSpec) -> int:
    return spec.num_hidden_layers * (HEADER_BYTES_PER_LAYER + HEADER_BYTES_PER_EXPERT * spec.num_experts)


def _norm(spec: ModelSpec) -> int:
    """A norm's float32 input and normalized input, and 1/rms, a token."""
    return 8 * spec.hidden_size + 4


def _products(spec: ModelSpec) -> list[Operator]:
    """The layers' operators that multiply by weights."""
    return [op for op in operators(spec, 1) if op.inputs and op.name != "lm_head"]


def _matrix(op: Operator) -> int:
    """Numbers in the weights of all occurrences and copies, biases left out."""
    return op.inputs * op.outputs * op.copies * op.count
