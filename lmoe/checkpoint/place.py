"""Which folder holds the adapter of a run."""

from pathlib import Path

from lmoe.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE
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
    if any((candidate / WEIGHTS_FILE).exists() for candidate in (folder, folder / ADAPTER_DIR)):
        raise CheckpointError(
            f"{folder}: {WEIGHTS_FILE} is there, and {CONFIG_FILE} is not{unfinished}; restore it, or take the average "
            "of the experts with lmoe.load(…, base_model=…, average_without_config=True)"
        )
    raise CheckpointError(f"{folder}: neither a finished run nor an adapter: no {CONFIG_FILE}{unfinished}")


def weights_folder(path: str | Path) -> Path:
    """The folder of adapter.safetensors behind a run directory or an adapter directory, with or without a config.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser()
    for candidate in (folder, folder / ADAPTER_DIR):
        if (candidate / WEIGHTS_FILE).exists():
            return candidate
    raise CheckpointError(f"{folder}: no {WEIGHTS_FILE} there")
