"""One study: what it holds while it runs, and the folder that keeps it."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from lmoe.config.read import read_section
from lmoe.config.run import RunConfig
from lmoe.config.study import StudyConfig
from lmoe.errors import StudyError
from lmoe.files.small_file import Reader
from lmoe.files.wording import LONGEST_REASON, shown
from lmoe.files.write import write_whole
from lmoe.resume.rules import PLACES, PLACES_OF_ROWS, SAFE
from lmoe.rules.study import by_key
from lmoe.study.arms import Arm
from lmoe.study.jobs import Job

CONFIG_FILE = "study_config.json"
FORMAT_VERSION = 1
CONFIG = Reader(error=StudyError, most=2**26, cure="put it back, or start another study (study.name)")
NOT_SET = "not set"
LEAD = 10
"""Characters before the first one in which two texts differ that a message shows."""
NO_PART_OF_IT = ("max_time", "question")
"""Keys of a study that may change while it is under way, and so may the titles of arms: no run depends on them."""
FREE_IN_RUNS = (*SAFE, *PLACES)
"""Keys of the runs that may change likewise: no weight depends on them, or the contents are compared in their place."""
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
        command: with which the study goes on.
        domains: of the training rows; empty until they are read.
    """

    config: StudyConfig
    given: tuple[str, ...]
    folder: Path
    arms: Mapping[str, Arm]
    configs: Mapping[str, RunConfig]
    command: str
    domains: Sequence[str] = ()


@dataclass(slots=True, frozen=True, kw_only=True)
class Tools:
    """What a study asks of whoever runs it.

    Args:
        launch: does jobs.
        alone: trains with settings into a folder, while nothing else runs; returns an exit code.
        say: told what happens, a line at a time.
        parallel: jobs that run beside one another.
        machine: on which jobs run; seconds of those that another one has done say nothing here.
    """

    launch: Launch
    alone: Callable[[Sequence[str], Path], int]
    say: Callable[[str], None]
    parallel: int
    machine: str


def keep_config(study: Study, data_hashes: Mapping[str, str]) -> None:
    """Write what the study is into its folder, or compare it with what is there.

    Args:
        data_hashes: SHA-256 of the files of rows, of training, validation and judging.

    Raises:
        StudyError: the folder holds another study; says in what it differs.
    """
    wanted = _plain(kept_config(study, data_hashes))
    file = study.folder / CONFIG_FILE
    if not file.exists():
        write_whole(study.folder, {CONFIG_FILE: json.dumps(wanted, indent=1, ensure_ascii=False).encode() + b"\n"})
        return
    there = _completed(file)
    changes = list(_changes(wanted, there))
    if changes := changes or list(_changed_runs(study.configs, there.get("runs"))):
        listed = "\n".join(f"  - {change}" for change in changes[:20])
        raise StudyError(
            f"{study.folder} holds a study that was begun with other settings; with them it goes on, and another "
            f"study.name=… starts another one:\n{listed}"
        )


def _completed(file: Path) -> dict[str, Any]:
    """What was kept, with the defaults of keys that studies did not yet have then."""
    kept = CONFIG.json(file)
    settings, data = kept.get("settings"), kept.get("data")
    if not isinstance(settings, list) or not isinstance(data, dict | list):
        raise CONFIG.refusal(file, "holds something else")
    read, _ = read_section(StudyConfig, kept.get("study", {}), prefix="study")
    return kept | {"study": _plain(_section(read)), "settings": [str(text) for text in settings]}


def _section(config: StudyConfig) -> dict[str, Any]:
    section = {key: value for key, value in asdict(config).items() if key not in NO_PART_OF_IT}
    for arm in section["arms"].values():
        del arm["title"]
    return section


