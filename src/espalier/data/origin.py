"""Origin: what a run's batches come from, recorded when training begins and compared whenever it is taken up.

Contents decide, not names or times: a source that was edited and edited back is the same, and one that was touched is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from espalier import files, records, run
from espalier.data import tokenizer as tokenizers
from espalier.data.prepare import Corpus, DataRecipe
from espalier.errors import DataError, RunError
from espalier.folder import tokenizer_files

RECORD = run.ORIGIN
TOKENIZER = "tokenizer"  # a folder with the run's own copy
SHOWN = 12  # digits of a hash that tell one from another


@dataclass(frozen=True)
class Origin:
    """Hashes of the tokenizer's files, such as its chat template, and of each shard of tokens, by split and name."""

    tokenizer: dict[str, str]
    shards: dict[str, str]

    @classmethod
    def of(cls, corpus: Corpus) -> Origin:
        splits = {"train": corpus.train, "validation": corpus.validation}
        shards = {f"{split}/{shard.name}": shard.sha256 for split, tokens in splits.items() for shard in tokens.shards}
        return cls({path.name: files.sha256(path) for path in tokenizer_files(corpus.tokenizer)}, shards)

    @property
    def digest(self) -> str:
        """One hash for all of it, by which a change may be accepted."""
        return files.digest(asdict(self))[:SHOWN]


def with_own_tokenizer(recipe: DataRecipe, folder: Path) -> DataRecipe:
    """The recipe of a run's data, with the tokenizer that the run began with in the place of one to be trained.

    Sources that change would change what is trained on them, and the model's ids would stand for other tokens.
    """
    if recipe.tokenizer is not None or not (folder / RECORD).exists():
        return recipe
    own = folder / TOKENIZER
    if damage := files.damage(own):
        raise RunError(
            str(own),
            found=damage,
            expected="the tokenizer that the run began with",
            mend="Restore the folder; each checkpoint of the run has a copy of the tokenizer's files.",
        )
    return recipe.model_copy(update={"tokenizer": str(own)})


def require_same(folder: Path, corpus: Corpus, *, accept: str, tell: Callable[[str], None]) -> None:
    """Record the origin of a run's data in its folder, or refuse another one than is recorded there.

    accept  the digest of the data with which the run may go on; it is recorded then
    """
    now, kept = Origin.of(corpus), records.read(folder / RECORD, None)
    if kept is None and not any(folder.glob("checkpoint-*")):
        _keep_tokenizer(folder, corpus.tokenizer)
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
        raise _other_tokenizer(folder, corpus.tokenizer, before, now)
    if accept != now.digest:
        raise _other_text(folder, corpus.tokenizer, before, now)
    records.write(folder / RECORD, {**asdict(now), "before": [*kept.get("before", []), before.digest]})
    tell(
        f"Goes on with other data than it began with, as was asked: {now.digest}, before {before.digest}; "
        f"in the tokens of {corpus.tokenizer}, as before."
    )


def _keep_tokenizer(folder: Path, tokenizer: Path) -> None:
    with files.whole_folder(folder / TOKENIZER) as own:
        for path in tokenizer_files(tokenizer):
            shutil.copy(path, own)


def _other_text(folder: Path, tokenizer: Path, before: Origin, now: Origin) -> DataError:
    first, count = _first_differing(before.shards, now.shards)
    return DataError(
        str(folder / RECORD),
        found=f"other text than the run began with: {count} of {len(before.shards | now.shards)} shards differ, the "
        f"first of them {first} ({_short(now.shards.get(first))})",
        expected=f"the same tokens in the same order ({_short(before.shards.get(first))})",
        mend=f"Restore the sources, or go on with what is there now, in the tokens of {tokenizer}, which the run began "
        f"with: --accept-data {now.digest}.",
    )


def _other_tokenizer(folder: Path, tokenizer: Path, before: Origin, now: Origin) -> DataError:
    own = folder / TOKENIZER
    first, _ = _first_differing(before.tokenizer, now.tokenizer)
    told = _short(now.tokenizer.get(first))
    if files.damage(own) is None:
        number = tokenizers.first_difference(own / "tokenizer.json", tokenizer / "tokenizer.json")
        told += "" if number is None else f", first differing id {number}"
    return DataError(
        str(tokenizer / first),
        found=f"another tokenizer than the run began with ({told})",
        expected=f"the one that the model's ids stand for ({_short(before.tokenizer.get(first))})",
        mend=f"Restore its files, of which {own} has copies, or begin another run with another name=...",
    )


def _first_differing(before: dict[str, str], now: dict[str, str]) -> tuple[str, int]:
    """The first name with another hash, and how many there are."""
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    return changed[0], len(changed)


def _short(sha256: str | None) -> str:
    return f"sha256 {sha256[:SHOWN]}" if sha256 else "not there"
