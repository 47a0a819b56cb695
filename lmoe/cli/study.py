"""`lmoe study study=NAME key=value …`: ways of fine-tuning beside one another, and a verdict."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from lmoe.cli.compose import compose_config, problems_of
from lmoe.cli.errors import with_keys
from lmoe.cli.hydra_run import composition_problem
from lmoe.cli.overrides import MULTIRUN, Command, Setting, first_point, own_folders, read_command, searchpath
from lmoe.cli.study_jobs import JobLauncher
from lmoe.cli.threads import prepare_threads
from lmoe.config.keys import near
from lmoe.config.problems import raise_problems
from lmoe.config.run import RunConfig
from lmoe.config.study import StudyConfig, StudyFile
from lmoe.errors import ConfigError, LmoeError
from lmoe.files.resources import resource_dir
from lmoe.files.wording import shown
from lmoe.resume.stopping import Stopped, StopSignals
from lmoe.rules.study import own_key, setting_key, space_of, study_problems
from lmoe.rules.trust import trust_problems
from lmoe.rules.validate import run_problems
from lmoe.run.claim import claimed
from lmoe.study.arms import Arm, arms_of
from lmoe.study.composing import compose_each
from lmoe.vocabulary import DryRun

ROOT = Path("outputs/study")
DRY_RUN = "dry_run"
HELP = ("--help", "-h")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 after a message on stderr, or 128 + the signal that ended it."""
    if not argv or any(flag in argv for flag in HELP):
        sys.stdout.write(help_text())
        return 0 if argv else 2
    prepare_threads()
    try:
        _run(argv)
    except LmoeError as error:
        sys.stderr.write(f"{with_keys(str(error))}\n")
        return 1
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}; the same command goes on: lmoe study {shlex.join(argv)}\n")
        return stopped.exit_code
    return 0


def help_text() -> str:
    """What the verb does, and the studies that there are."""
    lines = [
        "usage: lmoe study study=NAME key=value …",
        "",
        "Ways of fine-tuning beside one another: each tuned alike, judged with fresh seeds on rows that nothing else",
        "reads, compared with honest intervals. key=value are settings of all runs, as in lmoe train, or",
        "study.key=value. The result lies in outputs/study/<name>/; after a stop the same command goes on.",
        "dry_run=estimate says what it would take. docs/STUDY.md explains.",
        "",
    ]
    for file in sorted((resource_dir("conf") / "study").glob("*.yaml")):
        first = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        lines.append(f"  study={file.stem:<16}{first}")
    return "\n".join(lines) + "\n"


def _run(argv: list[str]) -> None:
    study, given, launcher, dry_run = read_study(argv)
    JobLauncher(launcher, ROOT / study.name).check_limit(study.max_time)
    configs, arms = compose_arms(study, given, own_folders(argv))
    if dry_run is DryRun.config:
        sys.stdout.write(f"config: no problems; {len(arms)} arms: {', '.join(arms)}\n")
        return
    # Heavy imports wait until the config is known to be good.
    from lmoe.cli.study_work import do_study, estimate_study
    from lmoe.study.study import Study

    composed = Study(
        config=study,
        given=tuple(given),
        folder=ROOT / study.name,
        arms=arms,
        configs=configs,
        command=f"lmoe study {shlex.join(argv)}",
    )
    jobs = JobLauncher(launcher, composed.folder)
    if dry_run is DryRun.estimate:
        estimate_study(composed, jobs)
        return
    with StopSignals(), claimed(composed.folder, another="study.name=…"):
        do_study(composed, jobs)


def read_study(argv: Sequence[str]) -> tuple[StudyConfig, list[str], list[str], DryRun]:
    """The study of a command, the settings of its runs, those of Hydra's launcher, and how much of it is tried.

    Raises:
        ConfigError: every problem of the command.
    """
    places = own_folders(list(argv))
    rest = [text for text in argv if text not in places]
    # Before anything else is read: what stands behind an option would be taken for a setting.
    raise_problems(_option_problems(rest))
    named: dict[str, list[str]] = {"study": [], "hydra": [], "run": []}
    for text in rest:
        section = re.split(r"[./]", setting_key(text))[0]
        named[section if section in ("study", "hydra") else "run"].append(text)
    problems = _launcher_problems(named["hydra"])
    dry_run, runs = _dry_run(named["run"], problems)
    problems += [f"{text}: a study sets {setting_key(text)} itself; leave it out" for text in runs if own_key(text)]
    runs = [text for text in runs if not own_key(text)]
    of_runs = read_command([*places, *runs], "train", RunConfig)
    of_study = read_command([*places, *named["study"]], "study", StudyFile)
    problems = list(dict.fromkeys([*problems, *of_runs.problems, *of_study.problems]))
    if not any(setting.key == "study" for setting in of_study.settings) and not of_study.problems:
        there = sorted(file.stem for file in (resource_dir("conf") / "study").glob("*.yaml"))
        problems.append(f"study is required: study=NAME, one of {', '.join(there)}, or one of a folder of yours")
    raise_problems(problems)
    study = _composed(of_study)
    if twice := _set_by_arms(study, of_runs.settings):
        raise ConfigError(twice)
    return study, [setting.text for setting in of_runs.settings], named["hydra"], dry_run


