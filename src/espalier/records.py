"""Records: the small files by which a run is known. Each carries a seal, a hash of its name and what stands before it.

So an accident to a record is found before it is parsed. JSON holds its seal as the last member, other text in a last
line. A line of JSON Lines is sealed together with the seal before it: none of them can be lost, doubled or moved, but
from the end of the file, for which `last_seal` is kept elsewhere. A seal finds accidents, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from espalier import files
from espalier.errors import RunError

SEAL = "seal"
DIGITS = 16  # of a SHA-256, in hex: one accident in 2^64 goes unseen
T = TypeVar("T")
LAST = re.compile(rb'(?:"seal": "|# seal: )([0-9a-f]{16})"?\s*}?\n$')


def seal(text: str, after: str) -> str:
    """The seal of a text that stands after another seal, or first in a file of this name."""
    return hashlib.sha256((after + text).encode()).hexdigest()[:DIGITS]


def dump(value: Mapping[str, Any], name: str) -> str:
    """A JSON object, of one member or more, as the sealed text of a file of this name."""
    body = json.dumps(value, indent=2).removesuffix("\n}")
    return f'{body},\n  "{SEAL}": "{seal(body, name)}"\n}}\n'


def parse(text: str, name: str) -> dict[str, Any]:
    """What `dump` was given; ValueError for any other text than it made."""
    body = text[: text.rfind(f',\n  "{SEAL}": ')]
    if text != f'{body},\n  "{SEAL}": "{seal(body, name)}"\n}}\n':
        raise ValueError("its seal doesn't fit")
    return dict(json.loads(body + "\n}"))


def signed(text: str, name: str) -> str:
    """Whole lines as the sealed text of a file of this name; the seal is a comment."""
    return f"{text}# {SEAL}: {seal(text, name)}\n"


def unsigned(text: str, name: str) -> str:
    """What `signed` was given; ValueError for any other text than it made."""
    body = text[: text.rfind(f"# {SEAL}: ")]
    if text != signed(body, name):
        raise ValueError("its seal doesn't fit")
    return body


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a record in one step."""
    files.write_text(path, dump(value, path.name))


def write_signed(path: Path, text: str) -> None:
    """Replace a record in whole lines of text in one step."""
    files.write_text(path, signed(text, path.name))


def read(path: Path, default: Any) -> Any:
    """A run's record, or `default` when there is no such file; `RunError` when it isn't as it was written."""
    return _opened(path, parse) if path.exists() else default


def read_signed(path: Path) -> str:
    """What `write_signed` wrote, without its seal; `RunError` when it isn't as it was written."""
    return _opened(path, unsigned)


def append(path: Path, value: Mapping[str, Any]) -> None:
    """Add a line to a file of lines. A last one that a crash cut short is removed first."""
    with path.open("a+b") as file:
        files.cut_torn_line(file)
        file.write(_line(value, _last(file) or path.name).encode())


def replace_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace all lines of a file in one step."""
    lines: list[str] = []
    after = path.name
    for value in values:
        lines.append(_line(value, after))
        after = lines[-1][-DIGITS - 3 : -3]
    files.write_text(path, "".join(lines))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file; a last one that a crash cut short is left out. `RunError` at the first damaged one."""
    after = path.name
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), start=1):
        try:
            text = line.decode()
            body = text[: text.rfind(f', "{SEAL}": ')]
            own = seal(body, after)
            if text != f'{body}, "{SEAL}": "{own}"}}':
                raise ValueError("its seal doesn't fit")
            yield json.loads(body + "}")
        except ValueError as error:
            raise _damaged(f"{path}:{number}", error) from None
        after = own


def last_seal(path: Path) -> str:
    """The seal at the end of a record or a file of lines; "" where there is none."""
    with path.open("rb") as file:
        return _last(file)


def _opened(path: Path, opened: Callable[[str, str], T]) -> T:
    try:
        return opened(path.read_text(encoding="utf-8"), path.name)
    except (ValueError, FileNotFoundError) as error:
        raise _damaged(str(path), error) from None


def _line(value: Mapping[str, Any], after: str) -> str:
    body = json.dumps(value).removesuffix("}")
    return f'{body}, "{SEAL}": "{seal(body, after)}"}}\n'


def _last(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * DIGITS))
    found = LAST.search(file.read())
    return found[1].decode() if found else ""


def _damaged(where: str, error: ValueError | FileNotFoundError) -> RunError:
    return RunError(
        where,
        found="no such file" if isinstance(error, FileNotFoundError) else f"what can't be read ({error})",
        expected="a record as Espalier wrote it",
        mend="Undo the edit or restore the file, or choose another name=... and run the recipe again.",
    )
