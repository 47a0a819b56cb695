"""One study: what it holds while it runs, and the folder that keeps it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmoe.config.read import read_section
from lmoe.config.run import RunConfig
from lmoe.config.study import StudyConfig
from lmoe.errors import StudyError
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown
from lmoe.files.write import write_whole
from lmoe.study.arms import Arm
from lmoe.study.jobs import Job

CONFIG_FILE = "study_config.json"
FORMAT_VERSION = 1
CONFIG = Reader(error=StudyError, cure="put it back, or start another study (study.name)")
NO_PART_OF_IT = ("max_time",)
"""Keys of a study that may change while it is under way: no run depends on them."""
Compose = Callable[[Sequence[str]], RunConfig]
"""The config of a run with such settings, without problems; raises ConfigError."""
Launch = Callable[[Sequence[Job]], None]
"""Do jobs, wherever they run, and come back when each is done or has failed."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Study:
    """A study without problems.

    Args:
        config: its section.
        given: settings of the command line for the runs of all arms.
        folder: outputs/study/<name>.
        arms: by name, the baseline first.
        configs: of a run of each arm, with the first values of its space.
        domains: of the training rows.
        command: with which the study goes on.
    """

    config: StudyConfig
    given: tuple[str, ...]
    folder: Path
    arms: Mapping[str, Arm]
    configs: Mapping[str, RunConfig]
    domains: Sequence[str]
    command: str


@dataclass(slots=True, frozen=True, kw_only=True)
class Tools:
    """What a study asks of whoever runs it.

    Args:
        launch: does jobs.
        alone: trains with settings into a folder, while nothing else runs; returns an exit code.
        say: told what happens, a line at a time.
        parallel: jobs that run beside one another.
    """

    launch: Launch
    alone: Callable[[Sequence[str], Path], int]
    say: Callable[[str], None]
    parallel: int


def keep_config(study: Study, data_hashes: Mapping[str, str]) -> None:
    """Write what the study is into its folder, or compare it with what is there.

    Args:
        data_hashes: SHA-256 of the files of rows, of training, validation and judging.

    Raises:
        StudyError: the folder holds another study; says in what it differs.
    """
    wanted = json.loads(json.dumps(kept_config(study, data_hashes)))
    file = study.folder / CONFIG_FILE
    if not file.exists():
        write_whole(study.folder, {CONFIG_FILE: json.dumps(wanted, indent=1, ensure_ascii=False).encode() + b"\n"})
        return
    there = _completed(CONFIG.json(file))
    if changes := list(_differences(wanted, there, "")):
        listed = "\n".join(f"  - {change}" for change in changes[:20])
        raise StudyError(
            f"{study.folder} holds a study that was begun with other settings; with them it goes on, and another "
            f"study.name=… starts another one:\n{listed}"
        )


def _completed(kept: dict[str, Any]) -> dict[str, Any]:
    """What was kept, with the defaults of keys that studies did not yet have then."""
    read, _ = read_section(StudyConfig, kept.get("study", {}), prefix="study")
    return kept | {"study": json.loads(json.dumps(_section(read)))}


def _section(config: StudyConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if key not in NO_PART_OF_IT}


def kept_config(study: Study, data_hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a study depends on."""
    return {
        "format_version": FORMAT_VERSION,
        "study": _section(study.config),
        "settings": list(study.given),
        "data": sorted(data_hashes.values()),
    }


def _differences(wanted: Any, there: Any, key: str):
    if isinstance(wanted, dict) and isinstance(there, dict):
        for name in dict.fromkeys([*wanted, *there]):
            yield from _differences(wanted.get(name), there.get(name), f"{key}.{name}" if key else name)
    elif wanted != there:
        yield f"{key} is {shown(wanted)}, was {shown(there)}"
