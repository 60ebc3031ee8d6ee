"""What goes over the wire to an OpenAI-compatible server: requests as JSON bodies, its replies as answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from espalier.errors import RunError
from espalier.infer.engine import Answer, Generate, Request, Score

Api = Literal["completions", "chat"]
PATHS: dict[Api, str] = {"completions": "/completions", "chat": "/chat/completions"}
# How a server ends an answer; whatever else it says ("abort", "error", nothing) isn't an answer.
FINISHES: dict[str, Literal["stop", "length"]] = {"stop": "stop", "content_filter": "stop", "length": "length"}


def bodies(request: Request, model: str, api: Api) -> tuple[dict[str, Any], ...]:
    """Ways to put a request, the one that tells most first: servers differ in what they take."""
    if isinstance(request, Score):
        text = request.prompt + request.continuation
        # Not every server can write no token at all.
        return ({"model": model, "prompt": text, "echo": True, "logprobs": 1, "temperature": 0, "max_tokens": 1},)
    seed = request.seed if request.temperature else 0
    body = {"model": model, "temperature": request.temperature, "top_p": request.top_p, "seed": seed}
    if stops := [stop for stop in request.stop if stop]:
        body["stop"] = stops
    length = {"max_tokens": request.max_new_tokens}
    if api == "completions":
        body["prompt"] = request.prompt
        return body | length | {"logprobs": 1}, body | length
    body["messages"] = [{"role": "user", "content": request.prompt}]
    renamed = {"max_completion_tokens": request.max_new_tokens}
    return body | length | {"logprobs": True, "top_logprobs": 1}, body | length, body | renamed


@dataclass(frozen=True)
class Piece:
    """A token as a server tells it: its text, how probable it was, and whether no other one was more probable."""

    text: str
    logprob: float | None
    greedy: bool


class _Strict(BaseModel):
    """Text is text and numbers are numbers, in replies too; what isn't read here may be anything."""

    model_config = {"strict": True}


class _Usage(_Strict):
    prompt_tokens: int = Field(ge=0, lt=2**53)
    completion_tokens: int = Field(ge=0, lt=2**53)


class _Columns(_Strict):
    """Tokens and their probabilities as lists side by side, as /completions has them."""

    tokens: list[str]
    token_logprobs: list[FiniteFloat | None]
    top_logprobs: list[dict[str, FiniteFloat] | None] | None = None

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        if len({len(self.tokens), len(self.token_logprobs), len(self.top_logprobs or self.tokens)}) > 1:
            raise ValueError("tokens and logprobs differ in number")
        return self

    def pieces(self) -> list[Piece]:
        told = zip(self.tokens, self.token_logprobs, self.top_logprobs or [None] * len(self.tokens), strict=True)
        return [Piece(token, logprob, _greedy(logprob, list((top or {}).values()))) for token, logprob, top in told]


class _Top(_Strict):
    logprob: FiniteFloat


class _Row(_Top):
    token: str
    top_logprobs: list[_Top] = []

    def piece(self) -> Piece:
        return Piece(self.token, self.logprob, _greedy(self.logprob, [top.logprob for top in self.top_logprobs]))


class _Rows(_Strict):
    """A list of tokens, as /chat/completions has them, and llama.cpp everywhere."""

    content: list[_Row]

    def pieces(self) -> list[Piece]:
        return [row.piece() for row in self.content]


class _Ended(_Strict):
    finish_reason: str | None = None
    logprobs: _Columns | _Rows | None = None

    def pieces(self) -> list[Piece]:
        """None where the server doesn't tell them."""
        return self.logprobs.pieces() if self.logprobs else []


class _Choice(_Ended):
    text: str


class _Message(_Strict):
    content: str | None


class _ChatChoice(_Ended):
    message: _Message

    @property
    def text(self) -> str:
        return self.message.content or ""


class Completion(_Strict):
    """A reply of /completions."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage


class Chat(_Strict):
    """A reply of /chat/completions."""

    choices: Annotated[list[_ChatChoice], Field(min_length=1)]
    usage: _Usage


REPLIES: dict[Api, type[Completion] | type[Chat]] = {"completions": Completion, "chat": Chat}


def written(reply: Completion | Chat, request: Generate) -> Answer:
    """The answer to a `Generate`; ValueError for a reply that doesn't end as answers do."""
    choice, finish = reply.choices[0], _finish(reply.choices[0])
    text = _sound(_cut(choice.text, request.stop))
    pieces = _standing_for(text, choice.pieces())
    told = bool(pieces) and all(piece.logprob is not None for piece in pieces)
    return Answer(
        text=text,
        tokens=tuple(_sound(piece.text) for piece in pieces),
        logprobs=tuple(piece.logprob for piece in pieces if piece.logprob is not None) if told else (),
        greedy=all(piece.greedy for piece in pieces) if told else request.temperature == 0,
        prompt_tokens=reply.usage.prompt_tokens,
        completion_tokens=reply.usage.completion_tokens,
        finish="stop" if len(text) < len(choice.text) else finish,
    )