def kept_config(study: Study, data_hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a study depends on."""
    return {
        "format_version": FORMAT_VERSION,
        "study": _section(study.config),
        "settings": list(study.given),
        "data": dict(data_hashes),
        "runs": {name: _without_free(_plain(config), "") for name, config in study.configs.items()},
    }


def _changes(wanted: dict[str, Any], there: dict[str, Any]) -> Iterator[str]:
    """Yield in what a study differs from the one that was begun."""
    for key in ("format_version", "study"):
        yield from _differences(wanted[key], there.get(key), key)
    yield from _differences(by_key(wanted["settings"]), by_key(there["settings"]), "")
    yield from _changed_files(wanted["data"], there["data"])


def _differences(wanted: Any, there: Any, key: str) -> Iterator[str]:
    if wanted == there:
        return
    if isinstance(wanted, dict) and isinstance(there, dict):
        for name in dict.fromkeys([*wanted, *there]):
            yield from _differences(wanted.get(name, NOT_SET), there.get(name, NOT_SET), _inner(key, name))
    elif isinstance(wanted, list) and isinstance(there, list) and shown(wanted) == shown(there):
        new, gone = ([item for item in one if item not in other] for one, other in ((wanted, there), (there, wanted)))
        yield from (f"{key} has {shown(item, longest=LONGEST_REASON)}, which it had not" for item in new)
        yield from (f"{key} had {shown(item, longest=LONGEST_REASON)}, which it has not" for item in gone)
        if sorted(map(str, wanted)) == sorted(map(str, there)):
            yield f"{key} has another order"
    else:
        now, before = _told_apart(str(wanted), str(there)) if shown(wanted) == shown(there) else (wanted, there)
        yield f"{key} is {shown(now)}, was {shown(before)}"


def _told_apart(text: str, other: str) -> tuple[str, str]:
    """Both texts from a little before the first character in which they differ."""
    shorter = min(len(text), len(other))
    same = next((place for place in range(shorter) if text[place] != other[place]), shorter)
    start = max(0, same - LEAD)
    return f"…{text[start:]}", f"…{other[start:]}"


def _changed_runs(configs: Mapping[str, RunConfig], there: Any) -> Iterator[str]:
    """What makes runs other ones although they are set alike: a file of choices was changed.

    Args:
        there: what was kept of the runs by arm; earlier versions kept nothing.
    """
    whose: dict[str, list[str]] = {}
    for name, config in configs.items():
        if isinstance(there, dict) and name in there:
            for change in _changed_keys(config, there[name], ""):
                whose.setdefault(change, []).append(name)
    for change, names in whose.items():
        yield f"{change} in the runs of {', '.join(names)}, though it is set alike: a file of choices was changed"


def _changed_keys(now: Any, there: Any, key: str) -> Iterator[str]:
    """Yield in what a part of a run's config differs from the one that was kept; of the keys of a section those alone
    that both have: a later version has more of them."""
    if _is_free(key):
        return
    if is_dataclass(now) and isinstance(there, dict):
        for spec in fields(now):
            if spec.name in there:
                yield from _changed_keys(getattr(now, spec.name), there[spec.name], _inner(key, spec.name))
    elif isinstance(now, dict) and isinstance(there, dict):
        entries = {str(name): value for name, value in now.items()}
        for name in dict.fromkeys([*entries, *there]):
            yield from _changed_keys(entries.get(name, NOT_SET), there.get(name, NOT_SET), _inner(key, name))
    else:
        yield from _differences(_plain(now), there, key)


def _without_free(kept: Any, key: str) -> Any:
    """The same without keys that may change."""
    if not isinstance(kept, dict):
        return kept
    inner = {name: _inner(key, name) for name in kept}
    return {name: _without_free(value, inner[name]) for name, value in kept.items() if not _is_free(inner[name])}


def _is_free(key: str) -> bool:
    free = any(key == name or key.startswith(f"{name}.") for name in FREE_IN_RUNS)
    return free or PLACES_OF_ROWS.fullmatch(key) is not None


def _inner(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=asdict))


def _changed_files(wanted: dict[str, str], there: dict[str, str] | list[str]) -> Iterator[str]:
    """Files of rows that are not those of the study, of which earlier versions kept no names."""
    now, before = wanted.values(), there if isinstance(there, list) else there.values()
    new = [file for file, digest in wanted.items() if digest not in before]
    yield from (f"{file} holds rows that the study was not begun with" for file in new)
    gone = len(set(before) - set(now))
    named = [file for file, digest in there.items() if digest not in now] if isinstance(there, dict) else []
    if missing := [file for file in named if file not in new]:
        yield from (f"{file} is no longer among its files of rows" for file in missing)
    elif gone > len(new):
        yield f"{gone} files of rows that the study was begun with are not among them"
