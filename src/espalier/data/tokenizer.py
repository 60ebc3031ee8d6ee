"""Tokenizer: byte-level BPE, trained on a dataset or taken from a folder, in the files that transformers opens.

Every text has tokens and every token stands for bytes, so any text comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from espalier import files
from espalier.dataset import Dataset
from espalier.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Merges settle long before this much text; more would only cost time.
SAMPLE_BYTES = 20_000_000
MAX_IDS = 10_000_000  # some ten times what the largest vocabularies have


def choose(given: str | None, dataset: Dataset, vocab_size: int, *, home: Path, tell: Callable[[str], None]) -> Path:
    """The folder of the `given` tokenizer, checked, or of one that is trained on the dataset."""
    if given is None:
        return train(dataset, vocab_size, home=home, tell=tell)
    path = Path(given).expanduser()
    check(path)
    return path


def train(dataset: Dataset, vocab_size: int, *, home: Path, tell: Callable[[str], None]) -> Path:
    """The folder of a tokenizer with at most `vocab_size` ids, trained on the dataset's train split.

    Id 0 is <|endoftext|>, ids 1 to 256 are the bytes. Made once for a dataset and size; the same on every machine.
    """
    path = home / "tokenizers" / files.digest([dataset.fingerprint(), vocab_size])[:16]
    if path.exists():
        damage = files.damage(path)
        if damage is None:
            return path
        tell(f"The cached tokenizer is damaged ({damage}); training it again.")
    tell(f"Training a tokenizer of {vocab_size} ids.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(dataset), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        tell(f"The text gave only {tokenizer.get_vocab_size()} of {vocab_size} ids.")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    with files.whole_folder(path) as folder:
        files.write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
        files.write_json(folder / "tokenizer_config.json", config)
    return path


def load(path: Path) -> Tokenizer:
    """The tokenizer of a folder, without transformers; it neither cuts nor pads."""
    file = path / "tokenizer.json"
    text = _text(file)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise _unreadable(file, str(error)) from None
    if (ids := id_count(tokenizer)) > MAX_IDS:
        raise _unreadable(file, f"an id of {ids - 1:,}, to which arrays and the library would count")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check(path: Path) -> None:
    """Refuse a tokenizer that isn't byte-level BPE or has no end-of-sequence token."""
    tokenizer = load(path)
    vocabulary = tokenizer.get_vocab()
    byte_level = "ByteLevel" in _types(json.loads(tokenizer.to_str())["pre_tokenizer"])
    missing = [character for character in pre_tokenizers.ByteLevel.alphabet() if character not in vocabulary]
    if not isinstance(tokenizer.model, models.BPE) or not byte_level or missing:
        raise DataError(
            str(path),
            found=f"{len(missing)} bytes without a token" if byte_level and missing else "no byte-level BPE",
            expected="a byte-level BPE tokenizer, such as GPT-2's, Llama 3's or Qwen's",
            mend="Name another tokenizer, or leave it out to train one.",
        )
    eos_id(path)


def eos_id(path: Path) -> int:
    """The id of the token that ends a document."""
    where = path / "tokenizer_config.json"
    try:
        token = json.loads(_text(where)).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise _unreadable(where, str(error)) from None
    content = token.get("content") if isinstance(token, dict) else token
    found = load(path).token_to_id(content) if isinstance(content, str) else None
    if found is None:
        raise DataError(
            f"{where}: eos_token",
            found=repr(content),
            expected="a token of the vocabulary that ends a document",
            mend="State eos_token in tokenizer_config.json.",
        )
    return found


def id_count(tokenizer: Tokenizer) -> int:
    """How many rows an embedding needs: the largest id and one. Ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each id stands for, int64 [ids]; 0 for special tokens and unused ids."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(id_count(tokenizer), dtype=np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # a byte-level token has one character a byte
    for number, added in tokenizer.get_added_tokens_decoder().items():
        lengths[number] = 0 if added.special else len(added.content.encode())
    return lengths


def fingerprint(path: Path) -> str:
    """Digest of tokenizer.json: the same as the `tokenizer_fingerprint` of a model folder that has it."""
    return files.sha256(path / "tokenizer.json")


def _sample(dataset: Dataset) -> Iterator[str]:
    """Documents of the train split, evenly spread, of about SAMPLE_BYTES in all."""
    share = min(1.0, SAMPLE_BYTES / dataset.bytes["train"])
    seen = taken = 0
    for text in dataset.texts("train"):
        size = len(text.encode())
        seen += size
        if taken + size <= seen * share:
            taken += size
            yield text


def _types(node: Any) -> set[str]:
    """The `type` of a component of tokenizer.json and of those inside it."""
    if isinstance(node, list):
        return set().union(*map(_types, node))
    if not isinstance(node, dict):
        return set()
    return {str(node.get("type"))}.union(*map(_types, node.values()))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or "bytes that aren't UTF-8") from None


def _unreadable(path: Path, why: str) -> DataError:
    return DataError(
        str(path),
        found=f"a file that can't be read ({why})",
        expected="a file of a tokenizer or model folder",
        mend="Name a folder with a whole tokenizer.json and tokenizer_config.json.",
    )


def first_difference(one: Path, other: Path) -> int | None:
    """The lowest id that stands for different tokens in two tokenizer.json; None where all stand for the same."""
    by_id = [{number: token for token, number in _parsed(path).items()} for path in (one, other)]
    ids = sorted(by_id[0].keys() | by_id[1].keys())
    return next((number for number in ids if by_id[0].get(number) != by_id[1].get(number)), None)


def _parsed(path: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
