"""When each optimizer step of a run of lmoe has ended; the run loads it by callbacks_from."""

import json
import time
from pathlib import Path

from lightning.pytorch import Callback


class StepClock(Callback):
    """Writes the times of all steps, as seconds since the epoch.

    Args:
        path: a JSON file.
    """

    def __init__(self, path: str) -> None:
        self.path, self.times = Path(path), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.times.append(time.time())

    def on_train_end(self, trainer, pl_module) -> None:
        self.path.write_text(json.dumps(self.times), encoding="utf-8")