def scored(reply: Completion, request: Score, count: Callable[[str], int] | None, where: str) -> Answer:
    """The answer to a `Score`; `count` is of the model's own tokens, the marks around a text included.

    Raises ValueError as `written` does, and RunError where the server doesn't tell the probabilities of what it was
    given.
    """
    choice, whole, prompt = reply.choices[0], request.prompt + request.continuation, request.prompt.rstrip()
    _finish(choice)
    tail = whole[len(prompt) :]
    # What is beyond the prompt was written; all was, where a server doesn't know `echo`.
    echoed = choice.pieces()[: reply.usage.prompt_tokens] if choice.text.startswith(whole) else []
    pieces = _last(echoed, count(whole), count(prompt), where) if count else _ending_with(tail, echoed)
    logprobs = tuple(piece.logprob for piece in pieces if piece.logprob is not None)
    if not pieces or len(logprobs) < len(pieces):
        told = [piece.text for piece in echoed if piece.logprob is not None]
        raise RunError(
            where,
            found=f"a reply of {choice.text[-80:]!r} with the probabilities of {told[-8:]}",
            expected=f"those of the tokens of {tail[-80:]!r}",
            mend=_mend(request, known=count is not None),
        )
    return Answer(
        text=request.continuation,
        tokens=tuple(piece.text for piece in pieces),
        logprobs=logprobs,
        greedy=all(piece.greedy for piece in pieces),
        prompt_tokens=reply.usage.prompt_tokens - len(pieces),
        completion_tokens=len(pieces),
        finish="scored",
    )


def _finish(choice: _Ended) -> Literal["stop", "length"]:
    if choice.finish_reason not in FINISHES:
        raise ValueError(f"an answer that ended with {choice.finish_reason!r}")
    return FINISHES[choice.finish_reason]


def _mend(request: Score, known: bool) -> str:
    if known:
        return "Ask a server that takes echo and logprobs together, as vLLM does."
    if not request.prompt:
        return "A first token has no probability: give a prompt, or remote.tokenizer=FOLDER for an end-of-text token."
    return "Ask a server that takes echo and logprobs together, as vLLM does; remote.tokenizer=FOLDER finds the tokens."


def _ending_with(text: str, pieces: Sequence[Piece]) -> Sequence[Piece]:
    """The last pieces, as few as have `text` in them; none if they say something else.

    Places that servers tell aren't used: some count a mark at the beginning that isn't in the text.
    """
    joined = ""
    for first in reversed(range(len(pieces))):
        joined = pieces[first].text + joined
        if joined.endswith(text):
            return pieces[first:]
    return []


def _last(pieces: Sequence[Piece], whole: int, prompt: int, where: str) -> Sequence[Piece]:
    """As many last pieces as `whole` has more tokens than `prompt`; one where the two have grown together."""
    if pieces and len(pieces) != whole:
        raise RunError(
            where,
            found=f"{len(pieces)} tokens where remote.tokenizer has {whole}",
            expected="the tokenizer of the model that is asked",
            mend="Correct remote.tokenizer, or leave it out.",
        )
    return pieces[min(prompt, whole - 1) :]


def _standing_for(text: str, pieces: list[Piece]) -> list[Piece]:
    """The pieces without those after the text: marks of its end, and what began with a stop."""
    joined = 0
    if not "".join(piece.text for piece in pieces).startswith(text):
        return pieces  # pieces of characters, say, which don't add up to the text
    for number, piece in enumerate(pieces):
        if joined >= len(text):
            return pieces[:number]
        joined += len(piece.text)
    return pieces


def _sound(text: str) -> str:
    """The text with marks in the place of halves of characters, which no file takes."""
    return text.encode("utf-8", "replace").decode()


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop: some servers leave it in."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def _greedy(logprob: float | None, top: Sequence[float]) -> bool:
    """Whether a token was the most probable one; not where a server doesn't tell which that was."""
    return logprob is not None and bool(top) and logprob >= max(top)
