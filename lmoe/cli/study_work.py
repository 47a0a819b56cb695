"""What `lmoe study` does once its config is known to be good; imports the heavy libraries."""

import time
from dataclasses import replace

from rich.console import Console

from lmoe.cli.study_jobs import JobLauncher
from lmoe.report.say import say
from lmoe.run.announce import quiet_libraries
from lmoe.study.conclude import conclude
from lmoe.study.estimate import estimate_lines
from lmoe.study.jobs import check_begun
from lmoe.study.results.page import write_page
from lmoe.study.results.tables import study_tables, write_tables
from lmoe.study.rows import check_experts, check_metric, rows_of_arms
from lmoe.study.run import run_study
from lmoe.study.study import CONFIG_FILE, Study, Tools, keep_config


def do_study(composed: Study, launcher: JobLauncher) -> None:
    """Do what is not done yet of a study, and write its result.

    Args:
        composed: before its rows are looked at; its folder is held by this process.

    Raises:
        LmoeError: rows that cannot be used, or a folder of another study.
        Stopped: a signal has ended it.
    """
    began = time.monotonic()
    quiet_libraries()
    console = Console()
    study, hashes = _read(composed)
    keep_config(study, hashes)
    check_begun(study.folder)
    tools = Tools(
        launch=launcher,
        alone=launcher.alone,
        say=lambda line: say(console, line),
        parallel=launcher.parallel,
        machine=launcher.machine,
    )
    result = conclude(study, run_study(study, tools, began))
    result.write(study.folder)
    console.print(study_tables(result))
    names = [write_page(result, study.folder), *write_tables(result, study.folder)]
    say(console, f"\nIn {study.folder}: {', '.join(names)}")


def estimate_study(composed: Study, launcher: JobLauncher) -> None:
    """Say which jobs a study has, what its arms are, and how long what is not done will take.

    Args:
        composed: before its rows are looked at.
        launcher: with which it would be done.

    Raises:
        LmoeError: what would stop the study before its first run.
    """
    quiet_libraries()
    console = Console()
    study, hashes = _read(composed)
    if (study.folder / CONFIG_FILE).exists():
        keep_config(study, hashes)
    for line in estimate_lines(study, launcher.parallel, launcher.machine):
        say(console, line)


def _read(composed: Study) -> tuple[Study, dict[str, str]]:
    """The study, with its rows looked at, and the hashes of their files."""
    config, arms, configs = composed.config, composed.arms, composed.configs
    rows = rows_of_arms(configs, config.judging)
    check_experts(rows, configs)
    check_metric(config.tuning.metric, rows, configs, [name for name, arm in arms.items() if arm.apart])
    return replace(composed, domains=rows.domains), rows.data_hashes
