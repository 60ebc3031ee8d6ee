"""Watch: the ranks of a run look at each other, so that one which dies or hangs is named, and all end.

A thread beside each rank's work posts once in a while where the work is. The leader's thread reads the posts and
answers; the others see by its answers that it lives. Whoever is gone, silent, or further behind than its phase may
last is named by the verdict, which every rank raises, or ends with where its work is stuck. The posts have connections
of their own, since the work may be stuck in a collective of torch's.

How long a phase may last without a sign of progress from any rank:

    arithmetic         the deadline (a minute), or 20 times as long as it ever did before
    that reads         `DISK` at least: posts show that the process lives, and a disk may be silent while its server
                       starts anew; what it took before says nothing, since it was in memory
    first of its kind  `FIRST`: it may be compiled
    beside the steps   `FIRST`, and on top what its bytes take on a slow disk (`moving`)
    preparing data     as long as torch lets one rank wait for another: nobody knows how long it takes
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from espalier import errors, torchrun
from espalier.errors import RankError, ResourceError

if TYPE_CHECKING:
    from espalier.world import World

DEADLINE = 60.0  # seconds
TIMES = 20.0  # a phase may last so many times as long as it ever did before
DISK = 600.0  # seconds in which a network disk whose server failed is back
FIRST = 1800.0  # seconds
SLOW_DISK = 50e6  # bytes a second, of all ranks together
SETTLE = 0.3  # seconds in which signs of one fault reach the leader: the death of a rank breaks connections of others
SOON = 0.05  # seconds between the signs of one fault, from one rank and another
GRACE = 0.7  # seconds in which the work may end by itself
CONNECTING = 20.0  # seconds
LONGEST = 2**20  # bytes of a message

Message = dict[str, Any]
E = TypeVar("E", bound=BaseException)


def at(step: int, phase: str, *, least: float = 0.0) -> None:
    """The work begins `phase` of `step`. Every rank says so at the same places; by itself, a process says it to nobody.

    A phase that lasts longer than the deadline, than `least` seconds and than 20 times the longest before is taken to
    hang; one that is new since the last `anew`, if it lasts longer than `FIRST`.
    """
    if _current:
        _current.at(step, phase, least)


def beside(step: int, phase: str, *, more: float = 0.0) -> None:
    """The work begins something beside the steps, such as a save, whose like may have been much shorter before: it may
    last `FIRST`, and `more` seconds.
    """
    if _current:
        _current.beside(step, phase, more)


def moving(size: float) -> float:
    """Seconds in which so many bytes are written to a slow disk, or read from one."""
    return size / SLOW_DISK


def anew() -> None:
    """What phases have lasted says nothing about what comes: the model grew, say, and is about to be compiled."""
    if _current:
        _current.lasted.clear()


def blamed(error: Exception) -> Exception:
    """What the ranks say of the one at fault, if that has ended the work or `error` is torch's for not reaching another
    rank; else `error`.
    """
    return _current.blamed(error) if _current else error


def last_word(tell: Callable[[Exception], None]) -> None:
    """Have `tell` called with the error, in another thread, before a process is ended whose work is stuck."""
    if _current:
        _current.last_word = tell


def metered(read: Callable[[], float]) -> None:
    """Have a meter of this rank's read with every post."""
    if _current:
        _current.meter = read


def readings() -> float:
    """The sum of what the other ranks' meters showed when they were last heard, a second ago or so; on the leader."""
    return _current.readings() if isinstance(_current, _Leader) else 0.0


@contextlib.contextmanager
def over(world: World, *, deadline: float, patience: float) -> Iterator[None]:
    """Watch the ranks of a connected world, of two or more, while the block lasts.

    deadline  seconds after which a rank without a sign of life is taken to be dead; a stopped one is killed
    patience  seconds that a phase may last that has never been seen before

    An error of torch's by which the block ends because another rank is lost is raised as what the others say of it.
    What they say is raised even if the block ends well.
    """
    global _current
    watch = _met(world, deadline, patience)
    _current = watch
    try:
        yield
    except BaseException as error:
        fault = watch.blamed(error)
        watch.end(fault)
        if fault is not error:
            raise fault from error
        raise
    else:
        watch.end()
        if watch._verdict:
            raise watch._verdict.error()
    finally:
        _current = None


