"""ModelSpec: the shape of a causal language model, to and from a Hugging Face config.

Budget prices a spec and model builds it; neither is needed to write one down. Names are the config's own.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from espalier.errors import ModelError

DenseFamily = Literal["granite", "llama", "qwen2", "qwen3", "mistral"]
MixtureFamily = Literal["mixtral", "qwen3_moe", "olmoe", "granitemoe"]
Family = Literal[DenseFamily, MixtureFamily]
DENSE: tuple[str, ...] = get_args(DenseFamily)
MIXTURES: tuple[str, ...] = get_args(MixtureFamily)
FAMILIES = DENSE + MIXTURES

# What a family gives no choice of: whether q, k and v have biases, whether the gates of a mixture sum to 1.
FIXED: dict[str, dict[str, bool]] = {
    "qwen2": {"attention_bias": True},
    "mistral": {"attention_bias": False},
    "mixtral": {"attention_bias": False, "norm_topk_prob": True},
    "granitemoe": {"norm_topk_prob": True},
}
EXPERTS = ("num_experts", "num_experts_per_tok", "norm_topk_prob")  # fields of mixtures alone
# The families whose config has the four multipliers.
MULTIPLIED = ("granite", "granitemoe")
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
# What a family's config calls a field of ours, where it has another name for it.
NAMES: dict[str, dict[str, str]] = {
    "mixtral": {"num_experts": "num_local_experts"},
    "granitemoe": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"intermediate_size": "moe_intermediate_size"},
}
# What transformers takes for the window of attention where a config is silent; other families switch theirs on.
WINDOWED = {"mistral": 4096, "mixtral": None}
# Keys that change what a model computes and that a spec has no field for: the values that leave it as the spec says.
UNSTATED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "clip_qkv": (),
    "mlp_only_layers": ([],),
    "decoder_sparse_step": (1,),
    "num_shared_experts": (0,),
    "n_shared_experts": (0,),
    "shared_intermediate_size": (0,),
    "shared_expert_intermediate_size": (0,),
}


class ModelSpec(BaseModel):
    """The shape of a Llama-like decoder: pre-norm RMSNorm, RoPE, grouped-query attention, gated MLP.

    In a mixture of experts every layer has `num_experts` of these MLPs, of which a router sends each token to
    `num_experts_per_tok`; intermediate_size is that of one of them.

    Sizes left out are derived: heads = hidden_size / head_dim, key-value heads = heads,
    intermediate_size = 8/3 hidden_size rounded up to a multiple of 32. What a family gives no choice of (FIXED)
    follows it.
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
    num_experts: int = Field(default=0, ge=0, description="experts a layer; 0 in a dense model")
    num_experts_per_tok: int = Field(default=0, ge=0, description="experts that a token passes in a layer")
    norm_topk_prob: bool = Field(default=False, description="whether the gates of a token's experts sum to 1")
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
        return sizes | FIXED.get(sizes.get("family", ""), {})

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
        if self.family == "olmoe" and self.hidden_size != self.query_size:
            raise ValueError(
                f"hidden_size {self.hidden_size} isn't num_attention_heads {self.num_attention_heads} times "
                f"head_dim {self.head_dim}, as the olmoe family requires"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        if self.family not in MULTIPLIED:
            odd = [name for name in MULTIPLIERS if not math.isclose(getattr(self, name), self._neutral(name))]
            if odd:
                raise ValueError(
                    f"{', '.join(odd)}: only the {' and '.join(MULTIPLIED)} families have these multipliers"
                )
        self._require_experts()
        return self

    def _require_experts(self) -> None:
        experts, used = self.num_experts, self.num_experts_per_tok
        if self.family in MIXTURES and not 1 <= used <= experts:
            raise ValueError(
                f"num_experts {experts} with num_experts_per_tok {used}: a mixture of the {self.family} family needs "
                "at least one expert, and a token passes one to all of them"
            )
        if self.family in DENSE and (experts or used or self.norm_topk_prob):
            raise ValueError(
                f"num_experts {experts}: the {self.family} family has no experts; {', '.join(MIXTURES)} have"
            )

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
        """Whether queries and keys pass a norm, over each head or over all of them together."""
        return {"qwen3": "each", "qwen3_moe": "each", "olmoe": "all"}.get(self.family, "none")  # type: ignore[return-value]

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies embeddings by because of its width."""
        return 1.0

    def to_config(self) -> dict[str, Any]:
        """The keyword arguments of the family's Hugging Face config, `model_type` among them."""
        unwritten = {"family", "rope_theta", *FIXED.get(self.family, {})}
        if self.family not in MULTIPLIED:
            unwritten |= {*MULTIPLIERS}
        if self.family in DENSE:
            unwritten |= {*EXPERTS}
        names = NAMES.get(self.family, {})
        config = {names.get(name, name): value for name, value in self.model_dump(exclude=unwritten).items()}
        config["model_type"] = self.family
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.family in WINDOWED:
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
        _refuse_unstated(config, family, where)
        # Whatever a family's files call it, transformers writes some families' num_experts as num_local_experts.
        ours = {"num_local_experts": "num_experts"} | {own: name for name, own in NAMES.get(family, {}).items()}
        known = {key: value for key, value in config.items() if key in cls.model_fields and value is not None}
        known |= {name: config[own] for own, name in ours.items() if config.get(own) is not None}
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


def _refuse_unstated(config: dict[str, Any], family: str, where: str) -> None:
    """`ModelError` for a key of the config that makes it another model than a spec can say."""
    refused = [key for key, same in UNSTATED.items() if config.get(key) is not None and config[key] not in same]
    config = {"sliding_window": WINDOWED.get(family), **config}
    if config.get("use_sliding_window", family in WINDOWED) and config["sliding_window"] is not None:
        refused.append("sliding_window")
    if "sliding_attention" in (config.get("layer_types") or ()):
        refused.append("layer_types")
    if refused:
        key = refused[0]
        accepted = UNSTATED.get(key, ("attention to all tokens before",))
        raise ModelError(
            f"{where}: {key}",
            found=f"{key} {config[key]!r}",
            expected=" or ".join(map(str, accepted)) if accepted else "nothing",
            mend="ModelSpec has no field for it: use a verb that takes any model.",
        )


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
