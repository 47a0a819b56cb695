"""What `lmoe study` does once its config is known to be good; imports the heavy libraries."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from lmoe.cli.study_jobs import JobLauncher
from lmoe.config.run import RunConfig
from lmoe.config.study import StudyConfig
from lmoe.report.say import say
from lmoe.run.announce import quiet_libraries
from lmoe.study.arms import Arm
from lmoe.study.conclude import conclude
from lmoe.study.estimate import estimate_lines
from lmoe.study.page import write_page
from lmoe.study.rows import check_experts, check_metric, rows_of_arms
from lmoe.study.run import run_study
from lmoe.study.study import CONFIG_FILE, Study, Tools, keep_config
from lmoe.study.tables import study_tables, write_tables


def do_study(
    config: StudyConfig,
    given: Sequence[str],
    folder: Path,
    arms: Mapping[str, Arm],
    configs: Mapping[str, RunConfig],
    command: str,
    launcher: JobLauncher,
) -> None:
    """Do what is not done yet of a study, and write its result.

    Args:
        given: settings of the runs of all arms.
        folder: of the study, held by this process.
        command: with which it goes on.

    Raises:
        LmoeError: rows that cannot be used, or a folder of another study.
        Stopped: a signal has ended it.
    """
    quiet_libraries()
    console = Console()
    study, hashes = _read(config, given, folder, arms, configs, command)
    keep_config(study, hashes)
    tools = Tools(
        launch=launcher, alone=launcher.alone, say=lambda line: say(console, line), parallel=launcher.parallel
    )
    result = conclude(study, run_study(study, tools))
    result.write(folder)
    console.print(study_tables(result))
    names = [write_page(result, folder), *write_tables(result, folder)]
    say(console, f"\nIn {folder}: {', '.join(names)}")


def estimate_study(
    config: StudyConfig,
    given: Sequence[str],
    folder: Path,
    arms: Mapping[str, Arm],
    configs: Mapping[str, RunConfig],
    command: str,
    parallel: int,
) -> None:
    """Say which jobs a study has, what its arms are, and how long what is not done will take.

    Args:
        given, folder, command: as of `do_study`.
        parallel: jobs that run beside one another.

    Raises:
        LmoeError: what would stop the study before its first run.
    """
    quiet_libraries()
    console = Console()
    study, hashes = _read(config, given, folder, arms, configs, command)
    if (folder / CONFIG_FILE).exists():
        keep_config(study, hashes)
    for line in estimate_lines(study, parallel):
        say(console, line)


def _read(
    config: StudyConfig,
    given: Sequence[str],
    folder: Path,
    arms: Mapping[str, Arm],
    configs: Mapping[str, RunConfig],
    command: str,
) -> tuple[Study, dict[str, str]]:
    """The study, with its rows looked at, and the hashes of their files."""
    rows = rows_of_arms(configs, config.judging)
    check_experts(rows, configs)
    check_metric(config.tuning.metric, rows, configs, [name for name, arm in arms.items() if arm.apart])
    study = Study(
        config=config,
        given=tuple(given),
        folder=folder,
        arms=arms,
        configs=configs,
        domains=rows.domains,
        command=command,
    )
    return study, rows.data_hashes