@dataclass(frozen=True)
class Verdict:
    """What ends a run: an error in the words of rank `by`, and the host and pid of who can't end by themselves."""

    told: Message
    by: int
    kill: tuple[tuple[str, int], ...] = ()

    def error(self) -> Exception:
        return errors.from_json(self.told, rank=self.by)


@dataclass
class Seen:
    """What the leader knows of a rank.

    heard    when it last gave a sign of life, by the leader's clock
    moved    when its work was last seen to go on
    failed   its own error
    astray   torch's error for not reaching some other rank
    gone     whether its process ended without a word
    """

    rank: int
    pid: int
    host: str
    post: Message
    line: _Line | None = None
    heard: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    failed: Message | None = None
    astray: str = ""
    gone: bool = False

    @property
    def came(self) -> tuple[int, int]:
        """How far its work came. Ranks make the same collectives in the same order, so the first number would do."""
        return self.post["collectives"], self.post["moves"]

    def take(self, post: Message) -> None:
        before, self.post, self.heard = self.came, post, time.monotonic()
        if self.came != before:
            self.moved = self.heard

    def who(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class _Line:
    """An end of a connection on which JSON goes, a line a message."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self._rest = connection, bytearray()
        connection.settimeout(1.0)

    def send(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # whether the other end lives is seen by what it says
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self) -> list[Message] | None:
        """What has come; None once the other end is closed, or says what isn't JSON, or without an end."""
        try:
            data = self.connection.recv(2**16)
        except OSError:
            data = b""
        if not data:
            return None
        self._rest += data
        if b"\n" not in data:
            return [] if len(self._rest) <= LONGEST else None
        *lines, self._rest = self._rest.split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):
            return None  # no rank writes so

    def say_no_more(self) -> None:
        with contextlib.suppress(OSError):  # the other end may be gone
            self.connection.shutdown(socket.SHUT_WR)

    def hear_out(self, seconds: float) -> None:
        """Read until the other end says no more either: what closes with something unread takes its last words back."""
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(2**16):
                    return


