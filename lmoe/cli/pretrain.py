"""`lmoe pretrain`: train a small base from scratch."""

import sys
from pathlib import Path

from lmoe.cli.commands import shell_command
from lmoe.cli.hydra_run import hydra_main
from lmoe.cli.resume import refuse_existing
from lmoe.config.pretrain import PretrainConfig
from lmoe.pretrain.rules import pretrain_problems
from lmoe.resume.stopping import StopSignals
from lmoe.run.claim import claimed
from lmoe.run.records import started_run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return hydra_main(
        "pretrain", PretrainConfig, pretrain_problems, run, sys.argv[1:] if argv is None else argv, entry=__file__
    )


def run(config: PretrainConfig, run_dir: Path, overrides: list[str]) -> None:
    """One pre-training, or the continuation of one."""
    with StopSignals() as signals, claimed(run_dir):
        if not config.resume:
            refuse_existing(run_dir)
        with started_run(config, run_dir):
            from rich.console import Console

            from lmoe.pretrain.run import pretrain

            pretrain(config, run_dir, overrides, Console(), signals, wording=shell_command)
