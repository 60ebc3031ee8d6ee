"""Writing: many texts at a time, each in a slot of one cache that is written in place and never grows.

A text that is done leaves its slot to the next one. Where few texts are written, the tokens that each is about to
write are guessed: the pass that writes one token checks the guesses as well, which costs little, since such passes
wait for the weights to arrive. A guess is taken only if it is the very token that would have been written, so answers
are the same as without (Leviathan et al., arXiv 2211.17192; guesses from the text itself: Saxena's prompt lookup).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from espalier import units
from espalier.errors import ResourceError
from espalier.infer.engine import Answer, Generate
from espalier.infer.guess import MOST, Guesses
from espalier.infer.passes import Passes
from espalier.infer.trees import STEM_SAVES, common
from espalier.ledger import Cost

# Texts at a time at most, and tokens of a pass up to which guesses cost little.
SLOTS, ROOM = 64, 16


class Slots(DynamicCache):
    """Keys and values of `slots` texts of at most `length` tokens, [slots, heads, length, size] in each layer."""

    def __init__(self, slots: int, length: int) -> None:
        super().__init__()
        self._size = (slots, length)
        self._kept: list[tuple[Tensor, Tensor]] = []

    def at(self, rows: slice, positions: Tensor, seen: int) -> Slots:
        """For the next pass: where its tokens go, and how many tokens it may look at."""
        self._rows, self._seen = rows, seen
        self._places = (torch.arange(rows.start, rows.stop, device=positions.device)[:, None], positions)
        return self

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if layer_idx == len(self._kept):
            slots, length = self._size
            new = (states.new_zeros(slots, states.shape[1], length, states.shape[3]) for states in (keys, values))
            self._kept.append(tuple(new))  # type: ignore[arg-type]
        rows, places = self._places
        for kept, states in zip(self._kept[layer_idx], (keys, values), strict=True):
            kept[rows, :, places] = states.transpose(1, 2)
        kept_keys, kept_values = self._kept[layer_idx]
        return kept_keys[self._rows, :, : self._seen], kept_values[self._rows, :, : self._seen]

    def share(self, length: int) -> None:
        """Give all slots the first tokens of the first one."""
        for kept in self._tensors():
            kept[1:, :, :length] = kept[:1, :, :length]

    def move(self, source: int, target: int) -> None:
        """Put one slot's text in the place of another's."""
        for kept in self._tensors():
            kept[target] = kept[source]

    def _tensors(self) -> list[Tensor]:
        return [kept for pair in self._kept for kept in pair]


@dataclass
class Text:
    """A request for a text, and what was written of it.

    tokens   the prompt's, cut to what leaves room for the answer, and those that were written
    guesses  while it has a slot
    """

    owner: int
    request: Generate
    tokens: list[int]
    prompt: int = 0
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)
    flops: float = 0.0
    finish: str = ""
    guesses: Guesses | None = None

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        self.stops = [stop for stop in self.request.stop if stop]
        self.random = random.Random(self.request.seed)

    @property
    def left(self) -> int:
        """How many tokens it may still become longer."""
        return self.prompt + self.request.max_new_tokens - len(self.tokens)

    @property
    def longest(self) -> int:
        return self.prompt + self.request.max_new_tokens

    def guess(self, room: int) -> list[int]:
        """What it will go on with, in a pass that has room for so many tokens of it."""
        return self.guesses.next(min(room, self.left) - 1) if self.guesses else []

    def write(self, token: int, logprob: float, greedy: bool) -> None:
        self.tokens.append(token)
        if self.guesses:
            self.guesses.see()
        self.logprobs.append(logprob)
        self.greedy.append(greedy)


class Writer:
    """Writes texts with a model.

    ends          the tokens after which nothing follows
    cache_bytes   most bytes of keys and values of all texts together
    batch_tokens  most tokens of a pass that reads prompts
    """

    def __init__(
        self,
        passes: Passes,
        tokenizer: PreTrainedTokenizerBase,
        ends: frozenset[int],
        *,
        cache_bytes: float,
        batch_tokens: int,
    ) -> None:
        self.passes, self.tokenizer, self.ends = passes, tokenizer, ends
        self.cache_bytes, self.batch_tokens = cache_bytes, batch_tokens

    def slots(self, texts: Sequence[Text]) -> tuple[int, int]:
        """How many texts to write at a time, and how long a slot is; `ResourceError` when not even one fits."""
        length = max(text.longest for text in texts) + MOST
        if not self.passes.reads_trees:
            return 1, length
        fitting = int(self.cache_bytes // (length * self.passes.token_bytes))
        if not fitting:
            raise ResourceError(
                "local.cache_gb",
                found=units.si(self.cache_bytes, "B"),
                expected=f"{units.si(length * self.passes.token_bytes, 'B')} for a text of {length} tokens",
                mend="Raise it, or ask for shorter texts.",
            )
        return min(len(texts), SLOTS, fitting), length

    def step(self, slots: int, length: int) -> Callable[[], object]:
        """A pass as long as one that writes a token of each text, half-way through; for its time alone."""
        if not self.passes.reads_trees:
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.passes.device)
            return lambda: self.passes(ids, ids[0])
        cache, rows = Slots(slots, length), slice(0, slots)
        return lambda: self.read([[0]] * slots, [length // 2] * slots, cache, rows, list(range(slots)))

    @torch.inference_mode()
    def write(self, texts: Sequence[Text]) -> Generator[tuple[int, Answer], None, None]:
        """(owner, answer) of each text when it is done."""
        texts = sorted(texts, key=lambda text: -text.longest)
        fitting = [text for text in texts if text.longest <= self.passes.tree_tokens]
        if fitting:
            yield from self._together(fitting)
        for text in texts[: len(texts) - len(fitting)]:
            self._alone(text)
            yield text.owner, self.answer(text)

    def _together(self, texts: Sequence[Text]) -> Generator[tuple[int, Answer], None, None]:
        """Longest first; a text that waits gets the slot of one that is done."""
        slots, length = self.slots(texts)
        cache, waiting, active = Slots(slots, length), deque(texts), list[Text]()
        stem = self._stem(texts, cache)
        while waiting or active:
            if new := self._next(waiting, slots - len(active), stem):
                rows = slice(len(active), len(active) + len(new))
                self._step(new, [text.tokens[stem:] for text in new], [[] for _ in new], cache, rows)
                active += new
            else:
                guesses = [text.guess(ROOM // len(active)) for text in active]
                tokens = [[text.tokens[-1], *guess] for text, guess in zip(active, guesses, strict=True)]
                self._step(active, tokens, guesses, cache, slice(0, len(active)))
            yield from self._leave(active, cache)

    def _next(self, waiting: deque[Text], free: int, stem: int) -> list[Text]:
        """The texts whose prompts are read next, in one pass."""
        new: list[Text] = []
        longest = 0
        while waiting and len(new) < free:
            longest = max(longest, waiting[0].prompt - stem)
            if new and (len(new) + 1) * longest > self.batch_tokens:
                break
            new.append(waiting.popleft())
            new[-1].guesses = Guesses(new[-1].tokens)
        return new

    def _leave(self, active: list[Text], cache: Slots) -> Iterator[tuple[int, Answer]]:
        """Answers of the texts that are done; the last of the others takes the slot of each."""
        for row in reversed(range(len(active))):
            if active[row].finish:
                done, last = active[row], active.pop()
                if row < len(active):
                    active[row] = last
                    cache.move(len(active), row)
                done.guesses = None
                yield done.owner, self.answer(done)

    def _stem(self, texts: Sequence[Text], cache: Slots) -> int:
        """Read what all prompts begin with once, for all slots; how many tokens that is."""
        if length := stem_length(texts):
            self.read([texts[0].tokens[:length]], [0], cache, slice(0, 1), [0])
            cache.share(length)
            texts[0].flops += self.passes.flops(length, length, 0)
        return length

    def _step(
        self, texts: Sequence[Text], tokens: list[list[int]], guesses: list[list[int]], cache: Slots, rows: slice
    ) -> None:
        """Read some tokens of each text, the last ones guesses, and write as many as come true and one."""
        width = max(map(len, tokens))
        known = [len(read) - len(guess) for read, guess in zip(tokens, guesses, strict=True)]
        starts = [len(text.tokens) - before for text, before in zip(texts, known, strict=True)]
        wanted = [row * width + place for row, read in enumerate(tokens) for place in range(known[row] - 1, len(read))]
        logits = self.read(tokens, starts, cache, rows, wanted)
        for text, read, guess, start in zip(texts, tokens, guesses, starts, strict=True):
            text.flops += self.passes.flops(len(read), start + len(read), 1 + len(guess))
        self._extend(texts, guesses, logits)

    def _extend(self, texts: Sequence[Text], guesses: Sequence[list[int]], logits: Tensor) -> None:
        """Write what logits [guesses of each text and one, together, vocabulary] say."""
        best, normalizers = logits.argmax(-1), torch.logsumexp(logits.float(), dim=-1)
        likely = logits.gather(1, best[:, None])[:, 0].float() - normalizers
        found = list(zip(best.tolist(), likely.tolist(), strict=True))
        begin = 0
        for text, guess in zip(texts, guesses, strict=True):
            end = begin + len(guess) + 1
            self._take(text, guess, found[begin:end], logits[begin:end], normalizers[begin:end])
            begin = end

    def read(self, tokens: list[list[int]], starts: list[int], cache: Slots, rows: slice, wanted: list[int]) -> Tensor:
        """Logits [wanted, vocabulary] of tokens that begin at `starts` of the texts in `rows`."""
        width, device = max(map(len, tokens)), self.passes.device
        ids = torch.tensor([read + [0] * (width - len(read)) for read in tokens], device=device)
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        seen = max(starts) + width
        mask = None  # from their beginnings on, texts need none
        if any(starts):
            mask = self.passes.mask(torch.arange(seen, device=device) <= positions[:, :, None])
        last = min(self.passes.positions, self.passes.tree_tokens) - 1
        return self.passes(
            ids,
            torch.tensor(wanted, device=device),
            position_ids=positions.clamp(max=last),  # padding may lie beyond it
            attention_mask=mask,
            past_key_values=cache.at(rows, positions, seen),
        )

    def _take(
        self, text: Text, guess: list[int], found: list[tuple[int, float]], logits: Tensor, normalizers: Tensor
    ) -> None:
        """Write the tokens that the logits [guesses + 1, vocabulary] say, up to the first that wasn't guessed."""
        for number, (best, likely) in enumerate(found):
            token, logprob = best, likely
            if text.request.temperature > 0:
                token = draw(logits[number], text.request, text.random)
                logprob = float(logits[number, token].float() - normalizers[number])
            text.write(token, logprob, token == best)
            text.finish = self._finish(text)
            if text.finish or number == len(guess) or token != guess[number]:
                break

    def _finish(self, text: Text) -> str:
        """Whether a text has ended, and why."""
        if text.tokens[-1] in self.ends or self._stopped(text):
            return "stop"
        return "length" if text.left == 0 else ""

    def _stopped(self, text: Text) -> bool:
        """Whether a text has a stop in it; only its end is looked at, since the rest was before."""
        if not text.stops:
            return False
        tail = max(len(stop.encode()) for stop in text.stops) + 4
        end = self.tokenizer.decode(text.tokens[max(text.prompt, len(text.tokens) - tail) :])  # a stop may be special
        return any(stop in end for stop in text.stops)

    def _alone(self, text: Text) -> None:
        """Write one text with the model's own cache, whatever that is."""
        cache: dict[str, Any] = {}
        unread = text.tokens
        while not text.finish:
            ids = torch.tensor([unread], device=self.passes.device)
            last = torch.tensor([len(unread) - 1], device=self.passes.device)
            out = self.passes.output(ids, last, use_cache=True, **cache)
            text.flops += self.passes.flops(len(unread), len(text.tokens), 1)
            self._extend([text], [[]], out.logits[0])
            # What keeps its state elsewhere is read anew.
            cache = {name: out[name] for name in ("past_key_values", "cache_params") if out.get(name) is not None}
            unread = text.tokens[-1:] if cache else text.tokens

    def answer(self, text: Text) -> Answer:
        """What came of a text that is done."""
        written = text.tokens[text.prompt :]
        said = self._decode(written)
        cut = min((place for stop in text.stops if (place := said.find(stop)) >= 0), default=len(said))
        return Answer(
            text=said[:cut],
            tokens=tuple(written),
            logprobs=tuple(text.logprobs),
            greedy=all(text.greedy),
            prompt_tokens=text.prompt,
            completion_tokens=len(written),
            finish=text.finish,  # type: ignore[arg-type]
            cost=Cost(flops=text.flops),
        )

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def stem_length(texts: Sequence[Text]) -> int:
    """How many tokens all prompts begin with that are worth a pass of their own; at least one is left to each."""
    shared = min(*(common(texts[0].tokens, text.tokens) for text in texts), *(text.prompt - 1 for text in texts))
    return shared if shared * (len(texts) - 1) >= STEM_SAVES else 0


def draw(logits: Tensor, request: Generate, chance: random.Random) -> int:
    """A token by its probability at the request's temperature, among the most probable that sum to `top_p`."""
    probabilities = torch.softmax(logits.double() / request.temperature, dim=-1)
    if request.top_p < 1:
        ordered, places = probabilities.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        probabilities[places[1:][before[1:] >= request.top_p]] = 0.0
    sums = probabilities.cumsum(-1)
    return int(torch.searchsorted(sums, chance.random() * sums[-1], right=True).clamp(max=len(sums) - 1))
