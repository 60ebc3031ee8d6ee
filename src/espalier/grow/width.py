"""Width: builders of growths that add channels, neurons and heads. Depth is never touched here."""

from __future__ import annotations

import math

from espalier.errors import ModelError
from espalier.model.growth import Growth, IndexMap, LayerMap, Role
from espalier.spec import ModelSpec

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

# What may differ besides the sizes: rms_norm_eps is worked out here, the initialiser's scale changes no weight.
FREE = (*SIZES, "logits_scaling", "rms_norm_eps", "initializer_range")


def zero_pad(before: ModelSpec, after: ModelSpec) -> Growth:
    """Widen by new slots that nothing writes to yet. Function-preserving for any sizes.

    Tensors that write to the residual stream are zero in every new element (new channels, and what new neurons and
    heads add), all others random: so gradients reach the writers at once and the rest one step later. The mean
    square over d' channels is d/d' of what it was, hence norm weights times sqrt(d/d'), new ones their mean, and
    rms_norm_eps times d/d' (the one stated in `after` isn't read). Norms over single heads share that eps: what they
    norm is multiplied by sqrt(d/d') too. A changed logits_scaling (muP) goes into the final norm.

    After FLM-101B's growth (arXiv 2309.03852), with zeros in the place of its masks. head_dim can't change: rotary
    frequencies and the attention's scale depend on it.
    """
    _widens(before, after)
    ratio = before.hidden_size / after.hidden_size
    groups = before.num_attention_heads // before.num_key_value_heads
    new_groups = after.num_attention_heads // after.num_key_value_heads
    maps: dict[Role, IndexMap] = {
        "hidden": IndexMap.pad(before.hidden_size, after.hidden_size),
        "ffn": IndexMap.pad(before.intermediate_size, after.intermediate_size),
        "kv_heads": IndexMap.pad(before.num_key_value_heads, after.num_key_value_heads),
        "heads": IndexMap.grouped((before.num_key_value_heads, groups), (after.num_key_value_heads, new_groups)),
    }
    return Growth(
        "zero_pad",
        before,
        after.changed(rms_norm_eps=before.rms_norm_eps * ratio),
        exact=True,
        layers=LayerMap.same(before.num_hidden_layers),
        maps=maps,
        fills={"writes_residual": "zero", "bias": "zero", "scales_residual": "mean"},
        factors={
            "scales_residual": math.sqrt(ratio),
            "feeds_head_norm": math.sqrt(ratio),
            "final_norm": after.logits_scaling / before.logits_scaling,
        },
    )


def _widens(before: ModelSpec, after: ModelSpec) -> None:
    """Refuse what this operator can't do exactly."""
    for key in SIZES:
        old, new = getattr(before, key), getattr(after, key)
        if new < old:
            raise ModelError(
                key,
                found=f"{new} after {old}: a stage that shrinks",
                expected=f"at least {old}",
                mend="Order the stages from small to large.",
            )
    old_each = before.num_attention_heads // before.num_key_value_heads
    new_each = after.num_attention_heads // after.num_key_value_heads
    if new_each < old_each:
        raise ModelError(
            "num_key_value_heads",
            found=f"{new_each} query heads for each after {old_each}",
            expected=f"at least {old_each} for each",
            mend=f"Set num_attention_heads to {old_each * after.num_key_value_heads} or more.",
        )
    for key in ModelSpec.model_fields:
        old, new = getattr(before, key), getattr(after, key)
        if key not in FREE and new != old:
            raise ModelError(
                key,
                found=f"{new!r} after {old!r}",
                expected=f"{old!r}, as before: the function would change",
                mend=f"Keep {key}, or start from a model that has it.",
            )