class _Watch:
    """The thread beside the work of one rank."""

    def __init__(self, rank: int, deadline: float, patience: float) -> None:
        self.rank, self.deadline, self.patience = rank, deadline, patience
        self.period = min(1.0, deadline / 10)
        self.lasted: dict[str, float] = {}
        self._work, self._since = threading.get_ident(), time.monotonic()
        self._turn = self._since
        self._first_sign: float | None = None
        self._place: Message = {"step": 0, "phase": "starting", "moves": 0, "limit": min(FIRST, patience)}
        self._verdict: Verdict | None = None
        self._judged, self._left = threading.Event(), threading.Event()
        self._error: Message | None = None
        self._astray = ""
        self.last_word: Callable[[Exception], None] = _nothing
        self.meter: Callable[[], float] | None = None
        self._reading = 0.0
        self._bell, ring = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(ring, selectors.EVENT_READ)
        self._open = [self._bell, ring]
        self._thread = threading.Thread(target=self._watch, name="espalier-watch", daemon=True)

    def at(self, step: int, phase: str, least: float) -> None:
        self._note()
        known = self.lasted.get(phase)
        self._enter(step, phase, FIRST if known is None else max(self.deadline, least, TIMES * known))

    def beside(self, step: int, phase: str, more: float) -> None:
        self._note()
        self._enter(step, phase, FIRST + more)

    def _note(self) -> None:
        """How long the phase lasted that now ends."""
        now, phase = time.monotonic(), self._place["phase"]
        self.lasted[phase] = max(self.lasted.get(phase, 0.0), now - self._since)
        self._since = now

    def _enter(self, step: int, phase: str, limit: float) -> None:
        moves = self._place["moves"] + 1
        self._place = {"step": step, "phase": phase, "moves": moves, "limit": min(limit, self.patience)}

    def blamed(self, error: E) -> E | Exception:
        """What ended the work: the verdict, if there is one, and it is waited for if `error` says no more than that
        another rank can't be reached; else `error`.
        """
        if not isinstance(error, Exception):
            return error
        if _is_lost_contact(error):
            self._astray = f"{type(error).__name__}: {error}"
            self._ring()
            self._judged.wait(self.deadline + 2 * SETTLE)
        return self._verdict.error() if self._verdict else error

    def end(self, error: BaseException | None = None) -> None:
        """The work has ended, by `error` or well."""
        if error:
            self._error = errors.to_json(error if isinstance(error, Exception) else _interrupted(error))
        self._left.set()
        self._ring()
        self._thread.join(CONNECTING)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # the thread may have ended before the work
            self._bell.send(b"!")

    def _post(self) -> Message:
        if self.meter:
            with contextlib.suppress(Exception):  # a meter that fails shows what it last did; the rank lives
                self._reading = self.meter()
        return {**self._place, "collectives": _collectives(), "line": _line_of(self._work), "meter": self._reading}

    def _watch(self) -> None:
        """Look, until the work has ended or a verdict ends it."""
        try:
            verdict = self._look()
            if verdict:
                self._carry_out(verdict)
            else:
                self._part()
        finally:
            self._judged.set()
            self._selector.close()
            for each in self._open:
                each.close()

    def _look(self) -> Verdict | None:
        raise NotImplementedError

    def _begin_turn(self, others: Iterable[Seen]) -> float:
        """When this turn begins, which is the time to judge others by: a pause in the middle is the next turn's.

        A process that was paused, by a scheduler say, hasn't listened. The others were paused with it, maybe, and wake
        a moment later, so that this time is taken off their silence.
        """
        now = time.monotonic()
        if (paused := now - self._turn) > 5 * self.period:
            for seen in others:
                seen.heard, seen.moved = seen.heard + paused, seen.moved + paused
            if self._first_sign:
                self._first_sign += paused
        self._turn = now
        return now

    def _carry_out(self, verdict: Verdict) -> None:
        """Kill who can't end; then this process ends, by its work if that can still raise the verdict.

        An error that was told may be everybody's, who then are on their way out and may have something to write.
        """
        self._verdict, error = verdict, verdict.error()
        self._judged.set()
        for host, pid in verdict.kill:
            _kill_sibling(host, pid)
        end = time.monotonic() + (GRACE if isinstance(error, RankError) else self.deadline)
        self._part()
        if not self._left.wait(end - time.monotonic()):
            self._exit(error)

    def _part(self) -> None:
        """End the connections so that what was said last is heard."""
        for line in self._lines():
            line.say_no_more()
        end = time.monotonic() + SETTLE
        for line in self._lines():
            line.hear_out(end - time.monotonic())

    def _lines(self) -> list[_Line]:
        raise NotImplementedError

    def _exit(self, error: Exception) -> None:
        """End this process, whose work is stuck; if even telling so hangs, without telling."""
        code = torchrun.ended(error.exit_code if isinstance(error, errors.UserError) else 1)
        last = threading.Timer(GRACE, os._exit, (code,))
        last.daemon = True
        last.start()
        lines = error.lines() if isinstance(error, errors.UserError) else [("", str(error))]
        print("\n".join(f"{label:>9}  {text}" for label, text in lines), file=sys.stderr, flush=True)
        sys.stdout.flush()
        stack = "".join(traceback.format_stack(sys._current_frames()[self._work]))
        logging.getLogger("espalier").error("%s\nThe work of rank %d was stuck at\n%s", error, self.rank, stack)
        self.last_word(error)
        os._exit(code)


