"""Checkpoints: one folder, one step, whole or absent.

    checkpoint-N/                  a plain Hugging Face model folder
    checkpoint-N/trainer/          optimizer*.safetensors, random.safetensors, progress.json
    checkpoint-N/manifest.json     hashes of all of it, written last

Weights, optimizer, data cursor, random state and growth state are one unit with one step number. Nothing is pickled.

Several ranks write tensors that are whole, each its share of them: so any number of ranks can take the folder up, each
reading its parts by torch.distributed.checkpoint, and so can whoever opens a model. What is put together for that is a
copy, from which a thread can write while training goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as distributed_checkpoint
from transformers import PreTrainedModel

from espalier import files, watch
from espalier.errors import NumericsError, RunError, UserError
from espalier.folder import INDEX, ModelFolder
from espalier.model import build, shards
from espalier.model.shards import load_file
from espalier.train.device import Device
from espalier.train.guards import Guards
from espalier.train.optim import State
from espalier.train.parallel import ALONE, Parallel, empty, local, whole
from espalier.world import World

TRAINER = "trainer"
OPTIMIZER = "optimizer"
PROGRESS = f"{TRAINER}/progress.json"
SEPARATOR = "::"  # between a parameter's name and its quantity; neither contains it

When = Literal["at once", "beside"]
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a run is: optimizer steps, place in the stream of samples, tokens, model FLOPs, growth stage; and what
    its guards remember."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    stage: int = 0
    guards: Guards = field(default_factory=Guards)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Progress:
        return cls(**{**stored, "guards": Guards.from_json(stored["guards"])})

    @property
    def counts(self) -> dict[str, float]:
        """All of it but the guards."""
        return {name: value for name, value in vars(self).items() if name != "guards"}


@dataclass(frozen=True)
class Held:
    """Whole tensors in the host's memory, of all those that there are the ones that this rank writes.

    bytes  of all of them, by name
    """

    tensors: dict[str, Tensor]
    owners: dict[str, int]
    bytes: dict[str, int]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], parallel: Parallel, *, copies: bool) -> Held:
        """Put tensors together that ranks share; every rank has to call this, with the same names.

        copies  whether what this rank has whole anyway is copied
        """
        sizes = {name: value.numel() * value.element_size() for name, value in tensors.items()}
        owners = _shared_out(sizes, parallel.world.size)
        kept: dict[str, Tensor] = {}
        for name, value in tensors.items():
            together = whole(value.detach())
            if owners[name] == parallel.world.rank:
                kept[name] = together.to(
                    "cpu", copy=copies and together.data_ptr() == local(value).data_ptr()
                ).contiguous()
        return cls(kept, owners, sizes)

    def write(self, folder: Path, stem: str, world: World) -> dict[str, dict[str, Any]]:
        """Write this rank's file; what a manifest records of it, by its name. Nothing if nothing fell to it."""
        if not self.tensors:
            return {}
        name = _file_name(stem, world.rank, world.size)
        return {name: files.written(folder / name, shards.write_tensors(folder / name, self.tensors))}


