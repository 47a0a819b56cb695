"""Which folder holds the adapter of a run, or of a name on the hub."""

from pathlib import Path

from lmoe.adapter.folder import CONFIG_FILE, WEIGHTS_FILE
from lmoe.errors import CheckpointError, ConfigError
from lmoe.files.adapter_files import ADAPTER_DIR, TOKENIZER_FILES
from lmoe.files.hub import is_hub_name, local_copy
from lmoe.files.run_folder import CONFIG_FILE as RUN_CONFIG_FILE

FROM_HUB = (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES)
"""All that is downloaded of an adapter: neither pickles nor code."""
CODE = "*.py"


def local_checkpoint(path: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> str | Path:
    """A run or adapter on this machine: the place itself, or a copy of what the hub has by this name.

    A folder of that name goes before the hub. Where several functions take one checkpoint, this is called once, so that
    all of them see the same files.

    Args:
        path: run directory, adapter directory, or user/name on the hub.
        revision: on the hub; None: main.
        trust_remote_code: download Python beside the tokenizer too.

    Raises:
        CheckpointError: the hub does not give it, or gives what is no adapter.
        ConfigError: a revision of what is on this machine.
    """
    if not is_hub_name(path):
        if revision is not None:
            raise ConfigError(f"`revision={revision}` has no effect on {path}, which is on this machine; leave it out")
        return path
    folder = local_copy(str(path), [*FROM_HUB, *([CODE] if trust_remote_code else [])], revision=revision)
    if not (folder / CONFIG_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        raise CheckpointError(
            f"{path}: on the hub, and no adapter of lmoe: it has no {CONFIG_FILE}. A model is used as a base "
            "(`model_name`), a PEFT adapter as an expert of a blend (`experts`)"
        )
    return folder


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder behind a run directory, an adapter directory, or the name of an adapter on the hub.

    Raises:
        CheckpointError: none of them.
    """
    folder = Path(local_checkpoint(path)).expanduser()
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


def run_folder(adapter: Path) -> Path | None:
    """The run directory that an adapter folder lies in, or None for an adapter on its own."""
    run = adapter.parent
    return run if adapter.name == ADAPTER_DIR and (run / RUN_CONFIG_FILE).exists() else None
