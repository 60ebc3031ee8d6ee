"""Every file call of a piece of work, seen from outside: counted, recorded, killed at, or made to fail.

A forked child asks the kernel (a seccomp filter) to stop it at each system call that changes files; its parent, which
traces it (ptrace), decides what becomes of the call. So nothing is patched, and calls from Python, Rust and C++ are
seen alike. Only calls on paths below one folder count. What changes files without a call is not seen: writing to
mapped memory. Nothing here does that; a replay of the recorded calls that comes to the same bytes proves it (power.py).

Linux on x86-64 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import platform
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from espalier.errors import UserError

# System calls by their numbers on x86-64, and which of their arguments are paths: (folder's descriptor or None, path).
OPEN, CREAT, OPENAT = 2, 85, 257
WRITE, PWRITE, WRITEV, PWRITEV, SENDFILE, COPY_RANGE = 1, 18, 20, 296, 40, 326
CLOSE, FSYNC, FDATASYNC, FTRUNCATE, FCHMOD, FALLOCATE, FLOCK = 3, 74, 75, 77, 91, 285, 73
BY_PATH: dict[int, tuple[str, tuple[tuple[int | None, int], ...]]] = {
    OPEN: ("open", ((None, 0),)),
    CREAT: ("open", ((None, 0),)),
    OPENAT: ("open", ((0, 1),)),
    76: ("truncate", ((None, 0),)),
    82: ("rename", ((None, 0), (None, 1))),
    264: ("rename", ((0, 1), (2, 3))),
    316: ("rename", ((0, 1), (2, 3))),
    83: ("mkdir", ((None, 0),)),
    258: ("mkdir", ((0, 1),)),
    84: ("rmdir", ((None, 0),)),
    87: ("unlink", ((None, 0),)),
    263: ("unlink", ((0, 1),)),
    86: ("link", ((None, 0), (None, 1))),
    265: ("link", ((0, 1), (2, 3))),
    88: ("symlink", ((None, 1),)),
    266: ("symlink", ((1, 2),)),
    90: ("chmod", ((None, 0),)),
    268: ("chmod", ((0, 1),)),
    280: ("utime", ((0, 1),)),
}
BY_DESCRIPTOR = {
    WRITE: "write",
    PWRITE: "write",
    WRITEV: "write",
    PWRITEV: "write",
    SENDFILE: "write",
    COPY_RANGE: "write",
    CLOSE: "close",
    FSYNC: "fsync",
    FDATASYNC: "fsync",
    FTRUNCATE: "truncate",
    FCHMOD: "chmod",
    FALLOCATE: "truncate",
}
LARGE, COLLAPSE = 2**21, 25  # a large page, and the advice to make one of small ones
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
AT_REMOVEDIR = 0x200
AT_FDCWD = -100

Fault = Literal["kill", "torn", "ENOSPC", "EIO"]
Work = Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """A file call: its name, the path (and the new one of a rename), and for a write where and what."""

    name: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""
    flags: int = 0


@dataclass
class End:
    """How a piece of work ended.

    result  what it returned, as JSON; None if it didn't
    error   the refusal in which it ended: kind, where, found, expected, mend; {"bug": traceback} for anything else
    killed  whether a signal ended it
    calls   the file calls that it had made, the one at the fault among them
    """

    result: Any = None
    error: dict[str, str] | None = None
    killed: bool = False
    seconds: float = 0.0
    calls: list[Call] = field(default_factory=list)


def available() -> bool:
    """Whether this machine lets a process watch its child so."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    try:
        return watch(lambda: 1, Path("/nowhere")).result == 1
    except OSError:
        return False


def forked(work: Work) -> End:
    """Do the work in a child that nobody watches."""
    began = time.monotonic()
    reading, child = _start(work, traced=False)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return _ended(said, status, time.monotonic() - began, [])


def watch(work: Work, below: Path, *, at: int = 0, fault: Fault = "kill") -> End:
    """Do the work in a child and note its file calls below a folder; `fault` happens at call number `at`, from 1.

    kill    the process is gone before the call
    torn    a write is cut in half, then the process is gone; as `kill` for other calls
    ENOSPC, EIO  this one call fails so and isn't made
    """
    began = time.monotonic()
    reading, child = _start(work, traced=True)
    watched = _Watched(child, f"{os.path.realpath(below)}/", at, fault)
    status = watched.attend()
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    return _ended(said, status, time.monotonic() - began, watched.calls)


