"""ModelFolder: what `AutoModelForCausalLM.from_pretrained` opens, and where it came from.

Native at every moment: config.json, safetensors, tokenizer files. `made.json` beside them says how it was made;
a bare Hugging Face folder is as good an input. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from espalier import files
from espalier.errors import ModelError
from espalier.spec import ModelSpec
from espalier.untrusted import leads_outside, pickle_in, read_json, require_plain

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MADE = "made.json"
# Where ids of tokens with a meaning are stated, and how.
ID_CONFIGS = ("config.json", "generation_config.json")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk."""

    path: Path

    @classmethod
    def open(cls, path: Path | str) -> ModelFolder:
        """Check that `path` is a model folder that is safe and whole enough to load."""
        folder = cls(Path(path))
        if not (folder.path / "config.json").is_file():
            raise ModelError(
                str(path),
                found="no config.json" if folder.path.is_dir() else "no such folder",
                expected="a Hugging Face model folder",
                mend="Name a folder with config.json and model.safetensors, such as runs/NAME/final.",
            )
        _ = folder.config
        folder.weight_files()
        if (folder.path / files.MANIFEST).exists() and (damage := files.damage(folder.path) or folder._unrecorded()):
            raise ModelError(
                str(path),
                found=damage,
                expected="files as they were written",
                mend=f"Restore the folder from its source; without {files.MANIFEST} it is taken as it is.",
            )
        folder._require_own_tokenizer()
        folder._require_ids()
        return folder

    def _unrecorded(self) -> str | None:
        """A file that would change what is read or written, and that the manifest doesn't know, in a line."""
        known = files.recorded(self.path)
        added = [path.name for path in tokenizer_files(self.path) if path.name not in known]
        return f"{added[0]}, which {files.MANIFEST} doesn't have" if added else None

    def _require_own_tokenizer(self) -> None:
        """Refuse another tokenizer than the one that made.json says the model was trained with."""
        recorded, found = (self.made or {}).get("tokenizer"), self.tokenizer_fingerprint()
        if recorded and found and recorded != found:
            raise ModelError(
                str(self.path / "tokenizer.json"),
                found=f"another tokenizer than the model was trained with (sha256 {found[:12]})",
                expected=f"the one that its ids stand for (sha256 {recorded[:12]}, by {MADE})",
                mend="Restore tokenizer.json from where the folder came from.",
            )

    def _require_ids(self) -> None:
        """Refuse ids that the embedding has no row for: of the tokenizer, or of what begins, ends and fills texts.

        Rows that no id stands for are no harm: many models are padded so. Nor are special tokens without a row, such as
        an image's in the text part of a model that also sees, as long as nobody writes them; an id of -1 fills nothing.
        """
        rows = _rows(self.config)
        if rows is None:
            return
        for path in (self.path / name for name in ID_CONFIGS if (self.path / name).exists()):
            for key, number in _special_ids(read_json(path)):
                fills_nothing = key == "pad_token_id" and number == -1
                if not fills_nothing and (not isinstance(number, int) or not 0 <= number < rows):
                    raise ModelError(
                        f"{path}: {key}",
                        found=f"{number!r}, for which the embedding has no row",
                        expected=f"an id of its {rows} rows, from 0",
                        mend="Set it to what tokenizer.json calls that token, or to null if there is none.",
                    )
        ids = _id_count(self.path / "tokenizer.json")
        if ids > rows:
            raise ModelError(
                str(self.path / "tokenizer.json"),
                found=f"a tokenizer of {ids} ids and an embedding of {rows} rows: {rows} to {ids - 1} can't be used",
                expected="a row for every id",
                mend="Restore the tokenizer that the model was trained with, or resize the model where it was made, by "
                "resize_token_embeddings() and save_pretrained().",
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; `ModelError` if the folder asks for more than to be read, whether or not `open` saw it."""
        require_plain(self.path)
        return read_json(self.path / "config.json")

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return ModelSpec.from_config(self.config, where=str(self.path / "config.json"))

    @property
    def made(self) -> dict[str, Any] | None:
        """made.json, or None for a folder that Espalier didn't make."""
        path = self.path / MADE
        return read_json(path) if path.exists() else None

    def weight_files(self) -> list[Path]:
        """The safetensors files, in order; pickled weights and paths that leave the folder are refused."""
        names = _indexed(self.path / INDEX) if (self.path / INDEX).exists() else [WEIGHTS]
        if WEIGHTS not in names and (self.path / WEIGHTS).exists():
            raise ModelError(
                f"{self.path}/{WEIGHTS}",
                found=f"weights that {INDEX} leaves out, and that transformers would load instead of those in it",
                expected="one set of weights",
                mend="Delete the one that isn't meant.",
            )
        for name in names:
            if leads_outside(name) or not name.endswith(".safetensors") or not (self.path / name).is_file():
                pickled = pickle_in(self.path)
                raise ModelError(
                    f"{self.path}/{name}",
                    found=f"only {pickled}, a pickle that can run code" if pickled else "no such safetensors file",
                    expected="weights in safetensors inside the folder",
                    mend="Save the model again with save_pretrained() on the machine that made it.",
                )
        return [self.path / name for name in names]

    def fingerprint(self) -> str:
        """One digest of config and weights: the model's identity in a lineage."""
        known = files.recorded(self.path)  # `open` has compared the files with it
        paths = (self.path / "config.json", *self.weight_files())
        return files.digest([known.get(path.name) or files.sha256(path) for path in paths])

    def identity(self) -> list[Any]:
        """Names, sizes and times of the weight files, and the config: tells in no time whether the folder changed."""
        stats = [(path.name, path.stat()) for path in self.weight_files()]
        return [self.config, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]

    def tokenizer_fingerprint(self) -> str | None:
        """Digest of tokenizer.json, or None when the folder has no tokenizer."""
        path = self.path / "tokenizer.json"
        return files.sha256(path) if path.exists() else None

    def lineage(self) -> Iterator[dict[str, Any]]:
        """made.json of this model and then of its parents, as far as they are recorded."""
        made = self.made
        while made:
            yield made
            made = next((parent["made"] for parent in made.get("parents", []) if parent.get("made")), None)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that make its tokenizer, those that are there."""
    return [path for name in TOKENIZER_FILES if (path := folder / name).exists()]


def read_spec(path: Path) -> ModelSpec:
    """The shape that a config states: a JSON file, or the config.json of a folder, whose weights needn't be there."""
    file = path / "config.json" if path.is_dir() else path
    return ModelSpec.from_config(read_json(file), where=str(file))


def _rows(config: dict[str, Any]) -> int | None:
    """Rows of the embedding, where a config states them, maybe in the part of it that is about text."""
    text = config.get("text_config")
    rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return rows if isinstance(rows, int) else None


def _special_ids(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, id) of the tokens that a config gives a meaning to."""
    for key in SPECIAL_IDS:
        stated = config.get(key)
        yield from (
            (key, number) for number in (stated if isinstance(stated, list) else [stated]) if number is not None
        )


def _id_count(path: Path) -> int:
    """The largest id of a tokenizer.json that isn't a special token's, and one; 0 without the file."""
    if not path.exists():
        return 0
    told = read_json(path)
    model, added = told.get("model"), told.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary or ())))
    ids += [entry.get("id") for entry in added or () if isinstance(entry, dict)]
    special = {entry.get("id") for entry in added or () if isinstance(entry, dict) and entry.get("special")}
    return max((number for number in ids if isinstance(number, int) and number not in special), default=-1) + 1


def _indexed(path: Path) -> list[str]:
    """The files that an index of weights names."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(
            f"{path}: weight_map",
            found="no file names" if shards is None else repr(shards)[:80],
            expected="a file name for every tensor",
            mend="Restore the file.",
        )
    return sorted(set(shards.values()))
