"""Bytes that a ModelSpec needs: in memory while it trains, in the cache while it generates, on the disk when saved.

All results are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from espalier.budget.flops import Operator, is_expert, operators, parameters
from espalier.budget.hardware import Hardware
from espalier.spec import ModelSpec

Dtype = Literal["float32", "bfloat16"]
Optimizer = Literal["adamw", "muon"]
Attention = Literal["eager", "sdpa", "causal_halves"]
Recompute = Literal["none", "layers"]
Accumulate = Literal["pairs", "running"]
Compile = Literal["off", "layers"]
SIZE: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}

LAYER_INPUT = 4  # bytes a number: the residual stream is float32, under autocast too
FRAMEWORK = 450_000_000  # resident in a process that has imported torch and transformers, before there is a model
TOKENIZER_BYTES_PER_ENTRY = 128  # a byte-level BPE entry and its merge in tokenizer.json take less
SMALL_FILES = 65_536  # config, manifest, made.json, headers of what isn't in a layer
HEADER_BYTES_PER_LAYER = 2048  # safetensors describes a tensor in about 120 bytes
HEADER_BYTES_PER_EXPERT = 512  # its gate, up and down, which are stored one by one


@dataclass(frozen=True)
class Memory:
    """What one update holds at the moment when it holds most, in bytes.

    weights      4 a parameter (float32 masters); under bfloat16 autocast 2 more for each cast that is alive
    gradients    4 for each parameter whose gradient is there by then
    optimizer    8 a parameter (AdamW's two moments); 4 for those of the layers' matrices under Muon (one momentum),
                 which leaves experts to AdamW
    activations  what autograd keeps of the layers, see `activation_bytes_per_token`
    working      what lives for a few operators only: logits, gradients on their way down, an update in the making
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum. What FRAMEWORK stands for and allocator slack come on top."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


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
    compile: Compile = "off",
    passes: int = 1,
    accumulate: Accumulate = "running",
) -> Memory:
    """The peak of an update on one device: `passes` forward and backward passes of `rows` x `sequence_length` tokens.

    The loss takes `loss_chunk` tokens at a time and makes the gradients of the head and of its input on the way
    (train/objectives.py). The peak is one of five moments: the loss, the backward pass in the last norm, in the last
    layer or in the first, the update. A mixture's experts are taken to run one after another (transformers'
    `experts_implementation` "eager") and to be used evenly.
    """
    tokens, chunk = rows * sequence_length, min(loss_chunk, rows * sequence_length)
    hidden, embedding = spec.hidden_size, 4 * spec.vocab_size * spec.hidden_size
    autocast = compute == "bfloat16"
    state, masters = optimizer_bytes(spec, optimizer), 4 * parameters(spec)
    casts = SIZE["bfloat16"] * layer_matrices(spec) * autocast
    casts_later = casts if recompute == "none" else casts // spec.num_hidden_layers

    # Of gradients there is one set before a later pass.
    before = masters * ((passes > 1) + sets_held(passes, accumulate))
    kept = tokens * activation_bytes_per_token(spec, sequence_length, compute, attention, recompute, compile)
    layer = tokens * layer_bytes_per_token(spec, sequence_length, compute, attention, compile=compile)
    again = layer - tokens * layer_bytes_per_token(spec, sequence_length, compute, attention, recompute, compile)
    in_norm = tokens * (12 + 2 * autocast) * hidden  # three copies of its gradient
    in_layer = tokens * _most_in_layer(spec, sequence_length, compute, attention, compile) + _experts_gradients(spec)

    head = 4 * tokens * hidden + embedding
    head += head // 2 * autocast  # the casts of the head's weight and input
    logits = spec.vocab_size * loss_bytes(tokens, chunk, compute, compile)
    first_layer = 4 * layer_matrices(spec) // spec.num_hidden_layers
    tied = embedding * (spec.tie_word_embeddings or passes > 1)  # two gradients of one matrix, until they are added
    largest = max(op.inputs * op.outputs for op in _products(spec) if not is_expert(op, spec))
    matrix = 10 * largest if optimizer == "muon" else 0
    moments = [
        Memory(masters + casts, before, state, kept, head + logits),
        Memory(masters + casts_later, max(before, embedding), state, kept, in_norm),
        Memory(masters + casts_later, max(before, embedding), state, kept + again, in_layer),
        Memory(
            masters + casts_later,
            max(before, masters - first_layer),
            state,
            layer,
            tied + tokens * (4 * hidden + _inner_gradients(spec, compute)) + _experts_gradients(spec),
        ),
        Memory(masters, masters, state, 0, matrix),
    ]
    return max(moments, key=lambda moment: moment.total)


