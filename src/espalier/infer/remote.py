"""A model behind an OpenAI-compatible URL: vLLM, llama.cpp, transformers serve, a hosted one.

Servers fail: they are busy, hang, drip, or talk nonsense. A request is tried until it is answered or its deadline has
passed; what was answered is on the disk at once and never asked again, so a run that was stopped goes on for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import email.utils
import functools
import json
import math
import os
import random
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2
from pydantic import ValidationError

from espalier import files, units
from espalier.errors import BudgetError, DataError, RecipeError, RunError, UserError
from espalier.infer import wire
from espalier.infer.background import Background
from espalier.infer.cache import Cache
from espalier.infer.engine import Answer, Generate, Request, Score, require_unicode
from espalier.infer.recipe import EngineRecipe
from espalier.ledger import Cost, Entry
from espalier.run import Run
from espalier.template import Template
from espalier.untrusted import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Seconds: the longest first wait before a retry, which doubles up to the longest of all; how long /models may take.
FIRST_WAIT, LONGEST_WAIT, GREETING = 0.5, 8.0, 10.0
# Tokens that a server's template may put around a prompt.
TEMPLATE = 64
# Part of every key: to be raised when the same reply becomes another answer.
VERSION = 2
# What may go better the next time; 500 and above may too.
AGAIN = (408, 409, 425, 429)
# What may be taken if it is put differently.
DIFFERENTLY = (400, 422)


class _Again(Exception):
    """A try that failed and may be repeated, after so many seconds at least; what it was billed, where that is told."""

    def __init__(self, what: str, wait: float = 0.0, usd: float = 0.0) -> None:
        super().__init__(what)
        self.what, self.wait, self.usd = what, wait, usd


@dataclass
class _Purse:
    """What may be spent, what was, and what of it was for answers that nobody has taken yet."""

    room: float
    spent: float = 0.0
    untaken: dict[str, float] = field(default_factory=dict)


class Remote:
    """An `Engine` that asks a server.

    A server's time isn't this machine's: an answer's cost is money, by the tokens that the server counts. What it may
    bill for a try that failed is unknown here. A cached answer costs nothing.
    """

    def __init__(self, recipe: EngineRecipe, run: Run) -> None:
        self.url, self.model, self.recipe, self.run = _checked(recipe.url), recipe.model, recipe.remote, run
        self.identity = f"{self.url} {self.model}"
        self.context: int | None = None
        self.exact = self.recipe.tokenizer is not None
        self._key = _secret(self.recipe.key_variable)
        self._accepted: dict[type[Request], int] = {}
        self._asked = self._known = 0
        self._tokenizer, self._end_of_text, self._tokenizer_digest = _loaded(self.recipe.tokenizer)
        self._cache = Cache(files.home(), self.recipe.cache)
        self._background = Background()
        # Times are kept by _ask, whatever the server does.
        self._client = httpx2.AsyncClient(
            auth=self._authorized,
            timeout=None,
            limits=httpx2.Limits(max_connections=self.recipe.concurrency),
            headers={"Content-Type": "application/json"},
        )

    @classmethod
    def open(cls, recipe: EngineRecipe, run: Run) -> Remote:
        """Ask the server which models it has, if it tells.

        Raises RecipeError for a URL, a key or a model's name that can't be right, RunError where nobody answers.
        """
        engine = cls(recipe, run)
        try:
            engine._background.run(engine._greet())
        except BaseException:
            engine.close()
            raise
        return engine

    def answers(self, requests: Sequence[Request]) -> Generator[tuple[int, Answer], None, None]:
        """(index of the request, answer) as they come; those that were answered before come first.

        Equal requests are sent once, and the first of them bears the cost. Money is spent up to the run's cap, what
        the ledger doesn't hold yet included: `BudgetError` when the next request might cost more than is left, and
        `RunError` when one's deadline has passed, after all answers that came. Closing the iterator cancels what is
        in flight; what was paid for and not taken goes into the ledger.
        """
        self._require_answerable(requests)
        places: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            places[self._digest(request)].append(number)
        unknown: dict[str, Request] = {}
        for key, numbers in places.items():
            if answer := self._cache.find(key):
                self._known += 1
                yield from ((number, answer) for number in numbers)
            else:
                unknown[key] = requests[numbers[0]]
        self._asked += len(unknown)
        purse = _Purse(self.run.ledger.cap.usd - self.run.ledger.total.usd)
        try:
            with contextlib.closing(self._background.iterate(self._stream(unknown, purse))) as stream:
                for key, answer in stream:
                    del purse.untaken[key]
                    for number in places[key]:
                        yield number, answer
                        answer = replace(answer, cost=Cost())
        finally:
            if untaken := sum(purse.untaken.values()):
                self.run.ledger.add(Entry("untaken", Cost(usd=untaken)))

    def count(self, text: str) -> int:
        """How many tokens a text has: exactly by `remote.tokenizer`, else a quarter of its bytes."""
        return (
            len(self._tokenizer.encode(require_unicode(text)).ids) if self._tokenizer else math.ceil(_bytes(text) / 4)
        )

    def estimate(self, requests: Sequence[Request]) -> Cost:
        """The money that it costs at most, by `count`: nothing for what is known. No seconds: they are the server's."""
        unknown = {self._digest(request): request for request in requests}
        asked = (request for key, request in unknown.items() if not self._cache.find(key))
        return Cost(usd=sum(self._usd(self.count(_text(request)), _written(request)) for request in asked))

    def chat(self, messages: Sequence[dict[str, str]]) -> str:
        """A conversation as one prompt.

        By the template of `remote.tokenizer` for api: completions. For api: chat, where the server puts its template
        around one user message: what system and user say, an empty line between; RecipeError for more turns.
        """
        if self.recipe.api == "chat":
            if [message["role"] for message in messages] not in (["user"], ["system", "user"]):
                raise RecipeError(
                    "remote.api",
                    found="chat, and a conversation of several turns",
                    expected="a system message and a user's at most",
                    mend="Set remote.api=completions and remote.tokenizer=FOLDER, whose template writes it.",
                )
            return "\n\n".join(message["content"] for message in messages)
        writer = self._writer
        if writer is None:
            raise RecipeError(
                "remote.tokenizer",
                found=f"{self.recipe.tokenizer or 'none'}, and a conversation to be written",
                expected="the folder of the model's tokenizer, with its chat template",
                mend="Set remote.tokenizer=FOLDER, or remote.api=chat.",
            )
        try:
            text = writer.write(list(messages), prompt=True)
        except (ValueError, TypeError) as error:
            raise DataError(
                "messages",
                found=f"what the model's template refuses ({error})",
                expected="turns that it knows, in an order that it allows",
                mend="Many templates want user and assistant in turn, and some no system message.",
            ) from None
        tokenizer = writer.tokenizer
        marked = tokenizer("").input_ids == [tokenizer.bos_token_id]  # by the server, of every text
        return text.removeprefix(tokenizer.bos_token) if marked else text

    @functools.cached_property
    def _writer(self) -> Template | None:
        return _template(self.recipe.tokenizer)

    def close(self) -> None:
        """End what is in flight, and say how much was known before. Once is enough, twice does no harm."""
        if self._background.closed:
            return
        self._background.close(self._client.aclose())
        self._cache.close()
        if writer := vars(self).get("_writer"):
            writer.close()
        if self._known:
            self.run.tell(
                f"{self._known:,} of {self._known + self._asked:,} answers of {self.model} were known from before and"
                " cost nothing; remote.cache=refresh asks again."
            )

    async def _stream(self, requests: Mapping[str, Request], purse: _Purse) -> AsyncGenerator[tuple[str, Answer], None]:
        """(key, answer) as they come, as many at a time as the recipe says and the money allows."""
        waiting = deque(requests.items())
        running: dict[asyncio.Task[Answer], tuple[str, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.recipe.concurrency:
                    key, request = waiting[0]
                    most = self._most(request)
                    if purse.spent + sum(usd for _, usd in running.values()) + most > purse.room:
                        break
                    waiting.popleft()
                    running[asyncio.create_task(self._ask(key, request, purse))] = key, most
                if not running:
                    raise self._poor(purse, self._most(waiting[0][1]), len(waiting))
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                # An error ends the stream: what was answered goes first.
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    answer = task.result()
                    yield running.pop(task)[0], answer
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _ask(self, key: str, request: Request, purse: _Purse) -> Answer:
        """Try until it is answered; RunError when the deadline has passed, or would while waiting to try again."""
        clock, failures, chance, usd = asyncio.get_running_loop(), Counter[str](), random.Random(key), 0.0
        deadline = clock.time() + self.recipe.deadline_seconds
        while True:
            try:
                async with asyncio.timeout_at(min(clock.time() + self.recipe.timeout_seconds, deadline)):
                    answer = await self._try(request)
            except _Again as error:
                failure = error
            except TimeoutError:
                failure = _Again("no whole reply in time")
            except httpx2.RequestError as error:
                failure = _Again(f"a broken connection ({type(error).__name__})")
            else:
                purse.spent += answer.cost.usd
                purse.untaken[key] = usd + answer.cost.usd
                self._cache.keep(key, answer)
                return replace(answer, cost=Cost(usd=usd + answer.cost.usd))
            usd += failure.usd
            purse.spent, purse.untaken[key] = purse.spent + failure.usd, usd
            wait = max(failure.wait, _backoff(failures.total(), chance))
            failures[failure.what] += 1
            if clock.time() + wait >= deadline:
                raise self._late(failures, failure.wait)
            await asyncio.sleep(wait)

    async def _try(self, request: Request) -> Answer:
        """Send a request once, in the way that this server has accepted before; at first in all ways in turn."""
        request = self._started(request)
        ways = wire.bodies(request, self.model, self.recipe.api)
        known = self._accepted.get(type(request))
        for way in range(len(ways)) if known is None else [known]:
            # Written in ASCII, so that a text which isn't valid Unicode is the server's to judge.
            content = json.dumps(ways[way])
            response = await self._client.post(self.url + wire.PATHS[self.recipe.api], content=content)
            if response.status_code not in DIFFERENTLY:
                break
        self._require_good(response)
        answer = self._read(response, request)
        self._accepted.setdefault(type(request), way)
        return answer

    def _read(self, response: httpx2.Response, request: Request) -> Answer:
        try:
            reply = wire.REPLIES[self.recipe.api].model_validate_json(response.content)
        except ValidationError as error:
            place, why = error.errors()[0]["loc"], error.errors()[0]["msg"]
            raise _Again(f"a reply that isn't one ({'.'.join(map(str, place))} {why})") from None
        usd = self._usd(reply.usage.prompt_tokens, reply.usage.completion_tokens)
        try:
            if isinstance(request, Generate):
                answer = wire.written(reply, request)
            else:
                assert isinstance(reply, wire.Completion), "chat is refused for scores"
                answer = wire.scored(reply, request, self.count if self._tokenizer else None, self.url)
        except ValueError as error:
            raise _Again(str(error), usd=usd) from None
        return replace(answer, cost=Cost(usd=usd))

    def _require_good(self, response: httpx2.Response) -> None:
        """_Again for what may pass, UserError for what won't."""
        status = response.status_code
        if status == 200:
            return
        said = self._said(response)
        if status in AGAIN or status >= 500:
            raise _Again(f"status {status}" + (f" ({said})" if said else ""), _retry_after(response.headers))
        kind, mend = _REFUSED.get(status, (RunError, "Change what is asked, or ask another server."))
        raise kind(
            self.url,
            found=f"status {status}: {said or 'nothing more'}",
            expected=f"an answer of {self.model}",
            mend=mend.format(key=self.recipe.key_variable),
        )

    def _said(self, response: httpx2.Response) -> str:
        """A server's own words on what is wrong, 200 characters of them, without our key."""
        text = " ".join(_message(response).split())
        return (text.replace(self._key, "[the key]") if self._key else text)[:200]

    def _authorized(self, request: httpx2.Request) -> httpx2.Request:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    async def _greet(self) -> None:
        """Learn the context from /models, and refuse a name that isn't there; servers without the list are fine."""
        try:
            async with asyncio.timeout(GREETING):
                response = await self._client.get(f"{self.url}/models")
        except httpx2.ConnectError as error:
            raise RunError(
                self.url,
                found=f"nobody who answers ({error})",
                expected="an OpenAI-compatible server",
                mend="Start it, or correct url=...",
            ) from None
        except (TimeoutError, httpx2.RequestError):
            return
        if response.status_code in (401, 403):
            self._require_good(response)
        try:
            models = (
                {str(model["id"]): model for model in response.json()["data"]} if response.status_code == 200 else {}
            )
        except (ValueError, KeyError, TypeError):
            return
        if not models:
            return
        if self.model not in models:
            near = difflib.get_close_matches(self.model, models, n=1, cutoff=0.0)
            raise RecipeError(
                "model",
                found=repr(self.model),
                expected=f"one of the {len(models):,} that {self.url}/models lists",
                mend=f"Did you mean {near[0]!r}?",
            )
        context = models[self.model].get("max_model_len")
        self.context = context if isinstance(context, int) else None

    def _require_answerable(self, requests: Sequence[Request]) -> None:
        scores = [request for request in requests if isinstance(request, Score)]
        if any(not request.continuation for request in scores):
            raise DataError(
                "continuation",
                found="no text",
                expected="at least a character to score",
                mend="Leave options without text out.",
            )
        if self.recipe.api == "chat" and scores:
            raise RecipeError(
                "remote.api",
                found="chat",
                expected="completions, since given continuations are to be scored",
                mend="Set remote.api=completions, or have the answers written.",
            )

    def _started(self, request: Request) -> Request:
        """A score without a prompt comes after an end-of-text token, if the tokenizer tells it."""
        if isinstance(request, Score) and not request.prompt:
            return replace(request, prompt=self._end_of_text)
        return request

    def _digest(self, request: Request) -> str:
        """All that an answer depends on, but for what a server has loaded under the model's name."""
        request = self._started(request)
        body = wire.bodies(request, self.model, self.recipe.api)[0]
        # Where a prompt ends isn't in the body of a score.
        return files.digest([VERSION, self.url, self.recipe.api, self._tokenizer_digest, body, request.prompt])

    def _usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt, completion = self.recipe.usd_per_million_prompt_tokens, self.recipe.usd_per_million_completion_tokens
        return (prompt * prompt_tokens + completion * completion_tokens) / 1e6

    def _most(self, request: Request) -> float:
        """The most that a request can cost, a template of usual length included: a token has a byte at least."""
        text = _text(request)
        tokens = self.count(text) if self._tokenizer else _bytes(text)
        return self._usd(tokens + TEMPLATE, _written(request))

    def _poor(self, purse: _Purse, most: float, left: int) -> BudgetError:
        return BudgetError(
            "budget: usd",
            found=f"{units.money(max(purse.room - purse.spent, 0.0))} left",
            expected=f"{units.money(most)}, which the next of {left:,} requests may cost",
            mend="Raise budget.usd; what was answered is kept and costs nothing.",
        )

    def _late(self, failures: Counter[str], wait: float) -> RunError:
        often = "; ".join(f"{number:,} × {what}" for what, number in failures.most_common(5))
        asked = f"; the server asks to wait {units.duration(wait)}" if wait else ""
        return RunError(
            self.url,
            found=often + asked,
            expected=f"an answer within {units.duration(self.recipe.deadline_seconds)}",
            mend="Run it again, which goes on where it was; raise remote.deadline_seconds, or ask less at a time.",
        )


# Statuses that no retry mends: whose fault it is, and what helps.
_REFUSED: dict[int, tuple[type[UserError], str]] = {
    401: (RecipeError, "Put the server's key into the environment variable {key}."),
    403: (RecipeError, "Ask for access, or put another key into the environment variable {key}."),
    404: (RecipeError, "Correct url=... or model=..., or set remote.api to what the server has."),
}


def _checked(url: str) -> str:
    """The URL without a slash at its end; RecipeError for one that paths can't be put after."""
    plain = url.strip().rstrip("/")
    parts = None
    with contextlib.suppress(ValueError, httpx2.InvalidURL):  # of a port that isn't a number, say
        httpx2.URL(plain)
        parts = urlsplit(plain) if urlsplit(plain).port != 0 else None
    if parts and parts.username is not None:
        raise RecipeError(
            "url",
            found="a URL with a name or a password in it",
            expected="one without: recipes are stored",
            mend="Put a key into the environment variable that remote.key_variable names.",
        )
    sound = parts and parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    if not sound or re.search(r"/(completions|models)$", plain):
        raise RecipeError(
            "url",
            found=repr(url),
            expected="where a server's paths begin, such as http://localhost:8000/v1",
            mend="Write it with http:// or https:// and without what comes after /v1.",
        )
    return plain


def _secret(variable: str) -> str:
    """The key that an environment variable holds; "" for none."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(
            f"${variable}",
            found="characters that no key has",
            expected="a key of printable ASCII characters",
            mend="Set it again.",
        )
    return key


def _loaded(folder: Path | None) -> tuple[Tokenizer | None, str, str]:
    """A folder's tokenizer, its end-of-text token and its digest; nothing of each without a folder."""
    if folder is None:
        return None, "", ""
    from espalier.data import tokenizer

    words = tokenizer.load(folder)
    marked = words.encode("").ids  # by the server too, so nothing has to stand before a text
    end = "" if marked else words.id_to_token(tokenizer.eos_id(folder)) or ""
    return words, end, files.sha256(folder / "tokenizer.json")


def _template(folder: Path | None) -> Template | None:
    """The chat template of a folder; None without one."""
    if folder is None:
        return None
    tokenizer = load_tokenizer(folder)
    return Template(tokenizer, folder) if tokenizer.chat_template else None


def _text(request: Request) -> str:
    return request.prompt if isinstance(request, Generate) else request.prompt + request.continuation


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _written(request: Request) -> int:
    """The most tokens that a server writes; one where it only has to score."""
    return request.max_new_tokens if isinstance(request, Generate) else 1


def _backoff(failures: int, chance: random.Random) -> float:
    """Seconds before the next try: anything up to a limit that doubles, so that clients don't come back together."""
    return chance.uniform(0.0, min(FIRST_WAIT * 2.0 ** min(failures, 60), LONGEST_WAIT))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait for, stated as such or as a date; 0 for none."""
    stated = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", stated):
        return float(stated)
    try:
        return max(email.utils.parsedate_to_datetime(stated).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def _message(response: httpx2.Response) -> str:
    """What a server says is wrong, in any of the shapes that servers use; else the body as it is."""
    try:
        said = response.json()
    except ValueError:
        return response.text
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    return said if isinstance(said, str) else json.dumps(said)
