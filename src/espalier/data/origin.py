"""Origin: what a run's batches come from, recorded when training begins and compared whenever it is taken up.

Contents decide, not names or times: a source that was edited and edited back is the same, and one that was touched is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from espalier import files, records
from espalier.data import tokenizer as tokenizers
from espalier.data.prepare import Corpus
from espalier.errors import DataError, RunError

RECORD = "data.json"
SHOWN = 12  # digits of a hash that tell one from another


@dataclass(frozen=True)
class Origin:
    """Hashes of the tokenizer and of every shard of tokens, by split and name."""

    tokenizer: str
    shards: dict[str, str]

    @classmethod
    def of(cls, corpus: Corpus) -> Origin:
        splits = {"train": corpus.train, "validation": corpus.validation}
        shards = {f"{split}/{shard.name}": shard.sha256 for split, tokens in splits.items() for shard in tokens.shards}
        return cls(files.sha256(corpus.tokenizer / "tokenizer.json"), shards)

    @property
    def digest(self) -> str:
        """One hash for all of it, by which a change may be accepted."""
        return files.digest(asdict(self))[:SHOWN]


def require_same(folder: Path, corpus: Corpus, *, accept: str, tell: Callable[[str], None]) -> None:
    """Record the origin of a run's data in its folder, or refuse another one than is recorded there.

    accept  the digest of the data with which the run may go on; it is recorded then
    """
    now, kept = Origin.of(corpus), records.read(folder / RECORD, None)
    if kept is None and not any(folder.glob("checkpoint-*")):
        records.write(folder / RECORD, asdict(now))
        return
    if kept is None:
        raise RunError(
            str(folder / RECORD),
            found="no such file",
            expected="the hashes of the data that the run began with",
            mend="Restore the file, or begin another run with another name=...",
        )
    before = Origin(kept["tokenizer"], kept["shards"])
    if now == before:
        return
    if now.tokenizer != before.tokenizer:
        raise _other_tokenizer(folder, corpus, before, now)
    if accept != now.digest:
        raise _other_text(folder, before, now)
    records.write(folder / RECORD, {**asdict(now), "before": [*kept.get("before", []), before.digest]})
    tell(f"Goes on with other data than it began with, as was asked: {now.digest}, before {before.digest}.")


def _other_text(folder: Path, before: Origin, now: Origin) -> DataError:
    names = before.shards.keys() | now.shards.keys()
    changed = sorted(name for name in names if before.shards.get(name) != now.shards.get(name))
    first = changed[0]
    return DataError(
        str(folder / RECORD),
        found=f"other text than the run began with: {len(changed)} of {len(names)} shards differ, the first of them "
        f"{first} ({_short(now.shards.get(first))})",
        expected=f"the same tokens in the same order ({_short(before.shards.get(first))})",
        mend=f"Restore the sources, or go on with what is there now: --accept-data {now.digest}.",
    )


def _other_tokenizer(folder: Path, corpus: Corpus, before: Origin, now: Origin) -> DataError:
    saved = next(iter(sorted(folder.glob("checkpoint-*/tokenizer.json"))), None)
    number = tokenizers.first_difference(saved, corpus.tokenizer / "tokenizer.json") if saved else None
    first = "" if number is None else f", first differing id {number}"
    return DataError(
        str(corpus.tokenizer / "tokenizer.json"),
        found=f"another tokenizer than the run began with ({_short(now.tokenizer)}{first})",
        expected=f"the one that the model's ids stand for ({_short(before.tokenizer)})",
        mend="Restore the sources that it was trained on, or begin another run with another name=...; state "
        "data.tokenizer=FOLDER from its start to keep one tokenizer while texts change.",
    )


def _short(sha256: str | None) -> str:
    return f"sha256 {sha256[:SHOWN]}" if sha256 else "not there"
