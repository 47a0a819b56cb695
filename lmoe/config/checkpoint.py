"""What is saved to resume from."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """checkpoints/last.ckpt and best.ckpt of a run."""

    every_n_steps: int = 50
    """Optimizer steps between saves of last.ckpt. 0: only at the end."""
    keep_last: int = 2
    """How many checkpoints to keep beside best.ckpt: last.ckpt, and those before it as step-<n>.ckpt."""
    resume_from: str | None = None
    """With resume: name of a file in checkpoints/ to go on from, such as best.ckpt; null: last.ckpt."""
    save_base: bool = False
    """Also store the frozen base as a model directory, <run>/base/ (large)."""
