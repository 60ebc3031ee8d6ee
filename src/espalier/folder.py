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
        if (folder.path / files.MANIFEST).exists() and (damage := files.damage(folder.path)):
            raise ModelError(
                str(path),
                found=damage,
                expected="files as they were written",
                mend=f"Restore the folder from its source; without {files.MANIFEST} it is taken as it is.",
            )
        folder._require_own_tokenizer()
        return folder

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


def read_spec(path: Path) -> ModelSpec:
    """The shape that a config states: a JSON file, or the config.json of a folder, whose weights needn't be there."""
    file = path / "config.json" if path.is_dir() else path
    return ModelSpec.from_config(read_json(file), where=str(file))


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
