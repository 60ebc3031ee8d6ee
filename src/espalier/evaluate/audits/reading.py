"""A question as a model reads it: the tokens that stand for its options, and what every readout makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedModel

from espalier.errors import DataError
from espalier.evaluate.audits.heads import Attention, Seen, Vectors, look
from espalier.evaluate.questions import LETTERS, Prompt, Question, Span, render

Token = Literal["eol", "content", "label", "mean"]


@dataclass(frozen=True)
class Reader:
    """A model with what must be known to read questions with it.

    template  of the prompt with options
    cloze     of the prompt without them
    token     which token of an option's line stands for the option: the one that ends the line, the last of the text,
              the letter's, or the mean over the text
    vectors   queries and keys after the model's own norm of them, where it has one, or as they were projected
    """

    model: PreTrainedModel
    layers: Sequence[Attention]
    tokenizer: Tokenizer
    template: str
    cloze: str
    token: Token
    vectors: Vectors

    @property
    def kinds(self) -> tuple[str, ...]:
        """What heads can be read by: their attention weights only where the kernel tells them."""
        eager = self.model.config._attn_implementation == "eager"
        return ("qk", "attention") if eager else ("qk",)

    def read(self, question: Question) -> tuple[Seen, list[int], int]:
        """What a pass over the prompt showed, the ids of the letters, and the number of tokens."""
        prompt = render(question, self.template)
        encoding = self._encode(prompt.text)
        share = shares(prompt, encoding, self.tokenizer, self.token)
        seen = look(self.model, self.layers, encoding.ids, torch.from_numpy(share), self.vectors)
        letters = letter_ids(self.tokenizer, prompt.text, len(question.options))
        return seen, letters, len(encoding.ids)

    @torch.inference_mode()
    def option_logprobs(self, question: Question) -> tuple[list[float], int]:
        """Log-probability of each option's text after the question alone, in nats, and the number of tokens."""
        prompt = render(question, self.cloze).text
        found, tokens = [], 0
        for option in question.options:
            encoding = self._encode(f"{prompt} {option.strip()}")
            own = sum(end > len(prompt) for _, end in encoding.offsets)
            ids = torch.tensor([encoding.ids], device=self.model.device)
            logits = self.model(ids, use_cache=False, logits_to_keep=own + 1).logits[0, :-1].float()
            found.append(float(logits.log_softmax(-1).gather(-1, ids[0, -own:, None]).sum()))
            tokens += len(encoding.ids)
        return found, tokens

    def _encode(self, text: str) -> Encoding:
        encoding = self.tokenizer.encode(text)
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most and len(encoding.ids) > most:
            raise DataError(
                _shown(text),
                found=f"a prompt of {len(encoding.ids)} tokens",
                expected=f"at most {most}, the model's context",
                mend="Leave the question out, or shorten it.",
            )
        return encoding


def shares(prompt: Prompt, encoding: Encoding, tokenizer: Tokenizer, token: Token) -> np.ndarray:
    """Which tokens stand for each option, float32 [options, tokens], each row with the sum 1.

    Found by the characters of the whole prompt. `DataError` where a token reaches out of its option's line, or where
    the one that should end the line doesn't end in a newline.
    """
    share = np.zeros((len(prompt.lines), len(encoding.ids)), dtype=np.float32)
    for option, (line, text) in enumerate(zip(prompt.lines, prompt.texts, strict=True)):
        wanted = {
            "eol": (line[1] - 1, line[1]),
            "content": (text[1] - 1, text[1]),
            "label": (line[0], line[0] + 1),
            "mean": text,
        }[token]
        places = [place for place, span in enumerate(encoding.offsets) if span[0] < wanted[1] and wanted[0] < span[1]]
        if token != "mean":
            places = places[-1:]  # one character may be several tokens
        _require_own(prompt, encoding, places, line, LETTERS[option])
        if token == "eol":
            _require_newline(tokenizer.decode([encoding.ids[places[0]]], skip_special_tokens=False), LETTERS[option])
        share[option, places] = 1 / len(places)
    return share


def letter_ids(tokenizer: Tokenizer, prompt: str, count: int) -> list[int]:
    """The tokens with which the letters would go on after a prompt; `DataError` where a letter isn't one token."""
    start = tokenizer.encode(prompt).ids
    for space in (" ", ""):
        longer = [tokenizer.encode(f"{prompt}{space}{letter}").ids for letter in LETTERS[:count]]
        ids = [each[-1] for each in longer]
        if all(each[:-1] == start for each in longer) and len(set(ids)) == count:
            return ids
    raise DataError(
        _shown(prompt),
        found="a tokenizer that doesn't write a letter after it as one token of its own",
        expected="such a token for each option's letter",
        mend="End the template with other characters, such as 'Answer:'.",
    )


def _require_own(prompt: Prompt, encoding: Encoding, places: Sequence[int], line: Span, letter: str) -> None:
    spans = [encoding.offsets[place] for place in places]
    if not spans or any(start < line[0] or end > line[1] for start, end in spans):
        found = [prompt.text[start:end] for start, end in spans]
        raise DataError(
            f"option {letter} in {_shown(prompt.text[line[0] : line[1]])}",
            found=f"tokens that reach into other lines: {found!r}" if found else "no token for it",
            expected="tokens of the option's own line",
            mend="Choose another token=..., or a model whose tokenizer keeps lines apart.",
        )


def _require_newline(decoded: str, letter: str) -> None:
    if not decoded.endswith("\n"):
        raise DataError(
            f"the token at the end of option {letter}'s line",
            found=repr(decoded),
            expected="a token that ends with a newline",
            mend="Choose token=content, or a model whose tokenizer knows newlines.",
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else "..." + text[-57:])
