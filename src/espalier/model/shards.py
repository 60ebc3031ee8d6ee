"""Shards: a model folder's tensors, read and written one at a time, so that the model may be larger than memory.

The files are read, not mapped into memory: the pages of a map count as the process's own until the system takes
them back.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from espalier import files
from espalier.errors import ModelError
from espalier.files import Journal
from espalier.folder import INDEX, ModelFolder

SHARD_BYTES = 5_000_000_000
PIECE_BYTES = 2_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# As in safetensors: a header is a length of eight bytes and JSON, padded to a multiple of eight.
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
# What a torch tensor can have.
MAX_DIMENSIONS = 64
MAX_TENSOR_BYTES = 2**63


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def on_meta(self) -> Tensor:
        """A tensor of its shape and dtype that holds nothing."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Stored(Planned):
    """A tensor in a file, from the byte `start` on."""

    file: Path
    start: int

    def pieces(self, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
        """Its bytes, piece by piece in one buffer after the other."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            left = self.bytes
            while left:
                buffer = next(buffers)
                read = file.readinto(buffer[:left])
                if not read:
                    raise _damaged(self.file, self.name, "a file that became shorter while it was read")
                left -= read
                yield buffer[:read]


@dataclass(frozen=True)
class Weights:
    """The tensors of a model folder, read one at a time."""

    _stored: dict[str, Stored]

    @classmethod
    def open(cls, folder: ModelFolder) -> Weights:
        """Read the headers of the folder's weight files, and nothing else.

        Raises ModelError, which names the file and the tensor, unless they fit together and cover the files exactly.
        """
        stored: dict[str, Stored] = {}
        for tensor in chain.from_iterable(_read_header(file) for file in folder.weight_files()):
            if tensor.name in stored:
                raise _damaged(tensor.file, tensor.name, f"a tensor that {stored[tensor.name].file.name} has too")
            stored[tensor.name] = tensor
        _require_index(folder.path, stored)
        return cls(stored)

    @property
    def names(self) -> list[str]:
        """In the order of the files, and in each of the data."""
        return list(self._stored)

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(tensor.bytes for tensor in self._stored.values())

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(math.prod(tensor.shape) for tensor in self._stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def at(self, name: str) -> Stored:
        """Where the tensor is, for copying it unread."""
        return self._stored[name]

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory of its own. Raises ModelError if the file was cut since `open`."""
        stored = self._stored[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        with stored.file.open("rb") as file:
            file.seek(stored.start)
            if file.readinto(_bytes_of(tensor)) != stored.bytes:
                raise _damaged(stored.file, name, "a file that became shorter while it was read")
        return tensor


def load_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; `ModelError` unless its header describes it exactly."""
    _read_header(path)
    return safetensors.torch.load_file(path)


def write(
    folder: Path,
    planned: Sequence[Planned],
    make: Callable[[str], Tensor | Stored],
    *,
    shard_bytes: int = SHARD_BYTES,
    done: Journal | None = None,
) -> None:
    """Write the weights of a model folder, named and indexed as `save_pretrained` does.

    One tensor is being made while the one before is written and hashed: two are in memory.

    make         gives the planned tensor of a name, on any device and in any memory layout, or where it is stored
    shard_bytes  the most that a file holds; a larger tensor has its own
    done         finished shards are added, and those that it has aren't made again; its key must cover `planned`,
                 `shard_bytes` and all that `make` depends on
    """
    by_name = {tensor.name: tensor for tensor in planned}
    assert len(by_name) == len(planned), "a name is planned twice"
    on_meta = {tensor.name: tensor.on_meta() for tensor in planned}
    split = split_torch_state_dict_into_shards(on_meta, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        if done and file in done.finished:
            continue
        sha256 = _write_shard(folder / file, [by_name[name] for name in names], make)
        if done:
            done.add(file, sha256)
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        files.write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": weight_map})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors that are at hand, on the CPU, into one safetensors file; the hex digest of its bytes.

    They are hashed by a thread beside all of the writing, the flush to the disk among it.
    """
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header = _header(Planned(name, tuple(tensors[name].shape), tensors[name].dtype) for name in ordered)
    contents = [memoryview(header), *(_bytes_of(tensors[name].detach().contiguous()) for name in ordered)]
    sha256 = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as worker:
        hashed = worker.submit(_hash_all, sha256, contents)
        for content in contents:
            _write_all(file, content)
        os.fsync(file.fileno())
        hashed.result()
    return sha256.hexdigest()


def _hash_all(sha256: Any, contents: Sequence[memoryview]) -> None:
    for content in contents:
        sha256.update(content)


def _write_shard(path: Path, planned: list[Planned], make: Callable[[str], Tensor | Stored]) -> str:
    """Write one safetensors file; the hex digest of its bytes."""
    # Large elements first, as safetensors does: then each tensor starts at a multiple of its element's size.
    ordered = sorted(planned, key=lambda tensor: -tensor.dtype.itemsize)
    sha256 = hashlib.sha256()
    sha256.update(header := _header(ordered))
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(2) as workers:
        file.write(header)
        pending: list[Future] = []
        # A piece is read into one while the other is written and hashed. New ones would cost more than filling them.
        buffers = cycle([memoryview(bytearray(PIECE_BYTES)), memoryview(bytearray(PIECE_BYTES))])
        for tensor in ordered:
            for data in _made(tensor, make, buffers):  # made while what came before is written and hashed
                _wait(pending)
                pending = [workers.submit(_write_all, file, data), workers.submit(sha256.update, data)]
        _wait(pending)
    return sha256.hexdigest()


def _wait(pending: list[Future]) -> None:
    for work in pending:
        work.result()


def _write_all(file: FileIO, data: memoryview) -> None:
    start, size = file.tell(), len(data)
    while data:
        data = data[file.write(data) :]
    # The system begins to write to the disk now, beside the next piece, and not when the file is flushed.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)


def _made(
    planned: Planned, make: Callable[[str], Tensor | Stored], buffers: Iterator[memoryview]
) -> Iterator[memoryview]:
    """The bytes of a tensor, in one piece or several."""
    made = make(planned.name)
    found = (tuple(made.shape), made.dtype)
    assert found == (planned.shape, planned.dtype), f"{planned.name}: {found} was made, not as planned"
    if isinstance(made, Stored):
        return made.pieces(buffers)
    return iter([_bytes_of(made.detach().cpu().contiguous())])


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _header(planned: Iterable[Planned]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in planned:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _read_header(path: Path) -> list[Stored]:
    """The tensors of a safetensors file in the order of their data; ModelError unless they fill it exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        data_start = LENGTH_BYTES + length
        if data_start > size or length > MAX_HEADER_BYTES:
            raise _damaged(path, "header", f"{length} bytes announced in a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise _damaged(path, "header", "something that isn't JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "header", f"a {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = [_checked(path, data_start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.bytes))
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            found = "data of another tensor" if tensor.start < end else "unused bytes"
            raise _damaged(path, tensor.name, f"{found} at its start")
        end += tensor.bytes
    if end != size:
        raise _damaged(path, tensors[-1].name if tensors else "header", f"{size - end} bytes after the last tensor")
    return tensors


def _checked(path: Path, data_start: int, name: str, entry: Any) -> Stored:
    """A header's entry, checked by itself."""
    if not name.isprintable():
        raise _damaged(path, ascii(name), "a name that can't be printed")
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            raise _damaged(path, name, f"{entry!r:.80}")
    if dtype not in DTYPES:
        raise _damaged(path, name, f"dtype {dtype!r:.80}", f"one of {', '.join(DTYPES)}")
    if not _is_shape(shape):
        raise _damaged(path, name, f"shape {shape!r:.80}")
    stored = Stored(name, tuple(shape), DTYPES[dtype], path, data_start + start)
    if start < 0 or end - start != stored.bytes:
        raise _damaged(path, name, f"data from {start} to {end}", f"the {stored.bytes} bytes of {dtype} {shape!r:.80}")
    return stored


def _is_shape(sizes: list[Any]) -> bool:
    """Whether torch can hold a tensor of these sizes."""
    plain = len(sizes) <= MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in sizes)
    return plain and math.prod(max(size, 1) for size in sizes) * torch.complex64.itemsize < MAX_TENSOR_BYTES


def _require_index(folder: Path, stored: dict[str, Stored]) -> None:
    """Refuse an index that doesn't say where the tensors are."""
    if not (folder / INDEX).exists():
        return
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    for name in [*weight_map, *stored]:
        indexed = folder / weight_map[name] if name in weight_map else None
        there = stored[name].file if name in stored else None
        if indexed != there:
            said, held = (file.name if file else "no file" for file in (indexed, there))
            raise _damaged(folder / INDEX, name, f"{said} in the index", f"{held}, which has it")


def _damaged(
    file: Path, name: str, found: str, expected: str = "a safetensors header that describes its file exactly"
) -> ModelError:
    return ModelError(f"{file}: {name}", found=found, expected=expected, mend="Restore the file from its source.")