def share_memory() -> None:
    """Make forks of this process cheap: their collectors don't look at what it holds, which lies in large pages.

    A fork copies the table of all pages; with pages of 2 MB it takes a third of the time. An older kernel says no.
    """
    gc.collect()
    gc.freeze()
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, kind, _, _, file, *_ = line.split()
        begin, end = (int(address, 16) for address in place.split("-"))
        if kind == "rw-p" and file == "0":
            for page in range(-(-begin // LARGE) * LARGE, end - LARGE + 1, LARGE):
                _libc.madvise(ctypes.c_void_p(page), ctypes.c_size_t(LARGE), COLLAPSE)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies."""
    _libc.prctl(1, signal.SIGKILL, 0, 0, 0)


def _start(work: Work, *, traced: bool) -> tuple[int, int]:
    """Fork a child that does the work and says how it went through a pipe: (where to read that, its id)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return reading, child
    os.close(reading)
    end_with_parent()
    gc.disable()  # to look at what the parent has would copy its memory
    signal.alarm(60)
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    try:
        if traced:
            _be_traced()
        said = json.dumps({"result": work()})
    except UserError as error:
        said = json.dumps({"error": {"kind": type(error).__name__, **dict(error.lines())}})
    except SystemExit as end:
        said = json.dumps({"result": end.code})
    except BaseException:
        said = json.dumps({"error": {"bug": traceback.format_exc()}})
    os.write(writing, said.encode())
    os._exit(0)


def _ended(said: bytes, status: int, seconds: float, calls: list[Call]) -> End:
    killed = os.WIFSIGNALED(status)
    told = json.loads(said) if said and not killed else {}
    return End(told.get("result"), told.get("error"), killed, seconds, calls)


# The kernel's side.

TRACEME, CONT, GETREGS, SETREGS, SYSCALL, SETOPTIONS = 0, 7, 12, 13, 24, 0x4200
OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x80 | 0x100000  # syscall stops marked, children and threads too, seccomp, kill all
SECCOMP_STOP = signal.SIGTRAP | 7 << 8
WALL = 0x40000000
REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in REGISTERS]


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, process: int, data: Any = None) -> None:
    if _libc.ptrace(request, process, None, data) < 0:
        raise OSError(ctypes.get_errno(), "ptrace")


