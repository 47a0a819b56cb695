"""config.yaml of a run, which makes its folder a run, and the record of each start."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lmoe.build.provenance import add_provenance
from lmoe.checkpoint.write import write_whole
from lmoe.errors import LmoeError
from lmoe.schema.pretrain import PretrainConfig
from lmoe.schema.run import RunConfig
from lmoe.schema.run_folder import CONFIG_FILE, PROVENANCE_FILE


def write_config(config: RunConfig | PretrainConfig, run_dir: Path) -> None:
    """The resolved config, without what is about this start alone.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    kept = replace(config, resume=None, checkpoint=replace(config.checkpoint, resume_from=None))
    write_whole(run_dir, {CONFIG_FILE: OmegaConf.to_yaml(OmegaConf.structured(kept)).encode()})


def write_records(config: RunConfig | PretrainConfig, run_dir: Path, record: dict[str, Any]) -> None:
    """config.yaml, with what a continuation changed, and one more record in provenance.json.

    Args:
        record: of this start, see `provenance`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    write_config(config, run_dir)
    add_provenance(run_dir, record)


@contextmanager
def begun(config: RunConfig | PretrainConfig, run_dir: Path) -> Iterator[None]:
    """Make the folder a run from the first moment, so that a kill at any later one can be resumed.

    A new run that fails before it has a record of its parts leaves no config.yaml, and the same command works again.
    """
    if config.resume is None:
        write_config(config, run_dir)
    try:
        yield
    except LmoeError:
        if config.resume is None and not (run_dir / PROVENANCE_FILE).exists():
            (run_dir / CONFIG_FILE).unlink(missing_ok=True)
        raise