def sets_held(passes: int, accumulate: Accumulate) -> int:
    """Sets of gradients that wait for others beside the one that is being added to: in pairs, pairs of pairs and so on
    one for every level.
    """
    return ((passes + 1) // 2).bit_length() - 1 if accumulate == "pairs" else 0


def activation_bytes_per_token(
    spec: ModelSpec,
    sequence_length: int,
    compute: Dtype,
    attention: Attention = "eager",
    recompute: Recompute = "none",
    compile: Compile = "off",
) -> int:
    """Bytes that autograd keeps per token for the backward pass: of all layers, and of the head.

    Where layers are recomputed, eager attention keeps the one mask besides, 4 bytes a token of the row. Results that
    live only inside one operator come on top, and while a layer is run again what it keeps beside its input.
    """
    layer = layer_bytes_per_token(spec, sequence_length, compute, attention, recompute, compile)
    mask = 4 * sequence_length if recompute == "layers" and attention == "eager" else 0
    return spec.num_hidden_layers * layer + mask + head_bytes_per_token(spec, compute)


def layer_bytes_per_token(
    spec: ModelSpec,
    sequence_length: int,
    compute: Dtype,
    attention: Attention,
    recompute: Recompute = "none",
    compile: Compile = "off",
) -> int:
    """What autograd keeps of one layer when transformers runs it op by op.

    With d, I, Q, K the hidden, feed-forward, query and key-value sizes, h and k the query and key-value heads,
    T = sequence_length, and c bytes a number of the compute dtype, a layer keeps

        norms         2·(8·d + 4)             float32 input and normalized input, 1/rms
        inputs        2·c·d, or 5·c·d         of q, k, v and of gate, up; bfloat16 autocast casts for each anew
        eager         4·c·Q + 4·h·T           q, output, and k, v repeated for each query head; float32 softmax,
                      (+ c·h·T)               and its cast under autocast
        or sdpa       2·c·(Q + K) + 4·h       q, output, k, v; log-sum-exp
        or halves     4·c·Q + 3·h·T           as eager, on three quarters of the scores
                      (+ 3/4·c·h·T)
        feed-forward  4·c·I                   gate, up, silu(gate), their product
        head norms    (4 + c)·(Q + K)         where there are some: input and normalized input,
                      + 4·(h + k), or 4·2     1/rms, over each head or over all together

    and a mixture of E experts, u of them used, in the place of the feed-forward part, with one input less to cast,

        router        4·E, or 4·u             softmax, in granitemoe over those chosen alone
                      + 32·u                  their gates and indices, where their tokens are
        experts       u·(4·c·I + 2·c·d + 4·d) as above for each; its input, its output before and after the gate

    or, where layers are recomputed, its input 4·d. The compiler computes normalized inputs and silu(gate) again,
    whatever is asked of it, and casts an input once (measured on dense models alone).
    """
    if recompute == "layers":
        return LAYER_INPUT * spec.hidden_size
    return _layer_parts(spec, sequence_length, compute, attention, compile).total


def head_bytes_per_token(spec: ModelSpec, compute: Dtype) -> int:
    """What autograd keeps of the last norm, and lm_head's input; logits are counted by themselves."""
    return _norm(spec.hidden_size) + SIZE[compute] * spec.hidden_size


@dataclass(frozen=True)
class _Parts:
    """Bytes a token that the two halves of a layer keep."""

    attention: int
    feed_forward: int

    @property
    def total(self) -> int:
        return self.attention + self.feed_forward


def _layer_parts(
    spec: ModelSpec, sequence_length: int, compute: Dtype, attention: Attention, compile: Compile
) -> _Parts:
    size, hidden, heads = SIZE[compute], spec.hidden_size, spec.num_attention_heads
    query, key_value = spec.query_size, spec.key_value_size
    autocast, fused = compute == "bfloat16", compile == "layers"
    norm = 4 * hidden + 4 if fused else _norm(hidden)
    casts = 0 if fused or not autocast else size * hidden  # of one input, for the second and third that read it
    scores = heads * sequence_length * (4 + size * autocast)
    attended = {
        "eager": 4 * size * query + scores,
        "sdpa": 2 * size * (query + key_value) + 4 * heads,
        "causal_halves": 4 * size * query + scores * 3 // 4,
    }[attention]
    if spec.normed_heads != "none":
        normed = heads + spec.num_key_value_heads if spec.normed_heads == "each" else 2
        attended += (4 + size) * (query + key_value) + 4 * normed
    inner = (3 if fused else 4) * size * spec.intermediate_size
    if spec.num_experts:
        used = spec.num_experts_per_tok
        weighed = used if spec.family == "granitemoe" else spec.num_experts
        routed = 4 * weighed + 32 * used + used * (inner + 2 * size * hidden + 4 * hidden)
    else:
        routed = casts + inner
    return _Parts(norm + size * hidden + 2 * casts + attended, norm + size * hidden + routed)


def _norm(hidden: int) -> int:
    """A norm's float32 input and normalized input, and 1/rms, a token."""
    return 8 * hidden + 4


def _most_in_layer(
    spec: ModelSpec, sequence_length: int, compute: Dtype, attention: Attention, compile: Compile
) -> int:
    """Bytes a token by which the backward pass exceeds what was kept, at its highest in the last layer.

    The gradient of the residual stream goes with it all the way. In the feed-forward network there are gradients of two
    of its inner results; in eager attention two of the scores. What lies behind has been let go.
    """
    hidden, size = spec.hidden_size, SIZE[compute]
    behind = _norm(hidden) + size * hidden
    scores = 8 * spec.num_attention_heads * sequence_length
    in_attention = {"eager": scores, "sdpa": 0, "causal_halves": scores // 2}[attention]
    feed_forward = _layer_parts(spec, sequence_length, compute, attention, compile).feed_forward
    return max(
        4 * hidden + _inner_gradients(spec, compute) - behind,
        4 * hidden + in_attention - behind - feed_forward,
    )


def _inner_gradients(spec: ModelSpec, compute: Dtype) -> int:
    """Bytes a token of the gradients of two inner results of the feed-forward network, or of one expert at a time."""
    used = spec.num_experts_per_tok / spec.num_experts if spec.num_experts else 1
    return math.ceil(2 * SIZE[compute] * spec.intermediate_size * used)


def _experts_gradients(spec: ModelSpec) -> int:
    """Bytes of gradients that a mixture's layer holds while its activations are still there.

    Experts are stacked in one tensor, and the gradient of each is as large as that of all, zero elsewhere, until it is
    added to their sum. So there are the sums, and one more of gate and up.
    """
    stacked = {op.name: 4 * _weights(op) // op.count for op in _products(spec) if is_expert(op, spec)}
    return sum(stacked.values()) + stacked.get("gate", 0) + stacked.get("up", 0)


def loss_bytes(tokens: int, chunk: int, compute: Dtype, compile: Compile) -> int:
    """The most bytes, for each id of the vocabulary, that the loss takes: in its first chunk or in the second.

    A token's logits are there in the compute dtype, their log-softmax in float32, and their gradient. Op by op the
    softmax, a mask and its float32 copy are there besides. The gradient of the chunk before is still held.
    """
    size = SIZE[compute]
    each = size + 4 + size if compile == "layers" else size + 4 + 4 + 4 + 4 + 1
    return max(chunk * each, min(chunk, tokens - chunk) * each + chunk * size)


def optimizer_bytes(spec: ModelSpec, optimizer: Optimizer) -> int:
    """The optimizer's state: float32 moments, two a parameter for AdamW, one for a matrix that Muon trains."""
    one_moment = sum(_weights(op) for op in _products(spec) if not is_expert(op, spec)) if optimizer == "muon" else 0
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


def most_that_fit(fits: Callable[[int], bool]) -> int:
    """The largest number for which `fits` holds, 0 if it doesn't for 1. It must hold for all smaller ones as well."""
    most = 1
    while fits(most):
        most *= 2
    least = most // 2
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least


def of_one_device(hardware: Hardware) -> int:
    """Bytes that one process may use: a GPU's memory, or all RAM."""
    return hardware.memory_bytes // (hardware.count if hardware.kind == "cuda" else 1)


def layer_matrices(spec: ModelSpec) -> int:
    """Numbers in the weights of the layers' products, those of all experts among them, biases left out."""
    return sum(_weights(op) for op in _products(spec))


def _header_bytes(spec: ModelSpec) -> int:
    return spec.num_hidden_layers * (HEADER_BYTES_PER_LAYER + HEADER_BYTES_PER_EXPERT * spec.num_experts)


def _products(spec: ModelSpec) -> list[Operator]:
    """The layers' operators that multiply by weights."""
    return [op for op in operators(spec, 1) if op.inputs and op.name != "lm_head"]


def _weights(op: Operator) -> int:
    """Numbers in the weights of all occurrences and copies, biases left out."""
    return op.inputs * op.outputs * op.copies * op.count
