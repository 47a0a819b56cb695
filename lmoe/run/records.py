"""config.yaml of a run, which makes its folder a run, and the record of each start."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lmoe.config.pretrain import PretrainConfig
from lmoe.config.run import RunConfig
from lmoe.files.run_folder import CLUSTERS_FILE, CONFIG_FILE, ID_FILE, METRICS_FILE, PROVENANCE_FILE
from lmoe.files.write import write_whole
from lmoe.run.provenance import add_provenance


def write_config(config: RunConfig | PretrainConfig, run_dir: Path) -> None:
    """The resolved config, without what is about this start alone.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    kept = replace(config, resume=None, checkpoint=replace(config.checkpoint, resume_from=None))
    if isinstance(kept, RunConfig):
        kept = replace(kept, callbacks_from=None)  # trust is given by a command line, not by a file
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
def started_run(config: RunConfig | PretrainConfig, run_dir: Path) -> Iterator[None]:
    """Let the folder hold a run from the first moment, so that a kill at any later one can be resumed.

    A new run that fails, for whatever reason, before it has logged anything leaves neither config.yaml nor a record of
    its start nor clusters, and the same command works again.
    """
    own = [name for name in (CONFIG_FILE, PROVENANCE_FILE, CLUSTERS_FILE, ID_FILE) if not (run_dir / name).exists()]
    if config.resume is None:
        write_config(config, run_dir)
    try:
        yield
    except Exception:
        if config.resume is None and not (run_dir / METRICS_FILE).exists():
            for name in own:
                (run_dir / name).unlink(missing_ok=True)
        raise