class _Leader(_Watch):
    """Rank 0's: it hears all the others, and judges."""

    def __init__(self, server: socket.socket, key: str, size: int, deadline: float, patience: float) -> None:
        super().__init__(0, deadline, patience)
        self.key, self.size = key, size
        self.seen = {0: Seen(0, os.getpid(), socket.gethostname(), self._post())}
        self._selector.register(server, selectors.EVENT_READ, self._greet)
        self._open.append(server)
        self._server, self._missing = server, size - 1
        self._meters: dict[int, float] = {}

    def _look(self) -> Verdict | None:
        told = 0.0
        while not self._left.is_set():
            ready = self._selector.select(self.period if self._first_sign is None else SETTLE / 3)
            now = self._begin_turn(self.seen.values())
            for key, _ in ready:
                if key.data:
                    key.data()
                else:
                    key.fileobj.recv(64)  # type: ignore[union-attr]
            self.seen[0].take(self._post())
            self.seen[0].astray = self._astray
            if now - told >= self.period:
                told = now
                self._tell({"lives": 0})
            if verdict := self._judge(now):
                self._tell({"verdict": vars(verdict)})
                return verdict
        if self._error:
            self.seen[0].failed, self.seen[0].heard = self._error, time.monotonic()
            self._tell({"verdict": vars(self._first_failed())})
        else:
            self._tell({"ends": 0})
        return None

    def _lines(self) -> list[_Line]:
        return [seen.line for seen in self.seen.values() if seen.line and not seen.gone]

    def readings(self) -> float:
        """The sum of the other ranks' meters, those that have ended among them."""
        return sum(list(self._meters.values()))

    def _tell(self, message: Message) -> None:
        for seen in self.seen.values():
            if seen.line and not seen.gone:
                seen.line.send(message)

    def _greet(self) -> None:
        """Somebody connects; a rank says who it is first."""
        try:
            connection, _ = self._server.accept()
        except OSError:  # they went again, or all ranks have come a moment ago
            return
        line = _Line(connection)
        self._open.append(connection)

        def hear() -> None:
            self._hear(line)

        self._selector.register(connection, selectors.EVENT_READ, hear)

    def _hear(self, line: _Line) -> None:
        messages = line.read()
        seen = next((seen for seen in self.seen.values() if seen.line is line), None)
        for message in messages or []:
            if seen is None and message.get("key") == self.key:
                seen = Seen(message["rank"], message["pid"], message["host"], message["post"], line)
                self.seen[seen.rank] = seen
                self._missing -= 1
                if not self._missing:  # nobody else has business here
                    self._selector.unregister(self._server)
                    self._server.close()
            elif seen is None:
                messages = None  # no rank of ours
                break
            elif "post" in message:
                seen.take(message["post"])
                seen.astray = message["astray"]
                self._meters[seen.rank] = message["post"]["meter"]
            elif message["ends"]:
                seen.failed, seen.heard = message["ends"], time.monotonic()
            else:
                del self.seen[seen.rank]
        if messages is None:
            self._selector.unregister(line.connection)
            line.say_no_more()
            if seen is None:
                line.connection.close()
            elif seen.rank in self.seen and not seen.failed:
                seen.gone, seen.heard = True, time.monotonic()

    def _judge(self, now: float) -> Verdict | None:
        """What the signs come to; None while all is well, or a sign is too young."""
        all_seen = list(self.seen.values())
        if any(seen.gone or seen.failed or seen.astray for seen in all_seen):
            self._first_sign = self._first_sign or time.monotonic()
            gone = [seen for seen in all_seen if seen.gone]
            failed = [seen for seen in all_seen if seen.failed]
            if now - self._first_sign < SETTLE and (failed or not gone):
                return None
            # Who starts the ranks kills them when one has failed; an error may be of a connection to a dead one.
            if gone and all(gone[0].heard < seen.heard + SOON for seen in failed):
                return _gone(gone, self.seen[0].post)
            return self._first_failed() if failed else self._unreached(now - self._first_sign)
        silence = now - min(seen.heard for seen in all_seen)
        if silence > self.deadline:
            silent = [seen for seen in all_seen if now - seen.heard > self.deadline / 2]  # some a little later
            return _silent(silent, self.seen[0].post, silence, self.deadline)
        last, standing = _last(all_seen), now - max(seen.moved for seen in all_seen)
        limit = max(seen.post["limit"] for seen in last)
        if standing > limit and len(all_seen) == self.size:
            phase = last[0].post["phase"]
            return _behind(last, f"no progress for {standing:.0f} s", f"an end of {phase} within {limit:.0f} s")
        return None

    def _first_failed(self) -> Verdict:
        """The error of the rank that failed first; those of others may come of it."""
        first = min((seen for seen in self.seen.values() if seen.failed), key=lambda seen: seen.heard)
        return Verdict(first.failed or {}, by=first.rank)

    def _unreached(self, seconds: float) -> Verdict | None:
        """All live and none has failed, but for `seconds` some can't reach another. Who is furthest behind, by posts
        that are newer, holds them up; if that is who can't reach the others, the fault is its own or its network's.
        """
        all_seen = list(self.seen.values())
        quiet = [seen for seen in all_seen if seen.heard < (self._first_sign or 0.0)]
        if quiet and seconds < 10 * self.period:
            return None
        if quiet:
            return _silent(quiet, self.seen[0].post, seconds, 10 * self.period)
        last = _last(all_seen)
        if astray := [seen for seen in last if seen.astray]:
            return _cut_off(astray)
        return _behind(last, "no progress", "each to get as far as the others")


