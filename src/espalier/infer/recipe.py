"""Whom to ask, as a recipe says it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from espalier.recipe import ByField, Flagged, Recipe, Safe


class LocalRecipe(Recipe):
    """How a model folder answers in this process."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: that of the weights")
    batch_tokens: Flagged[int | None] = Field(
        default=None, gt=0, description="most tokens of one pass; 1024 on the CPU and 16384 on a GPU if not stated"
    )
    cache_gb: Flagged[float] = Field(default=1.0, gt=0, description="most GB of keys and values of texts being written")
    threads: Flagged[int | None] = Field(
        default=None, gt=0, description="of the CPU; those that are free if not stated"
    )


class RemoteRecipe(Recipe):
    """How a model behind a URL is asked, and what its tokens cost."""

    api: Literal["completions", "chat"] = Field(
        default="completions", description="completions can score too; chat puts the server's template around a prompt"
    )
    key_variable: Safe[str] = Field(default="OPENAI_API_KEY", description="environment variable with the server's key")
    concurrency: Safe[int] = Field(default=8, gt=0, description="requests at a time")
    deadline_seconds: Flagged[float] = Field(default=300.0, gt=0, description="of one answer, its retries included")
    timeout_seconds: Flagged[float] = Field(
        default=100.0, gt=0, description="of one try, to the last byte of its reply"
    )
    cache: Literal["use", "refresh", "off"] = Field(
        default="use", description="what was answered before isn't asked again; refresh: asked and kept; off: not kept"
    )
    tokenizer: Path | None = Field(default=None, description="folder of the model's own, which counts its tokens")
    usd_per_million_prompt_tokens: float = Field(default=0.0, ge=0)
    usd_per_million_completion_tokens: float = Field(default=0.0, ge=0)


class EngineRecipe(Recipe):
    """A model folder, or a model's name at an OpenAI-compatible URL such as http://localhost:8000/v1."""

    model: str = Field(min_length=1)
    url: str = ""
    local: ByField[LocalRecipe] = LocalRecipe()
    remote: ByField[RemoteRecipe] = RemoteRecipe()
