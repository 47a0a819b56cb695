"""How Lightning writes a checkpoint file for us."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lmoe.resume.contents import add_contents


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes where it is told to, with a list of what the checkpoint is built of.

    NOTE Lightning's own goes through the folder of temporary files: one that is small or full would stop a run whose
    disk has space, and each run killed in a save would leave a whole checkpoint behind there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        assert storage_options is None
        add_contents(checkpoint)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # into a file it would tell of a full disk as a RuntimeError
        Path(path).write_bytes(buffer.getbuffer())
