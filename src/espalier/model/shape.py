"""Shape of any causal LM over its Hugging Face config, with sizes under the names that most families give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from espalier.errors import ModelError
from espalier.model.growth import Role

# What sizes are called in configs; the first that the config has, and that moves a tensor, counts.
KEYS: dict[Role, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "positions": ("max_position_embeddings",),
    "hidden": ("hidden_size",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "expert_ffn": ("moe_intermediate_size",),
    "shared_ffn": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
}
# The names of ConfigShape's sizes.
NAMES: dict[str, str] = {role: keys[0] for role, keys in KEYS.items()} | {
    "experts": "num_experts",
    "layers": "num_hidden_layers",
    "eps": "rms_norm_eps",
    "scaling": "logits_scaling",
    "init": "initializer_range",
}


@dataclass(frozen=True)
class ConfigShape:
    """The shape of any causal LM, over its Hugging Face config; sizes have the names that most families give them.

    keys            what the config calls the size of each role, and "layers", "eps", "scaling", "init"
    head_dim        channels of a head; `follows_width` where it is hidden_size / num_attention_heads, so that these
                    two can only grow together
    embedding_power the model multiplies embeddings by this power of its width
    """

    config: Mapping[str, Any]
    keys: Mapping[str, str]
    head_dim: int
    follows_width: bool
    norm: Literal["rms", "layer"] = "rms"
    normed_heads: Literal["none", "each", "all"] = "none"
    embedding_power: float = 0.0

    def _size(self, role: str) -> Any:
        return self.config[self.keys[role]]

    @property
    def hidden_size(self) -> int:
        return self._size("hidden")

    @property
    def intermediate_size(self) -> int:
        return self._size("ffn") if "ffn" in self.keys else 0

    @property
    def num_hidden_layers(self) -> int:
        return self._size("layers")

    @property
    def num_attention_heads(self) -> int:
        return self._size("heads")

    @property
    def num_key_value_heads(self) -> int:
        return self._size("kv_heads") if "kv_heads" in self.keys else self.num_attention_heads

    @property
    def rms_norm_eps(self) -> float:
        return self._size("eps") if "eps" in self.keys else 0.0

    @property
    def logits_scaling(self) -> float:
        return self._size("scaling") if "scaling" in self.keys else 1.0

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def embedding_scale(self) -> float:
        return self.hidden_size**self.embedding_power

    @property
    def initializer_range(self) -> float:
        return self._size("init") if "init" in self.keys else 0.02

    def fields(self) -> dict[str, Any]:
        return {NAMES.get(role, role): self.config[key] for role, key in self.keys.items()}

    def to_config(self) -> dict[str, Any]:
        return dict(self.config)

    def changed(self, **sizes: Any) -> Self:
        """This shape with other sizes; a size that the model doesn't have is refused."""
        roles = {name: role for role, name in NAMES.items()}
        values: dict[str, Any] = {}
        derived = {"num_key_value_heads": sizes.get("num_attention_heads", self.num_attention_heads)}
        for name, size in sizes.items():
            if roles.get(name) in self.keys:
                values[self.keys[roles[name]]] = size
            elif size == derived.get(name, getattr(self, name, None)):
                continue  # what it has anyway
            else:
                raise ModelError(
                    name,
                    found=f"{self.config.get('model_type')} has no such size",
                    expected=f"one of {', '.join(sorted(self.fields()))}",
                    mend="State a size that the model has.",
                )
        changed = replace(self, config={**self.config, **values})
        changed._require_fit()
        return changed

    def _require_fit(self) -> None:
        heads, kv_heads, hidden = self.num_attention_heads, self.num_key_value_heads, self.hidden_size
        if self.follows_width and hidden != heads * self.head_dim:
            raise ModelError(
                "hidden_size",
                found=f"{hidden} with {heads} heads of {self.head_dim}",
                expected=f"num_attention_heads * {self.head_dim}: in this family the head size follows from the two",
                mend=f"State num_attention_heads={max(hidden // self.head_dim, 1)} and a hidden_size to match.",
            )
        if heads % kv_heads:
            raise ModelError(
                "num_key_value_heads",
                found=f"{kv_heads} for {heads} query heads",
                expected="a divisor of num_attention_heads",
                mend="Change one of the two.",
            )
