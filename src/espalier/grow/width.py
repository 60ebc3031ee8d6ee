"""Width: builders of growths that add channels, neurons and heads. Depth is never touched here.

head_dim can't change: rotary frequencies and the attention's scale depend on it.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from espalier.errors import ModelError
from espalier.model.growth import Fill, Growth, IndexMap, LayerMap, Part, Role, Shape, differing

SIZES: dict[str, Role] = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "moe_intermediate_size": "expert_ffn",
    "shared_expert_intermediate_size": "shared_ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
}
# What may differ besides the sizes: rms_norm_eps is worked out here, the initialiser's scale changes no weight.
FREE = (*SIZES, "logits_scaling", "rms_norm_eps", "initializer_range")
# The share of a copy may be so much larger or smaller than an equal one, relatively.
NOISE = 0.5


def zero_pad(before: Shape, after: Shape) -> Growth:
    """Widen by new slots that nothing writes to yet. Function-preserving for any sizes.

    Tensors that write to the residual stream are zero in every new element (new channels, and what new neurons and
    heads add), all others random: so gradients reach the writers at once and the rest one step later. The mean
    square over d' channels is d/d' of what it was, hence norm weights times sqrt(d/d'), new ones their mean, and
    the norms' eps times d/d' (the one stated in `after` isn't read). Norms over heads share that eps: what they norm
    is multiplied by sqrt(d/d') too. Where norms subtract the mean, new channels hold the mean of the old ones
    instead of zero: mean and sum of squares about it stay what they were. A changed logits_scaling (muP) goes into
    the final norm.

    After FLM-101B's growth (arXiv 2309.03852), with zeros in the place of its masks. Not exact when heads are added
    to a model with norms over all heads together.
    """
    sizes = _widths(before, after)
    ratio = before.hidden_size / after.hidden_size
    maps: dict[Role, IndexMap] = {role: IndexMap.pad(*sizes[role]) for role in sizes}
    maps["heads"] = IndexMap.grouped(_groups(before), _groups(after))
    written: Fill = "mean" if before.norm == "layer" else "zero"
    return Growth(
        "zero_pad",
        before,
        after.changed(rms_norm_eps=before.rms_norm_eps * ratio),
        exact=before.normed_heads != "all" or sizes["heads"][0] == sizes["heads"][1],
        layers=LayerMap.same(before.num_hidden_layers),
        maps=maps,
        fills={"writes_residual": written, "scales_residual": "mean", "bias": "zero"},
        factors={
            "scales_residual": math.sqrt(ratio),
            "feeds_norm": math.sqrt(ratio),
            **_corrections(before, after),
        },
    )


def masked(before: Shape, after: Shape) -> Growth:
    """Widen by new slots of ordinary initial values behind masks, which are raised from 0 to 1 over the first updates
    (masked structural growth, MSG, arXiv 2305.02869). Function-preserving for any sizes.

    Multiplying what new slots write by the mask and multiplying the weights that write it is the same: at 0 this is
    `zero_pad`, at 1 the mask is gone. Not for norms that subtract the mean.
    """
    if before.norm == "layer":
        raise ModelError(
            "width: masked",
            found="norms that subtract the mean",
            expected="norms that don't: the mean over masked channels isn't the old one",
            mend="Use zero_pad.",
        )
    padded = zero_pad(before, after)
    return dataclasses.replace(padded, operator="masked", masked=frozenset({"writes_residual"}))


def fpi(before: Shape, after: Shape, noise: float = 0.0, seed: int = 0) -> Growth:
    """Widen by copies of channels, neurons and heads; what reads copies is divided between them (Net2Net,
    arXiv 1511.05641; bert2BERT, arXiv 2110.07143).

    Function-preserving if every channel is copied equally often, so that the mean square over them stays: hidden_size
    a multiple of what it was. Neurons and heads may have any number (heads a multiple under a norm over all of them).
    Key-value heads are copied with their query heads.

    noise  0: copies have equal shares, and equal gradients for ever; else shares are drawn within +- noise of each
           other and still sum to 1, which tells copies apart (LEMON, arXiv 2310.07999)
    """
    sizes = _widths(before, after)
    wrap = lambda pair: [slot % pair[0] for slot in range(pair[1])]  # noqa: E731
    (old_groups, old_each), (groups, each) = _groups(before), _groups(after)
    heads = [(j % old_groups) * old_each + r % old_each for j in range(groups) for r in range(each)]
    sources: dict[Role, list[int]] = {role: heads if role == "heads" else wrap(sizes[role]) for role in sizes}
    return Growth(
        "fpi" if noise == 0 else "fpi_shares",
        before,
        after.changed(rms_norm_eps=before.rms_norm_eps),
        exact=_is_even(sources["hidden"]) and (before.normed_heads != "all" or _is_even(heads)),
        layers=LayerMap.same(before.num_hidden_layers),
        maps={role: IndexMap.copies(source, noise, seed) for role, source in sources.items()},
        factors=_corrections(before, after),
    )


def fpi_shares(before: Shape, after: Shape) -> Growth:
    """`fpi` with unequal shares, so that copies learn different things from the start."""
    return fpi(before, after, NOISE)


def learned(before: Shape, after: Shape) -> Growth:
    """Widen by linear maps that are trained, beginning with copies of unequal shares (LiGO, arXiv 2303.00980). See
    `grow.learned`. Not function-preserving.
    """
    return dataclasses.replace(fpi(before, after, NOISE), operator="learned", exact=False, learned=True)


def aki(before: Shape, after: Shape) -> Growth:
    """Like `fpi`, but the rows of copied channels, neurons and heads are those of the layer above: they differ from
    the start (bert2BERT, arXiv 2110.07143). The last layer has none above it. Not function-preserving, by intent.

    With `interpolate` for the depth, and heads copied inside their groups as here, this is AKI-Pro (AquilaMoE,
    arXiv 2408.06567).
    """
    copies = fpi(before, after)
    layers = before.num_hidden_layers
    above = tuple(min(layer + 1, layers - 1) for layer in range(layers))
    return dataclasses.replace(
        copies, operator="aki", exact=False, layers=dataclasses.replace(copies.layers, donor=above)
    )


def _corrections(before: Shape, after: Shape) -> dict[Part, float]:
    """What makes up for factors that the model itself derives from its width, and for a changed logits_scaling.

    A tied embedding is the read-out too: what was changed in it for the one use is undone in the final norm.
    """
    embeds = before.embedding_scale / after.embedding_scale
    read = 1 / embeds if before.tie_word_embeddings else 1.0
    return {"embeds": embeds, "final_norm": read * after.logits_scaling / before.logits_scaling}


def _is_even(source: list[int]) -> bool:
    """Whether every slot is copied equally often."""
    return len(set(np.bincount(source).tolist())) == 1


def _groups(shape: Shape) -> tuple[int, int]:
    """Key-value heads, and query heads for each."""
    return shape.num_key_value_heads, shape.num_attention_heads // shape.num_key_value_heads


def _widths(before: Shape, after: Shape) -> dict[Role, tuple[int, int]]:
    """Sizes before and after of every role that the model has; refuses what no operator here can do."""
    old_fields, new_fields = before.fields(), after.fields()
    for key in SIZES:
        if key in old_fields and new_fields[key] < old_fields[key]:
            raise ModelError(
                key,
                found=f"{new_fields[key]} after {old_fields[key]}: a stage that shrinks",
                expected=f"at least {old_fields[key]}",
                mend="Order the stages from small to large.",
            )
    (_, old_each), (groups, each) = _groups(before), _groups(after)
    if each < old_each:
        raise ModelError(
            "num_key_value_heads",
            found=f"{each} query heads for each after {old_each}",
            expected=f"at least {old_each} for each",
            mend=f"Set num_attention_heads to {old_each * groups} or more.",
        )
    for key in differing(before, after):
        if key not in FREE:
            raise ModelError(
                key,
                found=f"{new_fields[key]!r} after {old_fields[key]!r}",
                expected=f"{old_fields[key]!r}, as before: the function would change",
                mend=f"Keep {key}, or start from a model that has it.",
            )
    return {role: (old_fields[key], new_fields[key]) for key, role in SIZES.items() if key in old_fields}
