"""Stored: the tensors of a model as its files hold them, which isn't always as they are in memory.

transformers renames the tensors of some families as it loads them, stacks experts that are stored one by one, and
undoes that as it saves. Its own rules for it are applied here to one tensor of the model at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from espalier.folder import ModelFolder
from espalier.model.layout import Layout
from espalier.model.reshape import Read
from espalier.model.shards import Planned, Stored, Weights


@dataclass(frozen=True)
class Source:
    """What a tensor in memory is made of.

    converter  what joins the pieces; without one, the tensor is its only piece
    pieces     (pattern of the converter that it matches, name in the files), in the order in which they are joined
    """

    converter: WeightConverter | None
    pieces: list[tuple[str, str]] = field(default_factory=list)

    def read(self, name: str, read: Read, model: PreTrainedModel) -> Tensor | None:
        """The tensor `name` of `model`; None if the pieces don't make this one and no other."""
        if self.converter is None:
            return read(self.pieces[0][1]) if len(self.pieces) == 1 else None
        converter = copy.deepcopy(self.converter)
        for pattern, piece in self.pieces:
            converter.add_tensor(name, piece, pattern, read(piece))
        made = converter.convert(name, model=model, config=model.config)
        return made[name] if made.keys() == {name} else None


@dataclass(frozen=True)
class Form:
    """How transformers stores a model. The model itself is on the meta device: only names and shapes are asked for."""

    model: PreTrainedModel
    layout: Layout

    @classmethod
    def of(cls, config: dict[str, Any], layout: Layout) -> Form:
        with torch.device("meta"):
            return cls(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)), layout)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What `save_pretrained` writes in place of a tensor, by the names that it gives, for a model that is new."""
        return revert_weight_conversion(self.model, {name: tensor})

    def sources(self, stored: Mapping[str, Planned]) -> dict[str, Source]:
        """What `from_pretrained` makes each tensor of, by its name in memory; {} if that isn't understood."""
        sources = self._sources(stored)
        on_meta = lambda piece: stored[piece].on_meta()  # noqa: E731
        if sources.keys() != self.layout.tensors.keys():
            return {}
        try:
            made = {name: source.read(name, on_meta, self.model) for name, source in sources.items()}
        except (RuntimeError, ValueError):  # pieces that can't be joined: one is missing, or has another shape
            return {}
        fit = all(tensor is not None and tensor.shape == self.layout.sizes(name) for name, tensor in made.items())
        return sources if fit else {}

    def _sources(self, stored: Iterable[str]) -> dict[str, Source]:
        """By the names that transformers gives them; what it ignores is left out."""
        conversions = get_model_conversion_mapping(self.model)
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        in_memory = self.model.state_dict()
        sources: dict[str, Source] = {}
        for piece in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(piece, renamings, converters, self.model.base_model_prefix, in_memory)
            if name not in in_memory and piece in in_memory:
                name, pattern = piece, None
            if name in self.layout.tied or (name not in in_memory and self._ignores(name)):
                continue
            source = sources.setdefault(name, Source(by_pattern[pattern] if pattern else None))
            source.pieces.append((pattern or piece, piece))
        return sources

    def _ignores(self, name: str) -> bool:
        """Whether loading doesn't warn of such a tensor, though the model has none: the causal masks of old GPT-2s."""
        return any(re.search(pattern, name) for pattern in self.model._keys_to_ignore_on_load_unexpected or ())


@dataclass(frozen=True)
class StoredModel:
    """The tensors of a model folder, by the names that they have in memory, each read when it is asked for.

    sources  what each is made of; {} if it isn't understood how transformers loads this folder
    """

    weights: Weights
    form: Form
    sources: Mapping[str, Source]

    @classmethod
    def open(cls, folder: ModelFolder, layout: Layout) -> Self:
        """Read the headers of the folder's weight files, and nothing else."""
        weights, form = Weights.open(folder), Form.of(folder.config, layout)
        return cls(weights, form, form.sources({name: weights.at(name) for name in weights.names}))

    def on_meta(self, name: str) -> Tensor:
        """The tensor's shape and dtype."""
        return self._made(name, lambda piece: self.weights.at(piece).on_meta())

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own. Raises ModelError if a file was cut since `open`."""
        return self._made(name, self.weights.read)

    def pieces(self, name: str) -> list[Stored] | None:
        """What `Form.split` would make of the tensor, where it is in the files as it is; None where it isn't."""
        source, whole = self.sources[name], self.on_meta(name)
        split = self.form.split(name, whole)
        if source.converter is None and next(iter(split.values())) is whole:
            return [self.weights.at(source.pieces[0][1])]
        in_files = {piece for _, piece in source.pieces}
        return [self.weights.at(piece) for piece in split] if split.keys() == in_files else None

    def _made(self, name: str, read: Read) -> Tensor:
        tensor = self.sources[name].read(name, read, self.form.model)
        assert tensor is not None, "the sources were tried on the meta device"
        return tensor


class Pieces:
    """The tensors that `save_pretrained` would write for a model, each made when it is asked for.

    form     how transformers stores the model
    planned  all of them; those of one tensor follow each other, and what is made of it is kept for them
    """

    def __init__(self, form: Form, whole: Iterable[Planned], make: Callable[[str], Tensor | list[Stored]]):
        """`make` gives a tensor of `whole` by its name in memory, or its pieces where files have them."""
        self.form, self._make = form, make
        self._names: dict[str, list[str]] = {}
        self._last: dict[str, Tensor | Stored] = {}
        self.planned: list[Planned] = []
        for tensor in whole:
            pieces = form.split(tensor.name, tensor.on_meta())
            self.planned += [Planned(name, tuple(piece.shape), piece.dtype) for name, piece in pieces.items()]
            self._names[tensor.name] = list(pieces)
        self._whole = {piece: name for name, pieces in self._names.items() for piece in pieces}

    @property
    def can_be_read(self) -> bool:
        """Whether they make the model again."""
        return bool(self.form.sources({piece.name: piece for piece in self.planned}))

    def make(self, piece: str) -> Tensor | Stored:
        """The tensor `piece` of `planned`, or where it is stored."""
        if piece not in self._last:
            self._last = self._split(self._whole[piece])
        return self._last.pop(piece)

    def _split(self, name: str) -> dict[str, Tensor | Stored]:
        made = self._make(name)
        if isinstance(made, Tensor):
            return dict(self.form.split(name, made))
        return dict(zip(self._names[name], made, strict=True))
