"""Which folder holds the adapter of a run."""

from pathlib import Path

from lmoe.adapter.folder import CONFIG_FILE, WEIGHTS_FILE
from lmoe.errors import CheckpointError
from lmoe.files.adapter_files import ADAPTER_DIR
from lmoe.files.run_folder import CONFIG_FILE as RUN_CONFIG_FILE


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
    if lost_config(folder) is not None:
        raise CheckpointError(
            f"{folder}: {WEIGHTS_FILE} is there, and {CONFIG_FILE} is not{unfinished}; restore it, or name the base "
            "(`base_model`) to load it with the average of the experts, without routing"
        )
    raise CheckpointError(f"{folder}: neither a finished run nor an adapter: no {CONFIG_FILE}{unfinished}")


def lost_config(path: str | Path) -> Path | None:
    """The folder behind a run or adapter directory that has adapter.safetensors and no lmoe_config.json."""
    folder = Path(path).expanduser()
    for candidate in (folder, folder / ADAPTER_DIR):
        if (candidate / WEIGHTS_FILE).exists() and not (candidate / CONFIG_FILE).exists():
            return candidate
    return None
