"""Forward passes of a model: over trees, over stems, over the texts that are being written; and what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from espalier.budget import flops
from espalier.errors import ModelError
from espalier.folder import ModelFolder
from espalier.infer.trees import Group, Tree, Window, chains, plant
from espalier.spec import ModelSpec

# Tokens of a tree at most: its mask grows with their square.
ROW_TOKENS = 2048
# How far two ways of computing the same log-probabilities in fp32 may differ.
SAME = 1e-3


class Stem(DynamicCache):
    """Keys and values that all rows of a pass see; what the pass adds isn't kept."""

    def __init__(self, read: DynamicCache) -> None:
        super().__init__()
        self._kept = [(layer.keys, layer.values) for layer in read.layers]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        old_keys, old_values = self._kept[layer_idx]
        rows = len(keys)
        return (
            torch.cat([old_keys.expand(rows, -1, -1, -1), keys], dim=-2),
            torch.cat([old_values.expand(rows, -1, -1, -1), values], dim=-2),
        )

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one token take in all layers together."""
        return sum(kept[0, :, 0].nbytes for pair in self._kept for kept in pair)

    def growing(self) -> DynamicCache:
        """A cache that begins with what is kept, and keeps what is added."""
        return DynamicCache(self._kept)


@dataclass(frozen=True)
class Scored:
    """What a model says of a window's targets: their log-probabilities, and whether each was the most probable."""

    window: Window
    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    flops: float


