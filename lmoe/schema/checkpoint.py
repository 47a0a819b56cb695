"""What is saved to resume from."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """checkpoints/last.ckpt and best.ckpt of a run."""

    every_n_steps: int = 50
    """Optimizer steps between saves of last.ckpt. 0: only at the end."""
    save_base: bool = False
    """Also store the frozen base as a model directory, <run>/base/ (large)."""
