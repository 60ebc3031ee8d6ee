"""An OpenAI-compatible server on this machine whose model is a hash, and whose faults are drawn by a seed.

What it should have answered can be computed without it: `Model.score` and `Model.write`. What it has done is counted:
`Stub.answered` by request, `Stub.faults` by kind.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import random
import re
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = [" the", " a", " tree", " grows", " on", " a", " frame", ",", " and", " is", " pruned", ".", "\n"]
# What a busy, broken or malicious server does.
FAULTS = (
    "429",
    "429 and wait",
    "500",
    "503",
    "hang",
    "drip",
    "no json",
    "half a json",
    "another json",
    "lists of two lengths",
    "an error inside",
    "half a body",
    "hang up",
    "no end",
)
Fault = str | None


class Model:
    """Next tokens by a hash of the text before them: nothing is as long as a token that isn't there."""

    name = "hash"

    @staticmethod
    def tokens(text: str) -> list[str]:
        """Words with the space before them, and all else by characters."""
        return re.findall(r" ?\w+|\W", text)

    @staticmethod
    def logprob(before: str, token: str) -> float:
        return -(1 + _number("logprob", before, token) % 1000) / 100

    @staticmethod
    def greedy(before: str, token: str) -> bool:
        return _number("greedy", before, token) % 2 == 0

    def score(self, prompt: str, continuation: str) -> tuple[tuple[str, ...], tuple[float, ...], bool]:
        """Tokens, logprobs and whether all are greedy, of a continuation, whose spaces may be in the prompt."""
        pieces, before, found = self.tokens(prompt + continuation), "", []
        for piece in pieces:
            if len(before + piece) > len(prompt.rstrip()):
                found.append((piece, self.logprob(before, piece), self.greedy(before, piece)))
            before += piece
        tokens, logprobs, greedy = zip(*found, strict=True)
        return tokens, logprobs, all(greedy)

    def write(self, prompt: str, max_tokens: int, stop: tuple[str, ...] = (), sampled: object = 0.0) -> list[str]:
        """Tokens after a prompt, up to the one in which a stop ends."""
        written: list[str] = []
        while len(written) < max_tokens and not any(end in "".join(written) for end in stop):
            written.append(WORDS[_number("next", prompt + "".join(written), str(sampled)) % len(WORDS)])
        return written