def _shared_out(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank that writes each tensor: in turn the one with least to write."""
    load = [0] * ranks
    owners = {}
    for name, size in sizes.items():
        owners[name] = load.index(min(load))
        load[owners[name]] += size
    return owners


def _file_name(stem: str, rank: int, ranks: int) -> str:
    return f"{stem}.safetensors" if ranks == 1 else f"{stem}-{rank + 1:05}-of-{ranks:05}.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A state at rest, as far as this rank writes it."""

    model: PreTrainedModel
    weights: Held
    moments: Held
    random: Tensor
    progress: Progress

    @classmethod
    def of(
        cls, model: PreTrainedModel, optimizer_state: State, progress: Progress, parallel: Parallel, *, copies: bool
    ) -> Snapshot:
        flat = {
            f"{name}{SEPARATOR}{key}": value
            for name, quantities in optimizer_state.items()
            for key, value in quantities.items()
        }
        weights, moments = (
            Held.of(tensors, parallel, copies=copies) for tensors in (dict(model.named_parameters()), flat)
        )
        return cls(model, weights, moments, torch.get_rng_state(), progress)

    def write(self, folder: Path, tokenizer: Path | None, world: World) -> dict[str, dict[str, Any]]:
        """Write this rank's files; what the manifest is to record of them."""
        entries = _write_model(folder, self.model, self.weights, tokenizer, world)
        moments = self.moments.write(folder / TRAINER, OPTIMIZER, world)
        if world.leads:
            save_file({"torch": self.random}, folder / TRAINER / "random.safetensors")
            files.write_json(folder / PROGRESS, asdict(self.progress))
        return entries | {f"{TRAINER}/{name}": entry for name, entry in moments.items()}


def _write_model(
    folder: Path, model: PreTrainedModel, weights: Held, tokenizer: Path | None, world: World
) -> dict[str, dict[str, Any]]:
    """Write this rank's part of a model folder; what a manifest records of what is large."""
    if world.leads:
        build.save_config(model, folder, tokenizer)
    if world.leads and world.size > 1:
        names = {name: _file_name("model", rank, world.size) for name, rank in weights.owners.items()}
        index = {"metadata": {"total_size": sum(weights.bytes.values())}, "weight_map": names}
        files.write_json(folder / INDEX, index)
    return weights.write(folder, "model", world)


class Saver:
    """Writes checkpoints of a run and deletes what isn't kept; a context, at whose end nothing of it is at work.

    when   "at once", or "beside" the training, from a copy and by a thread: then a checkpoint is there a little later
    keep   how many of the newest stay, and of the others those whose step is a multiple of `every`
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        tokenizer: Path | None,
        keep: int,
        every: int | None = None,
        when: When = "at once",
        parallel: Parallel = ALONE,
    ) -> None:
        self.run_folder, self.tokenizer, self.keep, self.every = run_folder, tokenizer, keep, every
        self.when, self.parallel = when, parallel
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: tuple[int, Path, Future[dict[str, dict[str, Any]]]] | None = None
        self._need_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Finish what is being written, which is from before the error, unless other ranks may not come to do so."""
        if error is None:
            self.finish()
        elif isinstance(error, NumericsError) or (self.parallel.world.size == 1 and isinstance(error, Exception)):
            with contextlib.suppress(UserError, OSError):  # the first error matters more than a full disk
                self.finish()
        self._threads.shutdown(wait=self._under_way is None)

    def begin(self, model: PreTrainedModel, optimizer_state: State, progress: Progress, *, need_bytes: int) -> None:
        """Save a state: when this returns the state may change; `finish` returns when the checkpoint is there."""
        self.finish()
        world, path = self.parallel.world, self._path(progress.step)
        made = world.led(lambda: _new_folder(path, need_bytes))
        folder = Path(world.told(str(made)))
        beside = self.when == "beside"
        snapshot = Snapshot.of(model, optimizer_state, progress, self.parallel, copies=beside)
        write = partial(_with_disk_errors, path, need_bytes, lambda: snapshot.write(folder, self.tokenizer, world))
        if beside:
            self._under_way, self._need_bytes = (progress.step, folder, self._threads.submit(write)), need_bytes
        else:
            self._put_in_place(progress.step, folder, write)

    def poll(self) -> None:
        """Finish a checkpoint that all ranks have written; for a call after every step, on all ranks."""
        if self._under_way and not self.parallel.world.largest(not self._under_way[2].done())[0]:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and put it in its place."""
        if self._under_way is None:
            return
        (step, folder, future), self._under_way = self._under_way, None
        watch.beside(step, "saving", more=watch.moving(self._need_bytes))
        self._put_in_place(step, folder, future.result)

    def _put_in_place(self, step: int, folder: Path, written: Callable[[], dict[str, dict[str, Any]]]) -> None:
        """Give the folder its manifest and its name once every rank has `written`; nothing is left of it otherwise."""
        world = self.parallel.world
        try:
            entries = world.gathered(world.together(written))
            known = {name: entry for part in entries for name, entry in part.items()}
            world.led(lambda: self._commit(step, folder, known))
        except BaseException:
            if world.leads:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _commit(self, step: int, folder: Path, known: dict[str, dict[str, Any]]) -> None:
        with files.disk_errors(self._path(step)):
            files.put_in_place(self._path(step), folder, known)
            self._prune(step)

    def _prune(self, step: int) -> None:
        """Delete what isn't kept. Those of later steps go too: a run that saves an earlier step resumed there because
        they were damaged.
        """
        steps = list_steps(self.run_folder)
        past = [there for there in steps if there <= step]
        kept = past[: self.keep] + [there for there in past if self.every and there % self.every == 0]
        for there in set(steps).difference(kept):
            shutil.rmtree(self._path(there))

    def _path(self, step: int) -> Path:
        return self.run_folder / f"checkpoint-{step}"


def _new_folder(path: Path, need_bytes: int) -> str:
    folder = files.new_folder(path, need_bytes=need_bytes)
    with files.disk_errors(path, need_bytes):
        try:
            (folder / TRAINER).mkdir()
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return str(folder)


def _with_disk_errors(path: Path, need_bytes: int, write: Callable[[], T]) -> T:
    with files.disk_errors(path, need_bytes):
        return write()


def save_model(
    path: Path,
    model: PreTrainedModel,
    *,
    tokenizer: Path,
    need_bytes: int,
    also: Callable[[Path], None],
    parallel: Parallel = ALONE,
) -> None:
    """Write a model folder, whole or not at all, by all ranks; the leader adds what `also` writes into it."""
    world = parallel.world
    held = Held.of(dict(model.named_parameters()), parallel, copies=False)
    folder = Path(world.told(str(world.led(lambda: files.new_folder(path, need_bytes=need_bytes)))))

    def write() -> dict[str, Any]:
        entries = _write_model(folder, model, held, tokenizer, world)
        if world.leads:
            also(folder)
        return entries

    try:
        entries = world.gathered(world.together(lambda: _with_disk_errors(path, need_bytes, write)))
        known = {name: entry for part in entries for name, entry in part.items()}
        world.led(lambda: _with_disk_errors(path, need_bytes, lambda: files.put_in_place(path, folder, known)))
    except BaseException:
        if world.leads:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def list_steps(run_folder: Path) -> list[int]:
    """Steps of the checkpoints in a run folder, newest first."""
    names = [path.name.removeprefix("checkpoint-") for path in run_folder.glob("checkpoint-*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest(
    run_folder: Path, tell: Callable[[str], None], world: World | None = None, *, until: float = math.inf
) -> Path | None:
    """The newest checkpoint, no later than step `until`, that matches its manifest; says which ones it passed over.
    Ranks share the reading.

    None when there is none at all; `RunError` when there are some and every one is damaged.
    """
    world = world or World()
    passed_over: list[str] = []
    for step in (step for step in world.told(list_steps(run_folder)) if step <= until):
        path = run_folder / f"checkpoint-{step}"
        found = world.gathered(files.damage(path, part=world.rank, parts=world.size))
        damage = next((damage for damage in found if damage), None)
        if damage is None:
            if passed_over:
                tell(f"Ignored {'; '.join(passed_over)}. Using {path.name}.")
            return path
        passed_over.append(damage)
    if passed_over:
        raise RunError(
            str(run_folder),
            found=f"no checkpoint that is whole ({'; '.join(passed_over)})",
            expected="at least one",
            mend="Delete the damaged checkpoints to start again, or restore one.",
        )
    return None


def load(path: Path, device: Device, parallel: Parallel = ALONE) -> tuple[PreTrainedModel, State, Progress]:
    """The placed model, optimizer state and progress of a checkpoint; sets torch's random state."""
    torch.set_rng_state(load_file(path / TRAINER / "random.safetensors")["torch"])
    progress = _progress(path)
    if parallel.mesh is None:
        model = build.load(ModelFolder(path))
        device.place(model)
        flat = {key: value for file in _optimizer_files(path) for key, value in load_file(file).items()}
        return model, _by_parameter(flat), progress
    model = build.skeleton(ModelFolder(path).config)
    device.place(model, parallel)
    empty(model, device.kind)
    weights = dict(model.named_parameters())
    _read_parts(path, dict(weights))
    flat = {key: _like(weights[key.partition(SEPARATOR)[0]], shape) for key, shape in _shapes(path).items()}
    _read_parts(path / TRAINER, flat)
    return model, _by_parameter(flat), progress


def written_by(path: Path) -> int:
    """How many ranks wrote a checkpoint."""
    return max(len(_optimizer_files(path)), 1)


def _optimizer_files(path: Path) -> list[Path]:
    return sorted((path / TRAINER).glob(f"{OPTIMIZER}*.safetensors"))


def _shapes(path: Path) -> dict[str, torch.Size]:
    """Of every quantity of the optimizer, by its flat name, in one order."""
    shapes: dict[str, torch.Size] = {}
    for file in _optimizer_files(path):
        with safe_open(file, framework="pt") as stored:
            shapes |= {key: torch.Size(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    return dict(sorted(shapes.items()))


def _like(weight: Tensor, shape: torch.Size) -> Tensor:
    """What a quantity is read into: shared as its weight is, or a tensor of its own where it has another shape."""
    return torch.zeros_like(weight.detach()) if shape == weight.shape else torch.zeros(shape)


def _read_parts(folder: Path, into: dict[str, Tensor]) -> None:
    """Read this rank's parts of tensors from the safetensors files of a folder."""
    reader = distributed_checkpoint.HuggingFaceStorageReader(str(folder))
    parts = {name: tensor.detach() for name, tensor in into.items()}
    with warnings.catch_warnings():  # each reads what it needs for itself, which is what the warning is about
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        distributed_checkpoint.load(parts, storage_reader=reader, no_dist=True)


def _by_parameter(flat: Mapping[str, Tensor]) -> State:
    state: State = {}
    for flat_name, value in flat.items():
        name, _, key = flat_name.partition(SEPARATOR)
        state.setdefault(name, {})[key] = value
    return state


def pass_over(path: Path, guards: Guards, begin: int, end: int, world: World | None = None) -> Progress:
    """Make a checkpoint that is whole pass over samples [begin, end), and remember what `guards` do of rewinds; its
    progress.

    Those of later steps are deleted. One rank does it. What doesn't change isn't written again, where the disk can give
    a file two names.
    """
    world = world or World()
    progress = world.together(lambda: _progress(path))
    progress = replace(progress, guards=guards.back_to(progress.guards, begin, end))

    def rewrite() -> None:
        kept = json.loads((path / files.MANIFEST).read_text())["files"]
        del kept[PROGRESS]
        with files.whole_folder(path, known=kept) as folder:
            (folder / TRAINER).mkdir()
            for name in kept:
                _give_name(path / name, folder / name)
            files.write_json(folder / PROGRESS, asdict(progress))
        with files.disk_errors(path.parent):
            for step in list_steps(path.parent):
                if step > progress.step:
                    shutil.rmtree(path.parent / f"checkpoint-{step}")

    world.led(rewrite)
    return progress


def _give_name(file: Path, name: Path) -> None:
    """One more name for a file, or a copy where the disk has no such thing."""
    try:
        name.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, name)


def _progress(path: Path) -> Progress:
    return Progress.from_json(json.loads((path / PROGRESS).read_text()))
