"""The loop: steps, devices, precision."""

from dataclasses import dataclass

from lmoe.vocabulary import Accelerator, NonFinite, Strategy

MOST_DIGITS = 6
"""Of days, hours, minutes and seconds each."""
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(slots=True, kw_only=True)
class TrainerConfig:
    """Lightning's Trainer, as far as a run needs it."""

    accelerator: Accelerator = Accelerator.auto
    """auto: a CUDA GPU where torch sees one, else the CPU; cpu; gpu."""
    devices: int = 1
    """Devices on each node, with a process for each; strategy=device_map has one process for all."""
    device_ids: list[int] | None = None
    """Numbers of the GPUs to use, from 0, as many as devices: [1] is the second. null: the first ones."""
    num_nodes: int = 1
    """Machines."""
    strategy: Strategy = Strategy.auto
    """auto: one process; ddp: the whole model in each; fsdp2: the frozen backbone sharded, adapters whole in each;
    device_map: one process, whose layers lie on all devices, of which one computes at a time. (deepspeed is refused,
    with the reason.)"""
    precision: str = "bf16-mixed"
    """32-true, bf16-mixed or 16-mixed: the autocast type. Adapters and routers stay float32."""
    max_steps: int = 150
    """Length of the run in optimizer steps."""
    max_epochs: float | None = None
    """Length of the run in passes over the training rows, in place of max_steps, which is then worked out once the rows
    are read, rounded up, and recorded; 0.5 is half a pass. null: max_steps."""
    accumulate_grad_batches: int = 1
    """Micro-batches in one optimizer step."""
    val_every_n_steps: int = 50
    """Optimizer steps between validations; clipped to the phase. 0: only before and after."""
    log_every_n_steps: int = 1
    """Optimizer steps between rows of training metrics."""
    gradient_clip_val: float = 1.0
    """Largest norm of all gradients together; 0: no clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time. Not in pretrain."""
    deterministic: bool = True
    """Deterministic kernels: the same seed gives bitwise the same adapters on the same CPU. On a GPU PyTorch warns of
    each kernel that has no deterministic form, and takes it all the same."""
    compile: bool = False
    """Compile with torch.compile, which needs a C++ compiler: a slow start, then faster steps. A training compiles its
    decoder layers, once in each phase; pretrain the whole model. Not for int8 and nf4."""
    stop_on_collapse: bool = False
    """End the run, with its report, when a router collapses; false: only warn. Not in pretrain."""
    nonfinite: NonFinite = NonFinite.stop
    """Where a loss or a gradient is NaN or infinite. stop: end the run; skip: leave the step out, count it in
    train/skipped_steps, and stop after ten in a row. The weights never take such a step. pretrain always stops."""
    max_time: str | None = None
    """End the run after this wall time, as days:hours:minutes:seconds (00:11:45:00), with adapter and report; resume
    goes on, with the same time again. null: no limit."""
    enable_progress_bar: bool = True
    """A live line with loss and phase."""

    @property
    def processes(self) -> int:
        """How many take part in the run, on all machines."""
        return 1 if self.strategy is Strategy.device_map else self.devices * self.num_nodes


def max_seconds(max_time: str | None) -> float | None:
    """Seconds that `max_time` stands for, or None without a limit.

    Raises:
        ValueError: it is not days:hours:minutes:seconds, or nothing.
    """
    if max_time is None:
        return None
    parts = str(max_time).split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts) or not max_time.strip("0:"):
        raise ValueError(f"got {max_time!r}; allowed: days:hours:minutes:seconds, such as 00:11:45:00")
    if any(len(part) > MOST_DIGITS for part in parts):
        raise ValueError(f"got {max_time!r}; none of its four numbers may have more than {MOST_DIGITS} digits")
    days, hours, minutes, seconds = map(int, parts)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
