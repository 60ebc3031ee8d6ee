"""Rows: how many tokens a fine-tuning dataset has under a model's tokenizer, counted and not guessed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.dataset import CARD, KINDS, Dataset, kind_of
from espalier.errors import DataError, ModelError
from espalier.template import Template
from espalier.untrusted import MAX_ROW_BYTES, json_object, lines, load_tokenizer

TAUGHT = ("text", "messages", "prompt_completion")  # the kinds of row that supervised fine-tuning takes
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Counted:
    """Rows of a dataset, their tokens once those beyond a length are cut, and how many rows were cut."""

    rows: int
    tokens: int
    cut: int = 0


def count(data: Path, tokenizer: Path, sequence_length: int) -> Counted:
    """Count a JSONL or Parquet file, or the train split of a dataset folder, with the tokenizer of a model folder.

    Texts, and prompts with their completions, end with an end-of-sequence token; messages are written by the model's
    chat template. `DataError` for rows that can't be taken, or none.
    """
    lengths = [min(length, sequence_length + 1) for length in _lengths(data, tokenizer)]
    if not lengths:
        raise DataError(
            str(data),
            found="no rows",
            expected="at least one",
            mend="Name a file with rows, or state rows= and tokens=.",
        )
    return Counted(
        len(lengths), sum(min(n, sequence_length) for n in lengths), sum(n > sequence_length for n in lengths)
    )


def _lengths(data: Path, tokenizer: Path) -> Iterator[int]:
    """Tokens of each row."""
    encode, chat = _encoder(tokenizer), None
    with contextlib.ExitStack() as stack:
        for where, row in _rows(data):
            kind = kind_of(row)
            if kind not in TAUGHT:
                raise DataError(
                    where,
                    found=f"the columns {', '.join(row) or 'of nothing'}",
                    expected="text, messages, or prompt and completion",
                    mend="Rename the columns; preferences are for another method than fine-tuning on what is written.",
                )
            values = [row[column] for column in KINDS[kind]]
            if kind == "messages":
                chat = chat or stack.enter_context(_chat(tokenizer))
                yield chat(values[0], where)
            elif all(isinstance(value, str) for value in values):
                yield encode("".join(values)) + 1
            else:
                raise DataError(where, found="a value that is no string", expected="text", mend="Correct the row.")


def _rows(data: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a file, in order."""
    path = Dataset.open(data).split_file("train") if (data / CARD).is_file() else data
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise DataError(
            str(data),
            found=f"a {path.suffix or 'folder or name'} that isn't read" if path.exists() else "no such file",
            expected=f"a file of rows ({', '.join(SUFFIXES)}) or a dataset folder",
            mend="Name such a file, or state rows= and tokens=.",
        )
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    for number, line in enumerate(lines(path), start=1):
        where = f"{path}:{number}"
        if line is None or not line.isspace():
            yield where, _object(line, where)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        groups = range(file.metadata.num_row_groups)
        for batch in (batch for group in groups for batch in file.iter_batches(256, row_groups=[group])):
            for row in batch.to_pylist():
                yield f"{path}: row {number}", row
                number += 1
    except (ArrowException, OSError) as error:
        raise DataError(
            str(path),
            found=f"damaged Parquet ({' '.join(str(error).split())[:200]}): {number} rows could be read",
            expected="a whole file",
            mend="Restore the file.",
        ) from None


def _object(line: bytearray | None, where: str) -> dict[str, Any]:
    try:
        if line is None:
            raise ValueError(f"longer than {MAX_ROW_BYTES // 2**20} MiB")
        return json_object(line)
    except ValueError as error:
        raise DataError(
            where, found=f"what can't be read ({error})", expected="a JSON object", mend="Correct the line."
        ) from None


def _encoder(folder: Path) -> Callable[[str], int]:
    """A function from text to its number of tokens."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(
            str(folder / "tokenizer.json"),
            found=f"a file that can't be read ({error})",
            expected="the model's tokenizer",
            mend="Put the tokenizer beside the weights, or state rows= and tokens=.",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@contextlib.contextmanager
def _chat(folder: Path) -> Iterator[Callable[[Any, str], int]]:
    """A function from messages (and where they are) to the number of tokens that the chat template makes of them."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise ModelError(
            str(folder),
            found="a tokenizer without a chat template, and rows of messages",
            expected="chat_template.jinja in the model folder",
            mend="Add the template, or give the rows as prompt and completion.",
        )

    def length(messages: Any, where: str) -> int:
        try:
            text = template.write(messages, prompt=False)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{where}: messages",
                found=str(error),
                expected="a list of role and content",
                mend="Correct the row.",
            ) from None
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    with contextlib.closing(Template(tokenizer, folder)) as template:
        yield length