def _be_traced() -> None:
    """Have the parent watch this process from here on, and every call of the tables above stop it."""
    _ptrace(TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    numbers = sorted({*BY_PATH, *BY_DESCRIPTOR})
    load, allow, trace = (0x20, 0, 0, 0), (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FF00000)
    jumps = [(0x15, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code = b"".join(struct.pack("HBBI", *line) for line in (load, *jumps, allow, trace))
    program = _Filter(len(numbers) + 3, code)
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


class _Watched:
    """A traced child, from its first stop to its end."""

    def __init__(self, child: int, below: str, at: int, fault: Fault) -> None:
        self.child, self.below, self.at, self.fault = child, below, at, fault
        self.calls: list[Call] = []

    def attend(self) -> int:
        """The exit status."""
        os.waitpid(self.child, WALL)
        _ptrace(SETOPTIONS, self.child, OPTIONS)
        _ptrace(CONT, self.child)
        while True:
            process, status = os.waitpid(-1, WALL)
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                if process == self.child:
                    return status
                continue
            if status >> 8 == SECCOMP_STOP:
                self._stopped(process)
            else:
                self._go_on(process, status)

    def _go_on(self, process: int, status: int) -> None:
        """After a stop that isn't ours: hand the signal on, unless it belongs to tracing."""
        number = os.WSTOPSIG(status)
        own = status >> 16 or number & 0x7F in (signal.SIGTRAP, signal.SIGSTOP)
        self._continue(process, None if own else number)

    def _continue(self, process: int, data: int | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):  # killed meanwhile
            _ptrace(CONT, process, data)

    def _stopped(self, process: int) -> None:
        """A file call is about to be made."""
        registers = _Registers()
        _ptrace(GETREGS, process, ctypes.byref(registers))
        call = self._call(process, registers)
        if call is not None:
            self.calls.append(call)
            if len(self.calls) == self.at and self._fail(process, registers, call):
                return
        self._continue(process)

    def _fail(self, process: int, registers: _Registers, call: Call) -> bool:
        """Make the fault happen; whether the process is gone."""
        if self.fault in ("kill", "torn"):
            if self.fault == "torn" and registers.orig_rax in (WRITE, PWRITE) and len(call.data) > 1:
                registers.rdx //= 2
                _ptrace(SETREGS, process, ctypes.byref(registers))
                _ptrace(SYSCALL, process)
                os.waitpid(process, WALL)
            os.kill(self.child, signal.SIGKILL)
            return True
        registers.orig_rax = 2**64 - 1
        registers.rax = 2**64 - getattr(errno, self.fault)
        _ptrace(SETREGS, process, ctypes.byref(registers))
        return False

    def _call(self, process: int, registers: _Registers) -> Call | None:
        """The call, if it changes something below the folder."""
        number = registers.orig_rax
        arguments = [getattr(registers, name) for name in ARGUMENTS]
        if number in BY_DESCRIPTOR:
            return self._on_descriptor(process, number, arguments)
        name, places = BY_PATH[number]
        paths = [self._path(process, arguments, *place) for place in places]
        if not any(self._is_below(path) for path in paths):
            return None
        flags = {OPEN: arguments[1], OPENAT: arguments[2], CREAT: CHANGES}.get(number, 0)
        if name == "open" and not flags & CHANGES:
            return None
        if name == "unlink" and number == 263 and arguments[2] & AT_REMOVEDIR:
            name = "rmdir"
        return Call(name, paths[0], paths[-1] if len(paths) > 1 else "", flags=flags)

    def _on_descriptor(self, process: int, number: int, arguments: list[int]) -> Call | None:
        # A pipe, a socket or a terminal has no path below the folder.
        descriptor = _signed(arguments[0])
        path = self._target(descriptor)
        if not self._is_below(path) or path.endswith(" (deleted)"):
            return None
        name = BY_DESCRIPTOR[number]
        position, flags = self._position(descriptor)
        if name == "close":
            return Call(name, path) if flags & (os.O_WRONLY | os.O_RDWR) else None
        if name == "truncate":
            return Call(name, path, offset=arguments[1])
        if name != "write":
            return Call(name, path)
        data = b"".join(self._written(process, number, arguments))
        offset = arguments[3] if number in (PWRITE, PWRITEV) else position
        if flags & os.O_APPEND:
            offset = os.stat(path).st_size  # noqa: PTH116
        return Call(name, path, offset=offset, data=data)

    def _is_below(self, path: str) -> bool:
        return f"{path}/".startswith(self.below)

    def _written(self, process: int, number: int, arguments: list[int]) -> Iterator[bytes]:
        """The bytes that a write is given."""
        if number in (WRITE, PWRITE):
            yield self._memory(process, arguments[1], arguments[2])
        elif number in (WRITEV, PWRITEV):
            table = self._memory(process, arguments[1], 16 * arguments[2])
            for address, length in struct.iter_unpack("QQ", table):
                yield self._memory(process, address, length)
        else:  # from another file
            source = _signed(arguments[1] if number == SENDFILE else arguments[0])
            length = arguments[3] if number == SENDFILE else arguments[4]
            where = arguments[2] if number == SENDFILE else arguments[1]
            begin = struct.unpack("q", self._memory(process, where, 8))[0] if where else self._position(source)[0]
            with open(self._target(source), "rb") as file:  # noqa: PTH123
                file.seek(begin)
                yield file.read(length)

    def _path(self, process: int, arguments: list[int], folder: int | None, place: int) -> str:
        text = self._memory(process, arguments[place], 4096, text=True).decode(errors="surrogateescape")
        descriptor = AT_FDCWD if folder is None else _signed(arguments[folder])
        base = str(Path(f"/proc/{self.child}/cwd").readlink()) if descriptor == AT_FDCWD else self._target(descriptor)
        return os.path.normpath(os.path.join(base, text))  # noqa: PTH118

    def _target(self, descriptor: int) -> str:
        try:
            return str(Path(f"/proc/{self.child}/fd/{descriptor}").readlink())
        except OSError:
            return ""

    def _position(self, descriptor: int) -> tuple[int, int]:
        """Offset and flags of an open file."""
        with open(f"/proc/{self.child}/fdinfo/{descriptor}", encoding="ascii") as file:  # noqa: PTH123
            told = dict(line.split(":", 1) for line in file.read().splitlines() if ":" in line)
        return int(told["pos"]), int(told["flags"], 8)

    def _memory(self, process: int, address: int, length: int, *, text: bool = False) -> bytes:
        """Bytes of the child; text ends at its first NUL, and may end where its memory does."""
        with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
            if not text:
                memory.seek(address)
                return memory.read(length)
            parts = b""
            while b"\0" not in parts and len(parts) < length:
                memory.seek(address + len(parts))
                parts += memory.read(4096 - (address + len(parts)) % 4096)
            return parts.split(b"\0", 1)[0]


def _signed(number: int) -> int:
    """A descriptor, which is 32 bits of its register."""
    return ctypes.c_int(number & 0xFFFFFFFF).value
