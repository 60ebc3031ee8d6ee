"""Answers that were paid for once, on the disk: a question that was answered is never asked again.

One SQLite file for all models and runs. Several processes may use it at a time, and one that is killed loses nothing
that was stored.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from espalier import files
from espalier.errors import ResourceError
from espalier.infer.engine import Answer

FILE = Path("answers") / "answers.sqlite"
# Seconds that a process waits for another one's write, which takes milliseconds.
PATIENCE = 60.0

Mode = Literal["use", "refresh", "off"]


class Cache:
    """Answers by key. `use` finds and keeps them, `refresh` keeps without finding, `off` does neither."""

    def __init__(self, home: Path, mode: Mode) -> None:
        self.path, self.mode = home / FILE, mode
        self._table: sqlite3.Connection | None = None
        if mode != "off":
            self._table = self._opened()

    def find(self, key: str) -> Answer | None:
        """The answer of a key, which costs nothing now."""
        if self._table is None or self.mode == "refresh":
            return None
        with self._errors():
            row = self._table.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return _from_json(row[0]) if row else None

    def keep(self, key: str, answer: Answer) -> None:
        """Store an answer; it outlives the process when this returns."""
        if self._table is not None:
            with self._errors():
                self._table.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, _to_json(answer)))

    def close(self) -> None:
        if self._table is not None:
            self._table.close()

    def _opened(self) -> sqlite3.Connection:
        with files.disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            # Every statement is a transaction of its own; the caller's thread reads, the one that asks writes.
            table = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                table.execute("PRAGMA journal_mode = WAL")
                table.execute("PRAGMA synchronous = NORMAL")
                table.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT) WITHOUT ROWID")
            except BaseException:
                table.close()
                raise
        return table

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise ResourceError(
                str(self.path),
                found=f"the database said: {error}",
                expected="a file that can be read and written",
                mend="Free some space, choose another place with ESPALIER_HOME, or delete the file: it is a cache.",
            ) from error


def _to_json(answer: Answer) -> str:
    values = asdict(answer)
    del values["cost"]
    return json.dumps(values)


def _from_json(text: str) -> Answer:
    values = json.loads(text)
    return Answer(**values | {"tokens": tuple(values["tokens"]), "logprobs": tuple(values["logprobs"])})
