"""A model folder that answers in this process, on one GPU or on the CPU.

What is asked about probabilities is read as trees (`trees`), what is to be written is written many texts at a time
(`decode`). Tokens, cuts and windows are lm-eval's: its `hf` backend gives the same numbers.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from espalier import units
from espalier.budget import hardware
from espalier.errors import DataError, ModelError, RecipeError
from espalier.folder import ModelFolder
from espalier.infer.decode import Text, Writer, stem_length
from espalier.infer.engine import Answer, Generate, Request, Score, require_unicode
from espalier.infer.passes import Passes, Scored, Stem
from espalier.infer.recipe import EngineRecipe, LocalRecipe
from espalier.infer.trees import Group, Tree, Window, batches, windows
from espalier.ledger import Cost
from espalier.model import build
from espalier.run import Run
from espalier.template import Template
from espalier.untrusted import load_tokenizer

# Tokens of one pass: a CPU's caches hold the intermediate results of no more, a GPU wants many to be busy.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16_384}
# Logits of one pass at most: 256 MB in fp32.
LOGITS = 2**26
# What estimating may take of each kind of pass.
PROBE_SECONDS = 0.2


class Local:
    """The engine of a model folder."""

    exact = True

    def __init__(
        self, folder: ModelFolder, passes: Passes, tokenizer: PreTrainedTokenizerBase, recipe: LocalRecipe, run: Run
    ) -> None:
        self.folder, self.passes, self.tokenizer, self.run = folder, passes, tokenizer, run
        self._template = Template(tokenizer, folder.path)
        self.identity: str = folder.fingerprint()
        self.context: int | None = passes.positions
        self.batch_tokens = recipe.batch_tokens or BATCH_TOKENS[passes.device.type]
        ends = _ends(passes, tokenizer)
        self.writer = Writer(passes, tokenizer, ends, cache_bytes=recipe.cache_gb * 1e9, batch_tokens=self.batch_tokens)

    @classmethod
    def open(cls, recipe: EngineRecipe, run: Run) -> Local:
        """Load the folder that a recipe names; `ModelError` or `DataError` when it can't answer."""
        folder = ModelFolder.open(recipe.model)
        tokenizer = _tokenizer(folder)
        torch.set_num_threads(recipe.local.threads or hardware.free_cores())
        dtype = recipe.local.dtype
        model = build.load(folder, dtype="auto" if dtype == "auto" else getattr(torch, dtype))
        passes = Passes(model.to("cuda" if torch.cuda.is_available() else "cpu"), folder)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = max(set(tokenizer.get_vocab().values()) - special) + 1
        if ids > passes.vocabulary:
            raise ModelError(
                recipe.model,
                found=f"a tokenizer of {ids} ids and an embedding of {passes.vocabulary} rows",
                expected="a row for every id",
                mend="Use the tokenizer that the model was trained with.",
            )
        return cls(folder, passes, tokenizer, recipe.local, run)

    def answers(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, None]:
        """(index of the request, answer): first the scores, then what is written, as it is done."""
        texts = self._texts(requests)
        slots, length = self.writer.slots(texts) if texts else (0, 0)  # what can't be written is refused before scoring
        yield from self._scores(requests)
        if texts:
            held = units.si(slots * length * self.passes.token_bytes, "B")
            self.run.tell(f"{len(texts):,} texts to write, {slots} at a time, {held} of keys and values.")
            yield from self.writer.write(texts)

    def count(self, text: str) -> int:
        return len(self._encode([text])[text])

    @torch.inference_mode()
    def estimate(self, requests: Sequence[Request]) -> Cost:
        """FLOPs of the very passes that would be made, and what they take by how long a few of them take."""
        reading = sum(self._group_flops(group) for group in self._plant(self._windows(requests)))
        texts = self._texts(requests)
        known = stem_length(texts) if texts else 0
        reading += self.passes.flops(known, known, 0)
        reading += sum(self.passes.flops(text.prompt - known, text.prompt, 1) for text in texts)
        writing = sum(self.passes.flops(text.left - 1, text.prompt + text.left / 2, text.left - 1) for text in texts)
        seconds = reading * self._seconds_per_flop() if reading else 0.0
        if texts:
            slots, length = self.writer.slots(texts)
            seconds += sum(text.left for text in texts) / slots * self._step_seconds(slots, length)
        return self.run.rates.cost(seconds, flops=reading + writing)

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """`ModelError` for a folder without a template, `DataError` for a conversation that its template refuses."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                str(self.folder.path),
                found="a tokenizer without a chat template",
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                mend="Ask with plain prompts, or use a model that was made for conversations.",
            )
        try:
            return self._template.write(list(messages), prompt=True)
        except (ValueError, TypeError) as error:
            raise DataError(
                "messages",
                found=f"what the model's template refuses ({error})",
                expected="a conversation as the model was trained on",
                mend="Change the roles or their order.",
            ) from None

    def close(self) -> None:
        """Let go of the model; twice does no harm."""
        self._template.close()
        vars(self).pop("passes", None)
        vars(self).pop("writer", None)

    # Scores.

    def _scores(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, None]:
        """Answers to what is asked about probabilities, when all windows of a request are scored."""
        found = list(self._windows(requests))
        missing = Counter(window.owner for window in found)
        done: dict[int, list[Scored]] = defaultdict(list)
        for number, request in enumerate(requests):
            if isinstance(request, Score) and number not in missing:
                yield number, _scored(request, [])
        for scored in self._grown(self._plant(found), None):
            owner = scored.window.owner
            done[owner].append(scored)
            if len(done[owner]) == missing[owner]:
                request = requests[owner]
                assert isinstance(request, Score)
                yield owner, _scored(request, sorted(done.pop(owner), key=lambda one: one.window.part))

    def _windows(self, requests: Sequence[Request]) -> Iterator[Window]:
        """What has to be read for each score."""
        scores = {number: _split(request) for number, request in enumerate(requests) if isinstance(request, Score)}
        prompted = self._encode([text for p, c in scores.values() if p for text in (p, p + c)])
        bare = self._encode([c for p, c in scores.values() if not p], special=False)
        for number, (prompt, continuation) in scores.items():
            if prompt:
                context, whole = prompted[prompt], prompted[prompt + continuation]
                # A continuation that melts into the prompt's last token leaves the last token to be asked about.
                pair = (context, whole[len(context) :]) if len(whole) > len(context) else (whole[:-1], whole[-1:])
            else:
                pair = ([self._prefix], bare[continuation])
                if pair[1][:1] == pair[0]:
                    pair = (pair[1][:1], pair[1][1:])
            if continuation:
                yield from windows(pair[0] or [self._prefix], pair[1], self.passes.positions, number)

    def _plant(self, found: Iterator[Window] | Sequence[Window]) -> Group:
        return self.passes.plant(list(found), self.batch_tokens)

    def _batches(self, group: Group) -> Iterator[list[Tree]]:
        most_asked = LOGITS // self.passes.vocabulary
        return batches(group.trees, most_tokens=self.batch_tokens, most_asked=most_asked)

    @torch.inference_mode()
    def _grown(self, group: Group, below: Stem | None) -> Generator[Scored, None, None]:
        """All windows of a group and of those that grow on it; the first bears the cost of the stem."""
        stem, spent = below, 0.0
        if group.stem:
            stem = self.passes.grow(below, group.known, group.stem[group.known :])
            spent = self._stem_flops(group)
        for batch in self._batches(group):
            for scored in self.passes.score(batch, stem):
                yield replace(scored, flops=scored.flops + spent)
                spent = 0.0
        for above in group.groups:
            for scored in self._grown(above, stem):
                yield replace(scored, flops=scored.flops + spent)
                spent = 0.0

    def _stem_flops(self, group: Group) -> float:
        return self.passes.flops(len(group.stem) - group.known, len(group.stem), 0)

    def _group_flops(self, group: Group) -> float:
        rows = ((tree, len(batch[0])) for batch in self._batches(group) for tree in batch)
        return self._stem_flops(group) + sum(self.passes.tree_flops(*row) for row in rows)

    # Texts.

    def _texts(self, requests: Sequence[Request]) -> list[Text]:
        """What is to be written, prompts cut to what leaves room for the answer."""
        asked = {number: request for number, request in enumerate(requests) if isinstance(request, Generate)}
        tokens = self._encode([request.prompt for request in asked.values()])
        texts = []
        for number, request in asked.items():
            room = self.passes.positions - request.max_new_tokens
            if not 0 < room < self.passes.positions:
                raise RecipeError(
                    "max_new_tokens",
                    found=str(request.max_new_tokens),
                    expected=f"1 to {self.passes.positions - 1}, since the model has {self.passes.positions} positions",
                    mend="Ask for fewer tokens." if room < 1 else "Ask for at least one token.",
                )
            texts.append(Text(number, request, (tokens[request.prompt] or [self._prefix])[-room:]))
        return texts

    # Tokens.

    @property
    def _prefix(self) -> int:
        """The token that stands for no prompt."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _encode(self, texts: Sequence[str], *, special: bool = True) -> dict[str, list[int]]:
        """The tokens of each text; what begins with the beginning token's own text doesn't get another one."""
        start = self.tokenizer.decode([self._prefix])
        found: dict[str, list[int]] = {}
        for add in (True, False):
            part = [text for text in dict.fromkeys(texts) if (special and not text.startswith(start)) == add]
            part = list(map(require_unicode, part))
            if part:
                found |= dict(zip(part, self.tokenizer(part, add_special_tokens=add).input_ids, strict=True))
        self._require_rows(found.values())
        return found

    def _require_rows(self, encoded: Iterable[list[int]]) -> None:
        """Refuse a special token that the embedding has no row for, where it is written after all."""
        beyond = max((max(ids, default=0) for ids in encoded), default=0)
        if beyond >= self.passes.vocabulary:
            raise ModelError(
                str(self.folder.path),
                found=f"the token {self.tokenizer.convert_ids_to_tokens(beyond)!r} (id {beyond}) in what is asked",
                expected=f"one of the {self.passes.vocabulary} that the embedding has a row for",
                mend="Leave it out of the prompt or the chat template.",
            )

    # Times.

    def _seconds_per_flop(self) -> float:
        """Of reading, by a pass that takes about as long as a probe may."""
        tokens, seconds = 0, 0.0
        while seconds < PROBE_SECONDS / 4 and tokens < min(self.batch_tokens, self.passes.positions):
            tokens = min(max(4 * tokens, 64), self.batch_tokens, self.passes.positions)
            ids = torch.zeros(1, tokens, dtype=torch.long, device=self.passes.device)
            seconds = self._timed(partial(self.passes, ids, ids[0, :1], use_cache=False))
        return seconds / self.passes.flops(tokens, tokens, 1)

    def _step_seconds(self, slots: int, length: int) -> float:
        """Of one token of all texts that are written at a time, half-way through."""
        step = self.writer.step(slots, length)
        step()
        return self._timed(step)

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds until the device has done some work."""
        begin = time.perf_counter()
        work()
        if self.passes.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _split(request: Score) -> tuple[str, str]:
    """Prompt and continuation; spaces that end the prompt are the continuation's."""
    prompt = request.prompt.rstrip()
    return prompt, request.prompt[len(prompt) :] + request.continuation


