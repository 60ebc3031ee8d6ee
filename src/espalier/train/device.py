"""Where and how the arithmetic runs, decided once per run and kept in its plan: a resumed run does the same.

Applied to a model from outside, in this order: device, attention, float8, tensor parallel, recompute, compile, shards.
Products are changed and split before layers are wrapped; what is compiled is one layer's pass, recomputation included;
weights are gathered and gradients sent around it, so that neither breaks a graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from espalier import files
from espalier.data.stream import Batch
from espalier.errors import ResourceError
from espalier.model import build
from espalier.model.mup import Parametrization
from espalier.spec import ModelSpec
from espalier.train import attention  # noqa: F401 (registers causal_halves)
from espalier.train.parallel import ALONE, Parallel, materialise

Attention = Literal["sdpa", "eager", "causal_halves"]
Compute = Literal["float8", "bfloat16", "float32"]
F = TypeVar("F", bound=Callable[..., Any])

# Compiled kernels are kept for the next run; torch's own place for them doesn't outlive a restart.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.home() / "inductor"))
# How many graphs one layer class may have: a few for every width that a run grows through.
GRAPHS = 64


# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_memory() -> None:
    """Keep what large tensors free for those to come, where the C library is glibc.

    Otherwise each comes from the system and goes back to it, and its pages are cleared anew at every step: a tenth of
    the time of a step on the CPU.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)


@dataclass(frozen=True)
class Device:
    """Where and how the arithmetic runs.

    threads    of the CPU
    compute    dtype of the matmuls; weights stay fp32. float8 is of the layers' products alone, through torchao; what
               else autocast covers is bfloat16 then
    compile    whether layers are compiled
    accumulate how gradients of micro-batches are added: in "pairs", so that any number of ranks adds them alike, or
               one by one in a "running" sum, which holds less
    recompute  whether layers keep their input alone and are computed again in the backward pass
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    compute: Compute = "float32"
    compile: Literal["layers", "off"] = "off"
    attention: Attention = "sdpa"
    recompute: Literal["none", "layers"] = "none"
    accumulate: Literal["pairs", "running"] = "pairs"

    def prepare(self) -> None:
        """Set what holds for the whole process: the threads, and that freed memory is kept."""
        torch.set_num_threads(self.threads)
        keep_memory()

    def place(self, model: PreTrainedModel, parallel: Parallel = ALONE) -> None:
        """Move a model here, unless it has no weights yet, and prepare its layers.

        Layers are compiled one by one: they share one graph, so a deeper model compiles no longer than a shallow
        one and a growth in depth compiles nothing. Recomputation is inside what is compiled, so that the compiler
        sees both passes. transformers' own switch for it does nothing in eval mode, which loaded models are in.
        """
        if model.device.type != "meta":
            model.to(self.kind)
        model.set_attn_implementation(self.attention)
        if self.compute == "float8":
            _in_float8(model, self.kind)
        parallel.divide(model)
        if self.recompute == "layers":
            for layer in model.base_model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if self.compile == "layers":
            torch._dynamo.config.recompile_limit = GRAPHS
            for layer in model.base_model.layers:
                layer.forward = self.compiled(layer.forward)
        parallel.spread(model)

    def compiled(self, function: F) -> F:
        """The function, compiled where layers are."""
        return torch.compile(function, dynamic=False) if self.compile == "layers" else function  # type: ignore[return-value]

    def release(self, model: PreTrainedModel) -> None:
        """Undo recomputation and compilation, for what isn't training and for inputs of other shapes."""
        for layer in model.base_model.layers:
            vars(layer).pop("forward", None)

    @contextlib.contextmanager
    def unrounded(self, *models: PreTrainedModel) -> Iterator[None]:
        """The context in which models that are placed multiply their weights as they are kept, not in float8."""
        modules = (module for model in models for module in model.modules()) if self.compute == "float8" else ()
        coarse = [module for module in modules if isinstance(module, nn.Linear) and type(module) is not nn.Linear]
        for module in coarse:
            module.forward = partial(nn.Linear.forward, module)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for module in coarse:
                del module.forward

    def tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """input_ids, labels and position_ids (or None) of a batch, here."""
        positions = batch.position_ids
        return (
            torch.from_numpy(batch.input_ids).to(self.kind),
            torch.from_numpy(batch.labels).to(self.kind),
            None if positions is None else torch.from_numpy(positions).to(self.kind),
        )

    def evaluation(self) -> contextlib.AbstractContextManager:
        """The context for forward passes without backward ones.

        Compiled layers keep their training graph: one of its own for inference would take seconds to compile.
        """
        return contextlib.nullcontext() if self.compile == "layers" else torch.no_grad()

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which forward passes run."""
        dtype = torch.float32 if self.compute == "float32" else torch.bfloat16
        return torch.autocast(self.kind, dtype=dtype, enabled=self.compute != "float32")


def _in_float8(model: PreTrainedModel, kind: str) -> None:
    """Make the layers' products in float8, scaled tensor by tensor (arXiv 2209.05433); the CPU emulates them."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise ResourceError(
            "train.fp8",
            found="no torchao",
            expected="the package, whose kernels these are",
            mend="Install it with: pip install 'espalier[fp8]'.",
        ) from None
    for layer in model.base_model.layers:
        convert_to_float8_training(layer, config=Float8LinearConfig(emulate=kind == "cpu"))


def initial_model(
    spec: ModelSpec,
    parametrization: Parametrization,
    device: Device,
    parallel: Parallel = ALONE,
    *,
    seed: int,
    eos_token_id: int = 0,
) -> PreTrainedModel:
    """A new model of this shape, placed; of one that ranks share none holds more than its part."""
    if parallel.mesh is None:
        model = build.build(spec, parametrization, seed=seed, eos_token_id=eos_token_id)
        device.place(model)
        return model
    model = build.skeleton(build.new_config(spec, eos_token_id))
    initial = build.initial_values(model, spec, parametrization, seed)
    device.place(model, parallel)
    materialise(model, device.kind, initial)
    return model
