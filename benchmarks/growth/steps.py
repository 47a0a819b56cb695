"""Training steps of one micro-batch, as a run makes them, while one size grows."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.gpu_parts.composing import composed
from benchmarks.growth.rows import LONGEST, write_base, write_rows
from benchmarks.growth.watch import Now
from benchmarks.timing import Laps
from lmoe.injection.record import mixtures
from lmoe.run.parts import build_parts

PARTS = ("step",)
HIDDEN = 128
COMMON = (
    "logger=none",
    "phase=joint",
    "trainer.precision=32-true",
    "data.packing=false",
    "data.val_fraction=0.02",
    "optim.warmup_steps=1",
)


@dataclass(slots=True, frozen=True, kw_only=True)
class Size:
    """One point of a series.

    Args:
        experts, rank, top_k: of the mixture.
        tokens: B sequences of T.
        layers: of the base.
        backend: of the experts.
    """

    experts: int = 8
    rank: int = 4
    top_k: int = 2
    tokens: tuple[int, int] = (4, 128)
    layers: int = 2
    backend: str = "auto"


def series(most_tokens: int) -> dict[str, tuple[str, dict[int, Size]]]:
    """What grows -> the rest of the job in words, and the points.

    Args:
        most_tokens: of a step, where sequences grow.
    """
    lengths = [length for length in (256, 1024, 4096, 8192) if length <= most_tokens]
    return {
        "experts E": (
            "top_k 2, rank 4, 2,048 tokens",
            {e: Size(experts=e, tokens=(4, 512)) for e in (4, 16, 64, 256)},
        ),
        "experts E, stacked": (
            "the same with moe.backend=stacked",
            {e: Size(experts=e, tokens=(4, 512), backend="stacked") for e in (4, 16, 64, 256)},
        ),
        "rank r": ("8 experts, top_k 2, 512 tokens", {r: Size(rank=r) for r in (4, 16, 64)}),
        "top_k": ("16 experts, rank 4, 512 tokens", {k: Size(experts=16, top_k=k) for k in (1, 2, 4, 8)}),
        "sequence length, as many tokens": (
            f"{most_tokens:,} tokens in sequences of this length",
            {t: Size(tokens=(most_tokens // t, t)) for t in lengths},
        ),
        "sequence length, one sequence": (
            "one sequence of this length, so as many tokens",
            {t: Size(tokens=(1, t)) for t in lengths},
        ),
        "layers": ("8 experts, top_k 2, rank 4, 512 tokens", {n: Size(layers=n) for n in (2, 4, 8, 16)}),
    }


class Step:
    """One training step of a run's module: losses, statistics, backward, AdamW, the end of the window."""

    def __init__(self, size: Size, folder: Path, now: Now) -> None:
        self.now = now
        base, rows = folder / f"base-{size.layers}", folder / "rows.jsonl"
        if not base.exists():
            write_base(base, hidden=HIDDEN, layers=size.layers)
        if not rows.exists():
            write_rows(rows, 40, words=LONGEST)
        batch, length = size.tokens
        overrides = [
            *COMMON,
            f"backbone.model_name={base}",
            f"data.path={rows}",
            f"data.cache_dir={folder / 'cache'}",
            f"data.max_length={length}",
            f"data.batch_size={batch}",
            f"injection.num_experts={size.experts}",
            "moe=top_k",
            f"injection.lora_r={size.rank}",
            f"injection.top_k={size.top_k}",
            f"moe.backend={size.backend}",
        ]
        parts = build_parts(composed(overrides))
        self.module = parts.module
        trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, world_size=1)
        self.module.trainer = trainer  # type: ignore[assignment]
        with torch.no_grad():
            for _, site in mixtures(parts.model):
                torch.nn.init.normal_(site.lora_B, std=0.01)
        self.optimizer = self.module.configure_optimizers()["optimizer"]
        self.batch = next(iter(parts.datamodule.train_dataloader()))
        assert self.batch["valid_mask"].sum() == batch * length

    def __call__(self) -> Laps:
        """Returns the milliseconds of one."""
        begun = self.now()
        self.module.training_step(self.batch, 0).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.close_window(skipped=False)
        return (1000 * (self.now() - begun),)