class Passes:
    """A model on its device, and what its passes cost."""

    def __init__(self, model: PreTrainedModel, folder: ModelFolder) -> None:
        self.model, self.device = model.eval(), model.device
        self.spec = _spec(folder)
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.vocabulary = model.config.get_text_config().vocab_size
        self.token_bytes = 0
        self.positions = _positions(model)
        self._wanted: Tensor | None = None
        # The head is most of a small model's work: it sees those positions alone that somebody asks about.
        model.get_output_embeddings().register_forward_pre_hook(self._choose)
        window = _attention_window(model)
        self.tree_tokens = window if self._reads_trees() else 0

    @property
    def reads_trees(self) -> bool:
        """Whether the model can be shown a mask of our own: it has attention alone, and none of its quirks."""
        return self.tree_tokens > 0

    def __call__(self, ids: Tensor, wanted: Tensor, **more: Any) -> Tensor:
        """Logits [wanted, vocabulary] of the places `wanted` in the flattened ids [rows, tokens]."""
        return self.output(ids, wanted, **more).logits[0]

    def output(self, ids: Tensor, wanted: Tensor, **more: Any) -> ModelOutput:
        """All that the model says, logits [1, wanted, vocabulary] of the places `wanted` alone."""
        self._wanted = wanted
        return self.model(input_ids=ids, **more)

    def _choose(self, _: torch.nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (hidden[0].flatten(0, 1)[self._wanted][None],)

    def plant(self, windows: Sequence[Window], batch_tokens: int) -> Group:
        """The rows in which windows are best read; those that are longer than the model's trees apart."""
        small = [window for window in windows if len(window.inputs) <= self.tree_tokens]
        group = plant(small, row_tokens=min(batch_tokens, ROW_TOKENS), token_worth=self.token_worth)
        group.groups.append(chains([window for window in windows if len(window.inputs) > self.tree_tokens]))
        return group

    @property
    def token_worth(self) -> float:
        """How many pairs of tokens cost as much attention as one token costs in all other products."""
        if self.spec:
            one, two = (flops.forward_flops(self.spec, length) for length in (1, 2))
            return (2 * one - two) / (two - one)
        config = self.model.config.get_text_config()
        return self.parameters / (2 * config.hidden_size * config.num_hidden_layers)

    def flops(self, tokens: float, seen: float, logits: int) -> float:
        """FLOPs of `tokens` that see `seen` tokens each, and of `logits` rows of logits."""
        if not self.spec:
            return 2.0 * self.parameters * tokens
        head = flops.operators(self.spec, 1)[-1].flops
        body = flops.forward_flops(self.spec, 1) - head
        a_pair = flops.forward_flops(self.spec, 2) - flops.forward_flops(self.spec, 1)
        return tokens * (body + a_pair * (seen - 1)) + logits * head

    def grow(self, stem: Stem | None, length: int, tokens: Sequence[int]) -> Stem:
        """The stem of `length` tokens and these after them."""
        cache = stem.growing() if stem is not None else DynamicCache()
        ids = torch.tensor([tokens], device=self.device)
        positions = torch.arange(length, length + len(tokens), device=self.device)[None]
        mask = None
        if length:
            seen = np.tri(len(tokens), length + len(tokens), length, dtype=bool)
            mask = self.mask(torch.from_numpy(seen)[None])
        self(ids, positions.new_zeros(1), position_ids=positions, attention_mask=mask, past_key_values=cache)
        return Stem(cache)

    def score(self, trees: Sequence[Tree], stem: Stem | None) -> list[Scored]:
        """What the model says of all windows of some trees on one stem, in one pass."""
        length, places = max(map(len, trees)), []
        ids = torch.zeros(len(trees), length, dtype=torch.long)
        for row, tree in enumerate(trees):
            ids[row, : len(tree)] = torch.tensor(tree.tokens)
            places += [row * length + place for _, asked in tree.asked for place in asked]
        more = {} if stem is None and all(tree.chain for tree in trees) else self._seen(trees, length, stem)
        logits = self(ids.to(self.device), torch.tensor(places, device=self.device), use_cache=False, **more)
        targets = torch.tensor([target for tree in trees for window, _ in tree.asked for target in window.targets])
        logprobs, best = likelihoods(logits, targets.to(self.device))
        greedy = best == targets.to(self.device)
        return self._scored(trees, length, logprobs.tolist(), greedy.tolist())

    def _seen(self, trees: Sequence[Tree], length: int, stem: Stem | None) -> dict[str, Any]:
        """The mask, the positions and the stem of a pass over trees."""
        before = trees[0].stem
        positions = torch.zeros(len(trees), length, dtype=torch.long)
        seen = torch.zeros(len(trees), length, before + length, dtype=torch.bool)
        seen[:, :, :before] = True
        for row, tree in enumerate(trees):
            positions[row, : len(tree)] = torch.tensor(tree.positions)
            seen[row, : len(tree), before : before + len(tree)] = torch.from_numpy(tree.seen)
        told = {"position_ids": positions.to(self.device), "attention_mask": self.mask(seen)}
        return told | ({"past_key_values": stem} if stem is not None else {})

    def mask(self, seen: Tensor) -> Tensor:
        """What attention adds to its scores [rows, 1, queries, keys]: nothing where a key is seen."""
        dtype = self.model.dtype
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return mask[:, None].to(self.device)

    def _scored(self, trees: Sequence[Tree], length: int, logprobs: list[float], greedy: list[bool]) -> list[Scored]:
        found, begin = [], 0
        for tree in trees:
            share = self.tree_flops(tree, length) / len(tree.asked)
            for window, places in tree.asked:
                end = begin + len(places)
                found.append(Scored(window, tuple(logprobs[begin:end]), tuple(greedy[begin:end]), share))
                begin = end
        return found

    def tree_flops(self, tree: Tree, length: int) -> float:
        """FLOPs of a tree in a row of `length` tokens."""
        return self.flops(length, tree.stem + length, tree.logits)

    @torch.inference_mode()
    def _reads_trees(self) -> bool:
        """Whether a little tree on a stem has the log-probabilities that its texts have one by one."""
        draw = np.random.default_rng(0).integers(self.vocabulary, size=20).tolist()
        texts = [(*draw[:12], *draw[12:14]), (*draw[:12], *draw[14:20])]
        found = [Window(text[:-1], text[9:], owner) for owner, text in enumerate(texts)]
        alone = [score for tree in chains(found).trees for score in self.score([tree], None)]
        try:
            stem = self.grow(self.grow(None, 0, draw[:3]), 3, draw[3:6])
            tree = Tree.of(sorted(found, key=lambda window: window.inputs), 6)
            together = self.score([tree], stem)
            self.token_bytes = stem.token_bytes
            every = torch.arange(20, device=self.device)
            largest = float(self(torch.tensor([draw], device=self.device), every, use_cache=False).abs().max())
        except Exception:  # whatever a model says that has no use for such a mask or cache
            return False
        one, other = ([value for score in scores for value in score.logprobs] for scores in (alone, together))
        rounding = 4 * torch.finfo(self.model.dtype).eps * largest
        return bool(np.allclose(one, other, rtol=0, atol=max(SAME, rounding)))


def likelihoods(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [n] of the targets [n] by logits [n, vocabulary], in fp32, and the most probable tokens [n]."""
    chosen = logits.gather(1, targets[:, None])[:, 0].float()
    normalizers = [torch.logsumexp(part.float(), dim=-1) for part in logits.split(64)]
    return chosen - torch.cat(normalizers), logits.argmax(-1)


def _positions(model: PreTrainedModel) -> int:
    """Most tokens that a model reads at once, as lm-eval takes it from the config: 2048 where nothing is said."""
    config = model.config.get_text_config()
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    return next((value for name in names if (value := getattr(config, name, None))), 2048)


def _attention_window(model: PreTrainedModel) -> int:
    """How many tokens a token sees where a model's layers see a window only; else more than any text has.

    Where positions are told otherwise in passes that are longer, those that are not.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        windows.append(rope.get("original_max_position_embeddings"))
    return min((window for window in windows if window), default=2**31)


def _spec(folder: ModelFolder) -> ModelSpec | None:
    """The shape of a model of our families, whose FLOPs are known exactly."""
    try:
        return folder.spec
    except ModelError:
        return None