class Stub:
    """A server; `url` is where its paths begin.

    faults      share of requests that fail, one of `kinds` each, drawn by `seed`, the request and how often it came
    key         that every request must carry
    models      the list of /models; None for a server without one
    refuses     keys of a request that this server doesn't take
    hides       whether it leaves probabilities out
    mark        a token that it puts before every text
    seconds     that an answer takes
    """

    def __init__(
        self,
        *,
        faults: float = 0.0,
        kinds: tuple[str, ...] = FAULTS,
        seed: int = 0,
        key: str = "",
        models: list[dict[str, Any]] | None = None,
        refuses: tuple[str, ...] = (),
        hides: bool = False,
        mark: str = "",
        seconds: float = 0.0,
        script: Callable[[int], Fault] | None = None,
    ) -> None:
        self.model, self.share, self.kinds, self.seed, self.key = Model(), faults, kinds, seed, key
        self.models, self.refuses, self.hides, self.mark, self.seconds = models, refuses, hides, mark, seconds
        self.script = script
        self.came: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.times: dict[str, list[float]] = defaultdict(list)
        self.at_work = self.most_at_work = 0
        self.lock, self.closing = threading.Lock(), threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Stub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, request: str) -> Fault:
        """What goes wrong with a request this time."""
        with self.lock:
            number = self.came[request]
            self.came[request] += 1
            self.times[request].append(time.monotonic())
        if self.script:
            return self.script(number)
        drawn = random.Random(f"{self.seed} {request} {number}")
        return drawn.choice(self.kinds) if drawn.random() < self.share else None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        with self.lock:
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            yield
        finally:
            with self.lock:
                self.at_work -= 1

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The reply of /completions."""
        prompt, most = body["prompt"], body["max_tokens"]
        stop, sampled = tuple(body.get("stop", ())), body["temperature"] and body["seed"]
        new = self.model.write(prompt, most, stop, sampled)
        old = ([self.mark] if self.mark else []) + self.model.tokens(prompt)
        shown = old + new if body.get("echo") else new
        choice = {
            "index": 0,
            "text": (prompt if body.get("echo") else "") + _cut("".join(new), stop),
            "finish_reason": "length" if len(new) == most else "stop",
        }
        if "logprobs" in body and not self.hides:
            before = "" if body.get("echo") else prompt
            choice["logprobs"] = self._columns(before, shown)
        return {"choices": [choice], "usage": {"prompt_tokens": len(old), "completion_tokens": len(new)}}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """The reply of /chat/completions."""
        [message] = body["messages"]
        most = body.get("max_tokens") or body["max_completion_tokens"]
        asked = {key: body[key] for key in ("temperature", "seed", "stop") if key in body}
        reply = self.complete({**asked, "prompt": message["content"], "max_tokens": most, "logprobs": 1})
        [choice] = reply["choices"]
        told, choice["message"] = choice.pop("logprobs", None), {"role": "assistant", "content": choice.pop("text")}
        if told and "logprobs" in body:
            columns = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
            rows = [(token, value, max(top.values())) for token, value, top in columns]
            content = [{"token": t, "logprob": v, "top_logprobs": [{"token": "?", "logprob": m}]} for t, v, m in rows]
            choice["logprobs"] = {"content": content}
        return reply

    def _columns(self, before: str, tokens: list[str]) -> dict[str, Any]:
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets, place = [], len(before)
        for number, token in enumerate(tokens):
            offsets.append(place)
            place += len(token)
            if (self.mark and number == 0) or not (before or number):
                values.append(None)  # nothing comes before it
                tops.append(None)
            else:
                value = self.model.logprob(before, token)
                values.append(value)
                tops.append({token: value} | ({} if self.model.greedy(before, token) else {"another": value / 2}))
            before += "" if self.mark and number == 0 else token
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: object, address: object) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stub: Stub

    def do_GET(self) -> None:
        if self.path != "/v1/models" or self.stub.models is None:
            self._send(404, {"error": {"message": "no such path"}})
        elif self._allowed():
            self._send(200, {"object": "list", "data": self.stub.models})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._allowed():
            return
        body, stub = json.loads(content), self.stub
        refused = sorted(body.keys() & set(stub.refuses))
        if refused:
            self._send(400, {"error": {"message": f"this server doesn't take {refused}"}})
            return
        asked = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        fault = stub.fault(asked)
        reply = {"/v1/completions": stub.complete, "/v1/chat/completions": stub.chat}[self.path](body)
        with stub.working():
            if fault:
                with stub.lock:
                    stub.faults[fault] += 1
                self._fail(fault, json.dumps(reply).encode())
                return
            stub.closing.wait(stub.seconds)
            with stub.lock:
                stub.answered[asked] += 1  # before its client can know
            self._send(200, reply)

    def _allowed(self) -> bool:
        if not self.stub.key or self.headers["Authorization"] == f"Bearer {self.stub.key}":
            return True
        self.close_connection = True
        self._send(401, {"error": {"message": f"{self.headers['Authorization']} isn't a key"}})
        return False

    def _send(self, status: int, value: object, **headers: str) -> None:
        self._write(status, json.dumps(value).encode(), **headers)

    def _write(self, status: int, content: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _fail(self, fault: str, content: bytes) -> None:
        if fault == "429":
            self._send(429, {"error": {"message": "slow down"}})
        elif fault == "429 and wait":
            self._send(429, {"error": {"message": "slow down"}}, Retry_After="0.2")
        elif fault == "429 and a date":
            self._send(429, {}, Retry_After=email.utils.formatdate(time.time() + 2, usegmt=True))
        elif fault == "429 and an hour":
            self._send(429, {}, Retry_After="3600")
        elif fault.isdigit():
            self._write(int(fault), b"Internal Server Error")
        elif fault == "hang":
            self._idle()
        elif fault == "drip":
            self._write(200, b"", length=10_000)
            while not self.stub.closing.wait(0.05):
                self.wfile.write(b" ")
        elif fault == "no json":
            self._write(200, b"<html>Bad Gateway</html>")
        elif fault == "half a json":
            self._write(200, content[: len(content) // 2])
        elif fault == "lists of two lengths":
            value = json.loads(content)
            value["choices"][0]["logprobs"] = {"tokens": ["x"], "token_logprobs": [], "content": 1}
            self._send(200, value)
        elif fault == "another json":
            self._send(200, {"choices": [], "usage": {}})
        elif fault == "an error inside":
            self._send(200, {"error": {"message": "overloaded", "code": 502}})
        elif fault == "half a body":
            self._write(200, content[: len(content) // 2], length=len(content))
            self.close_connection = True
        elif fault == "hang up":
            self.close_connection = True
        elif fault == "no end":
            value = json.loads(content)
            value["choices"][0]["finish_reason"] = "abort"
            self._send(200, value)
        else:
            raise AssertionError(fault)

    def _idle(self) -> None:
        """Say nothing until the client hangs up."""
        self.connection.settimeout(0.05)
        self.close_connection = True
        while not self.stub.closing.is_set():
            with contextlib.suppress(TimeoutError):
                if not self.connection.recv(1, socket.MSG_PEEK):
                    return

    def log_message(self, *message: object) -> None:
        pass


def _number(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()[:6], "big")


def _cut(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