class _Follower(_Watch):
    """Any other rank's: it posts, and sees whether the leader lives."""

    def __init__(self, rank: int, line: _Line, leader: Seen, deadline: float, patience: float) -> None:
        super().__init__(rank, deadline, patience)
        self.line, self.leader = line, leader
        self._selector.register(line.connection, selectors.EVENT_READ, line)
        self._open.append(line.connection)

    def _look(self) -> Verdict | None:
        posted = 0.0
        while not self._left.is_set():
            ready = self._selector.select(self.period)
            now = self._begin_turn([self.leader])
            for key, _ in ready:
                if not key.data:
                    key.fileobj.recv(64)  # type: ignore[union-attr]
                    posted = 0.0  # there is something new to say
                    continue
                messages = self.line.read()
                if messages is None:
                    return self._without_leader(now)
                self.leader.heard = now
                for message in messages:
                    if "verdict" in message:
                        return Verdict(**message["verdict"])
                    if "ends" in message:
                        return None
            if now - self.leader.heard > self.deadline:
                return self._without_leader(now)
            if now - posted >= self.period:
                posted = now
                self.line.send({"post": self._post(), "astray": self._astray})
        self.line.send({"ends": self._error})
        return None

    def _without_leader(self, now: float) -> Verdict:
        """It is gone; or silent, and maybe killed for that by a rank that was a moment earlier to see it."""
        silence = now - self.leader.heard
        if silence > self.deadline / 2:
            return _silent([self.leader], self._post(), silence, self.deadline)
        return _gone([self.leader], self._post())

    def _lines(self) -> list[_Line]:
        return [self.line]


def _met(world: World, deadline: float, patience: float) -> _Watch:
    """This rank's watch, once every rank is in contact with the leader's."""
    told, server = None, None
    if world.leads:
        server = _listening(world.machines)
        told = {"host": _address(world.machines), "port": server.getsockname()[1], "key": secrets.token_hex(16)}
        told |= {"pid": os.getpid(), "name": socket.gethostname()}
    told = world.told(told)
    watch: _Watch
    if server:
        watch = _Leader(server, told["key"], world.size, deadline, patience)
    line = world.together(lambda: None if world.leads else _connected(told["host"], told["port"]))
    if line:
        nowhere = {"step": 0, "phase": "starting", "line": "unknown", "collectives": 0, "moves": 0}
        watch = _Follower(world.rank, line, Seen(0, told["pid"], told["name"], nowhere), deadline, patience)
        me = {"rank": world.rank, "pid": os.getpid(), "host": socket.gethostname(), "post": watch._post()}
        line.send({"key": told["key"], **me})
    watch._thread.start()
    return watch


def _listening(machines: int) -> socket.socket:
    if machines == 1:
        return socket.create_server(("127.0.0.1", 0))
    both = socket.has_dualstack_ipv6()
    return socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both)


def _address(machines: int) -> str:
    """Where other ranks find this machine: the address by which it would speak to torchrun's meeting place."""
    if machines == 1:
        return "127.0.0.1"
    name, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, place = socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        own = probe.getsockname()[0]
    return name if own.startswith("127.") or own == "::1" else own


def _connected(host: str, port: int) -> _Line:
    try:
        return _Line(socket.create_connection((host, port), timeout=CONNECTING))
    except OSError as error:
        raise ResourceError(
            f"{host}, port {port}",
            found=f"no connection to rank 0 ({error})",
            expected="machines of a run that reach each other at any port",
            mend="Open the ports between them, as torch's own connections need it too.",
        ) from None


