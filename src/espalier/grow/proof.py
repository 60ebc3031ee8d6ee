"""Proof: what a growth promised, and what two model folders show of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from espalier.errors import ModelError
from espalier.folder import ModelFolder
from espalier.grow import preserve
from espalier.model import build
from espalier.model.growth import Growth
from espalier.report import Report

# How much rounding may change the largest logit, relatively, where a growth is exact: by the dtype of the weights.
ROUNDING = {torch.float32: preserve.EXACT, torch.float16: 2e-2, torch.bfloat16: 1e-1}
ROWS, LENGTH = 2, 32
SHOWN = 3


@dataclass(frozen=True)
class Proof:
    """What a growth did, on random tokens, in fp32.

    relative_difference      max |logit difference| / max |logit|
    allowed                  the most that rounding explains, for the dtype of the weights
    loss_before, loss_after  next-token cross-entropy in nats
    dead                     slots that no gradient reaches in three steps
    symmetric                roles whose copies move alike; None where it isn't known what copies what
    """

    relative_difference: float
    allowed: float
    loss_before: float
    loss_after: float
    dead: list[str]
    symmetric: list[str] | None

    @property
    def exact(self) -> bool:
        return self.relative_difference <= self.allowed

    def record(self) -> dict[str, Any]:
        """As JSON, for made.json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What people should read."""
        jump = self.loss_after - self.loss_before
        function = "the same function" if self.exact else "another function"
        dead = f"{', '.join(self.dead[:SHOWN])}{' ...' if len(self.dead) > SHOWN else ''}"
        lines = [
            f"{function}: logits differ by {self.relative_difference:.1e} of the largest, loss {jump:+.4f} nats",
            f"{len(self.dead)} slots that no gradient reaches: {dead}" if self.dead else "every slot learns",
        ]
        if self.symmetric is not None:
            lines.append(f"copies that stay alike: {', '.join(self.symmetric) or 'none'}")
        return lines

    def report(self, subject: str) -> Report:
        """As rows."""
        report = Report(subject)
        report.add("growth", "relative logit difference", self.relative_difference, n=ROWS * LENGTH)
        report.add("growth", "loss jump", self.loss_after - self.loss_before, n=ROWS * LENGTH, note="random tokens")
        report.add("growth", "dead slots", len(self.dead))
        if self.symmetric is not None:
            report.add("growth", "symmetric roles", len(self.symmetric), note=", ".join(self.symmetric))
        return report


def prove(before: ModelFolder, after: Path, growths: Sequence[Growth] = (), *, seed: int = 0) -> Proof:
    """Load both folders and compare them. `growths` tell which slots are copies of which."""
    old, new = build.load(before, dtype="auto"), build.load(ModelFolder(after), dtype="auto")
    allowed = ROUNDING.get(new.dtype, preserve.EXACT)
    old, new = old.float(), new.float()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, old.get_input_embeddings().num_embeddings, (ROWS, LENGTH), generator=generator)
    kept = preserve.check(old, new, ids)
    learned = preserve.learning(new, ids, growths)
    symmetric = list[str](learned.symmetric) if growths else None
    return Proof(kept.relative_difference, allowed, kept.loss_before, kept.loss_after, learned.dead, symmetric)


def require_promise(proof: Proof, *, exact: bool, where: str) -> None:
    """Refuse a growth that promised to keep the function and didn't, or that left slots that can't learn."""
    if exact and not proof.exact:
        raise ModelError(
            where,
            found=f"logits that differ by {proof.relative_difference:.1e} of the largest",
            expected=f"at most {proof.allowed:.0e}, since the growth promises the same function",
            mend="The model before the growth is intact. Use another operator, and report this model's config.",
        )
    if proof.dead:
        raise ModelError(
            where,
            found=f"{len(proof.dead)} slots that no gradient reaches, such as {proof.dead[0]}",
            expected="every slot to learn within three steps",
            mend="The model before the growth is intact. Use another operator, and report this model's config.",
        )
