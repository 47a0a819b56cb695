"""One training step in two timed parts."""

import torch

from benchmarks.models import Batch
from benchmarks.peers.trainee import Trainee
from benchmarks.timing import Clock, Laps

PARTS = ("forward+backward", "optimizer")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Types of the frozen weights; with bf16, autocast computes in it over float32 adapters."""


class TrainStep:
    """Forward and backward, then AdamW."""

    def __init__(self, trainee: Trainee, batch: Batch, dtype: torch.dtype) -> None:
        self.trainee, self.batch, self.dtype = trainee, batch, dtype
        self.device = batch.input_ids.device
        trained = trainee.trained()
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def __call__(self) -> Laps:
        """Milliseconds of the parts; the optimizer's include letting go of the gradients.

        Raises:
            FloatingPointError: the loss is not finite, so that nothing of use was timed.
        """
        clock = Clock(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            loss = self.trainee.loss(self.batch)
        loss.backward()
        clock.mark()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        clock.mark()
        laps = clock.laps()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}")
        return laps