def _place(post: Message) -> str:
    return f"step {post['step']} ({post['phase']}, in {post['line']})"


_AGAIN = "All ranks were stopped. Start the run again: it goes on from its last checkpoint."


def _gone(seen: list[Seen], missed: Message) -> Verdict:
    return _lost(
        seen,
        found=f"a process that ended without a word, missed at {_place(missed)}",
        expected="one that lives until all have done",
        mend=f"{_AGAIN} The kernel's log says whether memory ran out.",
    )


def _silent(seen: list[Seen], missed: Message, seconds: float, deadline: float) -> Verdict:
    return _lost(
        seen,
        found=f"silence for {seconds:.0f} s, missed at {_place(missed)}",
        expected=f"a sign of life every {deadline:g} s",
        mend=_AGAIN,
        kill=tuple((each.host, each.pid) for each in seen),
    )


def _behind(seen: list[Seen], found: str, expected: str) -> Verdict:
    return _lost(seen, found=f"{found} at {_place(seen[0].post)}", expected=expected, mend=_AGAIN)


def _cut_off(seen: list[Seen]) -> Verdict:
    return _lost(
        seen,
        found=f"an error of this rank alone at {_place(seen[0].post)}, while all live and none is further behind: "
        f"{seen[0].astray}",
        expected="a network and a device by which it reaches the others",
        mend=_AGAIN,
    )


def _lost(seen: list[Seen], *, kill: tuple[tuple[str, int], ...] = (), **parts: str) -> Verdict:
    more = f" and {len(seen) - 4} more" if len(seen) > 4 else ""
    error = RankError(", ".join(each.who() for each in seen[:4]) + more, **parts)
    return Verdict(errors.to_json(error), 0, kill)


def _last(seen: list[Seen]) -> list[Seen]:
    """Those that are furthest behind."""
    came = min(each.came for each in seen)
    return [each for each in seen if each.came == came]


def _collectives() -> int:
    """How many collectives of torch's the work has entered."""
    from torch import distributed

    groups = list(distributed.distributed_c10d._world.pg_map)
    backends = (group._get_backend(device) for group in groups for device in group._device_types)
    return sum(backend._get_sequence_number_for_group() for backend in backends)  # type: ignore[attr-defined]


# How gloo's errors of a connection begin; those of wrong sizes begin otherwise, and of memory are none of gloo's.
GLOO = re.compile(r"\[\S*gloo/\S+:\d+\] ")
# What NCCL, and torch's own watch over it, say where a rank isn't reached; of this rank's device and memory they don't.
NCCL = re.compile(
    r"ncclRemoteError|[Tt]im(ed|ing) out|[Tt]imeout|[Cc]onnection (closed|refused|reset)|Broken pipe|No route to host"
    r"|unreachable|completion from peer"
)
# What they say of this rank's device, whose own faults may be in words like those: a launch may time out.
DEVICE = re.compile(r"cuda ?(error|failure)", re.IGNORECASE)


def _is_lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another rank can't be reached.

    An error of this rank's own, such as of its memory, may be raised in a collective too, and under the same class.
    """
    from torch import distributed

    if isinstance(error, distributed.DistBackendError):
        return NCCL.search(str(error)) is not None and DEVICE.search(str(error)) is None
    lost = isinstance(error, distributed.DistNetworkError | distributed.DistStoreError)
    return lost or (isinstance(error, RuntimeError) and GLOO.search(str(error)) is not None)


def _line_of(thread: int) -> str:
    """The line that a thread is at."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "no line"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_qualname}"


def _interrupted(error: BaseException) -> RankError:
    return RankError(
        f"pid {os.getpid()} on {socket.gethostname()}",
        found=f"an interruption ({type(error).__name__})",
        expected="ranks that all end the run together",
        mend=_AGAIN,
    )


def _nothing(error: Exception) -> None:
    """What is told where nobody has to be."""


def _kill_sibling(host: str, pid: int) -> None:
    """Kill a stopped rank of this machine: of the processes with this one's parent, which are all about to end."""
    import psutil

    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if host == socket.gethostname() and pid != os.getpid() and psutil.Process(pid).ppid() == os.getppid():
            os.kill(pid, signal.SIGKILL)


_current: _Watch | None = None
