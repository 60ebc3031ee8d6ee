"""Dataset: rows in Parquet or JSONL that `datasets.load_dataset` opens, of four kinds, with a manifest.

The kinds are trl's: `text`, `messages`, `prompt`/`completion`, `prompt`/`chosen`/`rejected`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from espalier import files
from espalier.errors import DataError

KINDS: dict[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
CARD = "dataset.json"


def kind_of(columns: Iterable[str]) -> str | None:
    """The row kind that a set of columns makes, or None."""
    have = set(columns)
    return next((kind for kind, needed in KINDS.items() if have.issuperset(needed)), None)


@dataclass(frozen=True)
class Dataset:
    """A folder of Parquet files, a file a split, with `dataset.json` beside them.

    rows and bytes are per split; `dropped` counts what was left out, by reason.
    """

    path: Path
    kind: str
    rows: dict[str, int]
    bytes: dict[str, int]
    dropped: dict[str, int] = field(default_factory=dict)
    licence: str = "unknown"
    parents: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Open a dataset that Espalier wrote, checked against its manifest."""
        path = Path(path)
        damage = files.damage(path)
        if damage is None and not (path / CARD).exists():
            damage = f"{path.name} has no {CARD}"
        if damage:
            raise DataError(
                str(path),
                found=damage,
                expected="a dataset as it was written",
                mend="Delete the folder and make it again.",
            )
        values = json.loads((path / CARD).read_text(encoding="utf-8"))
        values["parents"] = tuple(values["parents"])
        return cls(path=path, **values)

    def save_card(self, folder: Path) -> None:
        """Write `dataset.json` into a folder that is still being written."""
        values = asdict(self)
        del values["path"]
        files.write_json(folder / CARD, values)

    def split_file(self, split: str) -> Path:
        return self.path / f"{split}.parquet"

    def texts(self, split: str, batch_rows: int = 256) -> Iterator[str]:
        """The `text` column of a split, in order, read a batch at a time."""
        import pyarrow.parquet as parquet

        for batch in parquet.ParquetFile(self.split_file(split)).iter_batches(batch_rows, columns=["text"]):
            yield from batch.column(0).to_pylist()

    def fingerprint(self) -> str:
        """Digest of the content of every split."""
        manifest: dict[str, Any] = json.loads((self.path / files.MANIFEST).read_text())["files"]
        return files.digest({name: entry["sha256"] for name, entry in manifest.items() if name != CARD})
