"""Untrusted: what files that others made may not do here, whatever the library that reads them would let them do.

A model folder, a tokenizer, a row are data. They may not run code, fetch code, point at other files than those that
were checked, or take unbounded memory to be read. Whatever would is refused by name, with the way around it.
Nothing here imports torch; transformers is imported where a tokenizer is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Configs are kilobytes; the largest, with every added token, some megabytes.
MAX_JSON_BYTES = 64 * 2**20

# A longer line of a file of rows isn't read: what is done with it takes some times its bytes.
MAX_ROW_BYTES = 16 * 2**20
PIECE = 64 * 2**10

# What transformers reads beside the weights, if it is there.
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
TOKENS = ("special_tokens_map.json", "added_tokens.json")

RUN_CODE = "a request to run the folder's own code"
OTHER_FILE = "another file to be read in its place"
# Keys that no config may have, at whatever depth: what each would do, and the way around it.
REFUSED = {
    "auto_map": (RUN_CODE, "Espalier never runs code from a model folder; use a native class."),
    "custom_pipelines": (RUN_CODE, "Remove the key; Espalier has no use for it."),
    "configuration_files": (OTHER_FILE, "Remove the key, and put into config.json what it should say."),
    "fast_tokenizer_files": (OTHER_FILE, "Remove the key, and call the file that it means tokenizer.json."),
    "transformers_weights": (OTHER_FILE, "Remove the key, and call the weights model.safetensors."),
    "quantization_config": (
        "quantized weights, for which further packages and kernels would be loaded",
        "Load it where it was made, call dequantize(), and save it with save_pretrained().",
    ),
}
# attn_implementation and its relatives name a function of transformers, or a repository to fetch compiled code from.
KERNEL = re.compile(r"\w*_implementation\w*|kernel_config")

# Files that transformers takes weights from although no index names them.
SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
ADAPTER = "adapter_config.json"
# Formats in which a file is a program for Python's unpickler.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def require_plain(folder: Path) -> None:
    """Refuse a model or tokenizer folder that asks for more than to be read; `ModelError` with file and key."""
    for name in CONFIGS:
        if (folder / name).exists():
            _require_plain_config(read_json(folder / name), folder / name)
    for name in TOKENS:
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / ADAPTER).exists():
        raise ModelError(
            str(folder / ADAPTER),
            found="an adapter, which would change the weights or be left out",
            expected="a model's own weights and nothing over them",
            mend="Merge it where it was trained, with merge_and_unload(), and save the model with save_pretrained().",
        )
    for path in sorted(folder.glob("shard-*.safetensors")):
        if SHARD.fullmatch(path.name):
            raise ModelError(
                str(path),
                found="a shard of a distributed checkpoint, which would be loaded instead of the model's weights",
                expected="model.safetensors, or the files of its index",
                mend="Save the model again with save_pretrained(), or delete the file.",
            )


def pickle_in(folder: Path) -> str | None:
    """The name of a file of the folder that only an unpickler could read, if there is one."""
    return next(iter(sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)), None)


def leads_outside(name: str) -> bool:
    """Whether a name that a file states leads out of its folder. Links are the user's own, as in the Hub's cache."""
    return Path(name).is_absolute() or ".." in Path(name).parts


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder; `ModelError` when it isn't one."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES // 2**20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            str(path), found=f"a file that can't be read ({error})", expected="JSON", mend="Restore the file."
        ) from None
    if not isinstance(value, dict):
        raise ModelError(
            str(path), found=f"a {type(value).__name__}", expected="a JSON object", mend="Restore the file."
        )
    return value


def lines(path: Path, most: int = MAX_ROW_BYTES) -> Iterator[bytearray | None]:
    """A file's lines with their ends, parted at newline bytes alone; None for one of more than `most` bytes.

    Lines are read in pieces, and of one that is too long the rest is let go of: no more than `most` is ever held.
    """
    with path.open("rb") as file:
        while piece := file.readline(PIECE):
            line = bytearray(piece)
            while not piece.endswith(b"\n") and (piece := file.readline(PIECE)):
                if len(line) <= most:
                    line += piece
            yield line if len(line) <= most else None


def json_object(line: bytes | bytearray) -> dict[str, Any]:
    """The row that a line holds; `ValueError` says in a few words why it holds none.

    A key that is stated twice makes it none: which of both is meant can't be told.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_each_once)
    except UnicodeDecodeError:
        raise  # a ValueError, with the place
    except _StatedTwice:
        raise ValueError("a key twice") from None
    except (ValueError, RecursionError):
        raise ValueError("malformed JSON") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer as transformers has it, for its chat template; it neither runs nor fetches anything.

    `ModelError` for a folder that asks for it. What else is wrong is raised as the library raises it.
    """
    from transformers import AutoTokenizer

    require_plain(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


class _StatedTwice(Exception):
    """A key of a JSON object comes twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _StatedTwice
    return values


def _require_plain_config(config: dict[str, Any], path: Path) -> None:
    for key, value in _entries(config):
        name = key.rpartition(".")[2]
        if name in REFUSED and value is not None:
            found, mend = REFUSED[name]
        elif KERNEL.fullmatch(name) and "/" in str(value):
            found, mend = "code to be fetched from the Hub and run", "Remove the key, or set it to sdpa or eager."
        else:
            continue
        if name == "auto_map" and (native := _native(config)):
            mend = f"transformers has {native}, a class of its own for this model: remove auto_map from the file."
        raise ModelError(f"{path}: {key}", found=found, expected="a model class of transformers", mend=mend)


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is inside a config. A loop, since how deep that is the file decides."""
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        place, value = waiting.pop()
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        inner = [(f"{place}.{key}" if place else str(key), entry) for key, entry in items]
        yield from inner
        waiting += inner


def _native(config: dict[str, Any]) -> str | None:
    """The causal LM that transformers itself has for a config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    kind = config.get("model_type")
    return NAMES.get(kind) if isinstance(kind, str) else None
