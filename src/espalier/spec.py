"""ModelSpec: the shape of a causal language model, to and from a Hugging Face config.

Budget prices a spec and model builds it; neither is needed to write one down. Names are the config's own.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from espalier.errors import ModelError

Family = Literal["granite", "llama", "qwen2", "qwen3", "mistral"]
FAMILIES: tuple[str, ...] = Family.__args__  # type: ignore[attr-defined]

# Whether q, k and v have biases, in the families that give no choice.
ATTENTION_BIAS = {"qwen2": True, "mistral": False}
# What the four Granite multipliers are called in the config; other families have none.
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


class ModelSpec(BaseModel):
    """The shape of a Llama-like decoder: pre-norm RMSNorm, RoPE, grouped-query attention, gated MLP.

    Sizes left out are derived: heads = hidden_size / head_dim, key-value heads = heads,
    intermediate_size = 8/3 hidden_size rounded up to a multiple of 32. attention_bias follows the family where
    it is no choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family = "granite"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(default=2048, gt=0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_theta: float = Field(default=10_000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    initializer_range: float = Field(default=0.02, gt=0, le=1)
    embedding_multiplier: float = 1.0
    attention_multiplier: float = Field(description="factor on q·k; 1/sqrt(head_dim) outside Granite")
    residual_multiplier: float = 1.0
    logits_scaling: float = Field(default=1.0, description="logits are divided by it")

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        sizes = {key: value for key, value in given.items() if value is not None}
        hidden, heads, head_dim = (sizes.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
        if isinstance(hidden, int) and hidden > 0:
            if head_dim is None and isinstance(heads, int) and heads > 0:
                if hidden % heads:
                    raise ValueError(
                        f"hidden_size {hidden} isn't a multiple of num_attention_heads {heads}; "
                        f"{_near_multiples(hidden, heads)} would be, or state head_dim"
                    )
                sizes["head_dim"] = hidden // heads
            if heads is None and isinstance(head_dim, int) and head_dim > 0:
                if hidden % head_dim:
                    raise ValueError(
                        f"hidden_size {hidden} isn't a multiple of head_dim {head_dim}; "
                        f"{_near_multiples(hidden, head_dim)} would be, or state num_attention_heads"
                    )
                sizes["num_attention_heads"] = hidden // head_dim
            sizes.setdefault("intermediate_size", -(-hidden * 8 // 3 // 32) * 32)
        if "num_attention_heads" in sizes:
            sizes.setdefault("num_key_value_heads", sizes["num_attention_heads"])
        if isinstance(sizes.get("head_dim"), int) and sizes["head_dim"] > 0:
            sizes.setdefault("attention_multiplier", 1 / math.sqrt(sizes["head_dim"]))
        if sizes.get("family") in ATTENTION_BIAS:
            sizes["attention_bias"] = ATTENTION_BIAS[sizes["family"]]
        return sizes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} isn't a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.family == "llama" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} isn't a multiple of num_attention_heads {self.num_attention_heads}, "
                f"as the llama family requires; {_near_multiples(self.hidden_size, self.num_attention_heads)} would be"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        if self.family != "granite":
            odd = [name for name in MULTIPLIERS if not math.isclose(getattr(self, name), self._neutral(name))]
            if odd:
                raise ValueError(f"{', '.join(odd)}: only the granite family has these multipliers")
        return self

    def _neutral(self, multiplier: str) -> float:
        return 1 / math.sqrt(self.head_dim) if multiplier == "attention_multiplier" else 1.0

    @classmethod
    def stated(cls, sizes: dict[str, Any], *, where: str) -> ModelSpec:
        """A spec from sizes that a person wrote; `ModelError` naming `where` when they can't be built."""
        try:
            return cls(**sizes)
        except ValueError as error:
            raise ModelError(
                where, found=_first_message(error), expected="sizes that fit together", mend="Change the sizes."
            ) from None

    @property
    def query_size(self) -> int:
        """Width of the queries of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of the keys (or values) of all key-value heads together."""
        return self.num_key_value_heads * self.head_dim

    def require_vocabulary(self, ids: int, *, where: str) -> None:
        """Refuse a tokenizer of `ids` ids for which the embedding has too few rows; too many do no harm."""
        if ids > self.vocab_size:
            raise ModelError(
                where,
                found=f"a tokenizer of {ids} ids and an embedding of {self.vocab_size} rows",
                expected="a row for every id",
                mend=f"Set model.vocab_size={ids}, or use the tokenizer that the model was trained with.",
            )

    def changed(self, **sizes: Any) -> ModelSpec:
        """This spec with some fields replaced, checked again."""
        return ModelSpec.model_validate({**self.model_dump(), **sizes})

    def fields(self) -> dict[str, Any]:
        """All that tells it from other specs, by name."""
        return self.model_dump()

    @property
    def norm(self) -> Literal["rms", "layer"]:
        """What kind of norm the layers have: all families here scale by the root mean square."""
        return "rms"

    @property
    def normed_heads(self) -> Literal["none", "each", "all"]:
        """Whether queries and keys pass a norm, over each head."""
        return "each" if self.family == "qwen3" else "none"

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies embeddings by because of its width."""
        return 1.0

    def to_config(self) -> dict[str, Any]:
        """The keyword arguments of the family's Hugging Face config, `model_type` among them."""
        config = self.model_dump(exclude={"family", "rope_theta", *MULTIPLIERS})
        config["model_type"] = self.family
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.family == "granite":
            config |= {name: getattr(self, name) for name in MULTIPLIERS}
        if self.family in ATTENTION_BIAS:
            del config["attention_bias"]
        if self.family == "mistral":
            config["sliding_window"] = None
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], *, where: str = "config.json") -> ModelSpec:
        """Read a Hugging Face config as a dict; what a spec can't state is refused by name."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ModelError(
                f"{where}: model_type",
                found=repr(family),
                expected=f"one of {', '.join(FAMILIES)}",
                mend="Convert the model to one of these families, or use a verb that takes any model.",
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type") or rope.get("type", "default")
        if rope_type != "default":
            raise ModelError(
                f"{where}: rope_parameters.rope_type",
                found=repr(rope_type),
                expected="'default'",
                mend="Scaled rotary positions aren't in ModelSpec yet.",
            )
        known = {key: value for key, value in config.items() if key in cls.model_fields and value is not None}
        known["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
        try:
            return cls(family=family, **known)
        except ValueError as error:
            raise ModelError(
                where,
                found=_first_message(error),
                expected="the sizes of a model that can be built",
                mend="Correct the config.",
            ) from error


def _near_multiples(size: int, factor: int) -> str:
    below, above = size // factor * factor, -(-size // factor) * factor
    return f"{below} or {above}" if below else str(above)


def _first_message(error: ValueError) -> str:
    details = getattr(error, "errors", None)
    if not details:
        return str(error)
    first = details()[0]
    key = ".".join(map(str, first["loc"]))
    return (f"{key}: " if key else "") + first["msg"].removeprefix("Value error, ")
