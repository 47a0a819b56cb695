"""Which folder holds the adapter of a run."""

from pathlib import Path

from lmoe.checkpoint.adapter import CONFIG_FILE
from lmoe.errors import CheckpointError
from lmoe.schema.run_folder import CONFIG_FILE as RUN_CONFIG_FILE

ADAPTER_DIR = "adapter"


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder behind a run directory or an adapter directory.

    Raises:
        CheckpointError: neither.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / ADAPTER_DIR):
        if (candidate / CONFIG_FILE).exists():
            return candidate
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such run or adapter directory")
    unfinished = " (the run has not finished: resume=<run> continues it)" if (folder / RUN_CONFIG_FILE).exists() else ""
    raise CheckpointError(f"{folder}: neither a finished run nor an adapter: no {CONFIG_FILE}{unfinished}")
