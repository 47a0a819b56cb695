"""Which checkpoint is the best one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lmoe.config.checkpoint import CheckpointConfig
from lmoe.training.callbacks.run_checkpoint import RunCheckpoint

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "saved"), [([NAN, 3.0, 4.0, 2.0], [3.0, 2.0]), ([INF, 3.0, NAN, 2.0], [3.0, 2.0]), ([NAN, NAN], [])]
)
def test_a_validation_that_is_no_number_is_never_the_best(monkeypatch, losses, saved):
    found = []
    monkeypatch.setattr(RunCheckpoint, "save", lambda self, trainer, name: found.append((name, self.best)))
    checkpoint = RunCheckpoint(Path("nowhere"), "run", CheckpointConfig())
    for step, loss in enumerate(losses, start=1):
        metrics = {"val/loss": torch.tensor(loss)}
        trainer = SimpleNamespace(callback_metrics=metrics, sanity_checking=False, global_step=step)
        checkpoint.on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert found == [("best.ckpt", loss) for loss in saved]
