"""What a run has kept beside its checkpoints, read before it goes on."""

from pathlib import Path

from lmoe.files.run_folder import METRICS_FILE
from lmoe.run.claim import stored_id
from lmoe.run.loggers import wandb_run_id
from lmoe.run.provenance import provenance_records
from lmoe.training.metrics_csv import MetricsCsv


def check_records(run_dir: Path) -> None:
    """Read them all, so that a damaged one is named before anything is loaded or touched.

    Raises:
        CheckpointError: names the file that is damaged.
    """
    stored_id(run_dir)
    wandb_run_id(run_dir)
    provenance_records(run_dir)
    if (run_dir / METRICS_FILE).exists():
        MetricsCsv.check(run_dir / METRICS_FILE)