def compose_arms(
    study: StudyConfig, given: Sequence[str], places: Sequence[str]
) -> tuple[dict[str, RunConfig], dict[str, Arm]]:
    """A config of a run of each arm, with the first values of its space, and the arms, whose settings name the folders.

    Args:
        places: arguments that name folders of further choices.

    Raises:
        ConfigError: every problem of an arm, a value that its runs refuse or that changes nothing, arms that are alike.
    """

    def compose(settings: Sequence[str]) -> RunConfig:
        command = read_command(list(settings), "train", RunConfig)
        raise_problems(command.problems)
        try:
            composed: DictConfig = compose_config("train", RunConfig, command.arguments)
        except Exception as error:  # whatever stops Hydra is said as a problem of the arm
            raise ConfigError(composition_problem(error)) from None
        config, problems = problems_of(composed, RunConfig, run_problems)
        raise_problems(problems + trust_problems(config, [setting_key(text) for text in given]))
        return config

    return compose_each(study, arms_of(study, [*searchpath(list(places)), *given]), compose)


def _composed(command: Command) -> StudyConfig:
    try:
        composed = compose_config("study", StudyFile, first_point(command))
    except Exception as error:
        raise ConfigError(composition_problem(error)) from None
    read, problems = problems_of(composed, StudyFile, lambda file: study_problems(file.study))
    raise_problems(problems)
    return read.study


def _option_problems(texts: Sequence[str]) -> list[str]:
    """Options that a study does not have: passed over, `--dry_run=estimate` would begin to train."""
    problems = []
    for text in texts:
        if text in MULTIRUN:
            problems.append(
                f"{text}: a study takes no -m: it trains each of its arms, with each value of study.space; leave it out"
            )
        elif text.startswith("-"):
            problems.append(
                f"{shown(text)}: a study has no such option; it takes key=value, --config-dir FOLDER and --help "
                "(dry_run=config and dry_run=estimate say what it would do)"
            )
    return problems


def _launcher_problems(settings: Sequence[str]) -> list[str]:
    """Problems of what is set of Hydra: a study has its own folders and no sweeper."""
    wrong = [
        text
        for text in settings
        if not setting_key(text).startswith("hydra.launcher") and setting_key(text) != "hydra/launcher"
    ]
    problems = [f"{text}: of Hydra a study takes hydra/launcher and hydra.launcher.* alone" for text in wrong]
    right = [text for text in settings if text not in wrong]
    return problems + read_command(["-m", *right], "train", RunConfig).problems


def _dry_run(settings: Sequence[str], problems: list[str]) -> tuple[DryRun, list[str]]:
    rest = [text for text in settings if setting_key(text) != DRY_RUN]
    value = next((text.partition("=")[2] for text in reversed(settings) if setting_key(text) == DRY_RUN), "none")
    allowed = [DryRun.none, DryRun.config, DryRun.estimate]
    if value not in allowed:
        problems.append(f"dry_run={value}: a study has {', '.join(allowed)}; {near(value, list(allowed))}")
        return DryRun.none, rest
    return DryRun(value), rest


def _set_by_arms(study: StudyConfig, settings: Sequence[Setting]) -> list[str]:
    """Settings of the command line that arms set otherwise, or that are tuned, so that they would not count."""
    problems = []
    for setting in settings:
        whose = [name for name, arm in study.arms.items() if any(setting_key(o) == setting.key for o in arm.overrides)]
        if whose:
            problems.append(
                f"{setting.text}: of the arms {', '.join(whose)} set {setting.key} themselves, so it would not count "
                "for them; change study.arms.<name>.overrides"
            )
        if any(setting.key in space_of(study, arm) for arm in study.arms.values()):
            problems.append(f"{setting.text}: it is tuned; give its values with study.space.{setting.key}=[…]")
    return problems