def _scored(request: Score, parts: Sequence[Scored]) -> Answer:
    """The answer that the windows of a request make."""
    return Answer(
        text=request.continuation,
        tokens=tuple(token for part in parts for token in part.window.targets),
        logprobs=tuple(value for part in parts for value in part.logprobs),
        greedy=all(best for part in parts for best in part.greedy),
        prompt_tokens=parts[0].window.first + 1 if parts else 0,
        completion_tokens=sum(len(part.window.targets) for part in parts),
        finish="scored",
        cost=Cost(flops=sum(part.flops for part in parts)),
    )


def _ends(passes: Passes, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens after which nothing follows."""
    stated = passes.model.generation_config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    return frozenset(end for end in (*ends, tokenizer.eos_token_id) if end is not None)


def _tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """The folder's own; `DataError` when it can't be read."""
    try:
        tokenizer = load_tokenizer(folder.path)
    except ModelError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise _no_tokenizer(folder, f"none that can be read ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise _no_tokenizer(folder, "none that says where texts end or begin")
    return tokenizer


def _no_tokenizer(folder: ModelFolder, found: str) -> DataError:
    return DataError(
        f"{folder.path}: tokenizer",
        found=found,
        expected="tokenizer.json and tokenizer_config.json with eos_token or bos_token",
        mend="Copy the tokenizer that the model was trained with into the folder.",
    )
