"""`resume=<run directory>`: the saved config, and the overrides of this command on top of it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lmoe.config.limits import MOST_CHARACTERS
from lmoe.config.phase import PLATEAU
from lmoe.config.problems import raise_problems
from lmoe.config.read import read_section
from lmoe.errors import ConfigError
from lmoe.files.places import expanded, is_file
from lmoe.files.resources import resource_dir
from lmoe.files.run_folder import CONFIG_FILE, PROVENANCE_FILE, resume_setting
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown
from lmoe.resume.rules import DEVICES, LENGTH, PER_STEP, STRATEGY, batch_sizes_of_phases, refused
from lmoe.vocabulary import Strategy

AUTO = "auto"
SAVED = Reader(error=ConfigError, cure="put back the file that the run has written")
"""How the config of a run is read."""
OWN_KEYS_ONLY = ("trainer",)
"""Groups whose choice, on resume, changes what its file says and nothing else."""
OF_THE_RUN = ("phase.of_steps", "data.template_date")
"""What a run has found out for itself: its first length, where it was made longer, and the day that it began."""
EPOCHS = "trainer.max_epochs"
"""With which a run finds out its length as well, unless the command names one."""


def run_to_resume(overrides: list[Override]) -> Path | None:
    """The folder named by resume=…; None without it, and for auto, where the folder is known only when composed.

    Raises:
        ConfigError: it holds no run.
    """
    value = next((o.value() for o in reversed(overrides) if o.key_or_group == "resume"), None)
    if value in (None, AUTO):
        return None
    run = expanded(str(value))
    if not is_file(run / CONFIG_FILE):
        raise ConfigError(
            f"resume={shown(value, longest=MOST_CHARACTERS)}: no {CONFIG_FILE} in this folder, so it holds no run"
        )
    return run.resolve()


def refuse_existing(run_dir: Path) -> None:
    """Refuse a directory that already holds a run.

    Raises:
        ConfigError: a new run would write over an old one.
    """
    if (run_dir / CONFIG_FILE).exists():
        raise ConfigError(
            f"{run_dir} already holds a run; {resume_setting(run_dir)} continues it, another hydra.run.dir starts a "
            "new one"
        )


def merge_saved(composed: DictConfig, schema: type, overrides: list[str]) -> DictConfig:
    """The saved config with the overrides of this command.

    Raises:
        ConfigError: every override that would make another run of it, with both values.
    """
    saved = _saved(Path(composed.resume).expanduser() / CONFIG_FILE, schema)
    changes: dict[str, tuple[Any, Any]] = {}
    whose: dict[str, str] = {}
    meant: set[str] = set()
    given = _set_by(overrides, schema)
    of_the_run = OF_THE_RUN
    if OmegaConf.select(saved, EPOCHS) is not None and all(name != LENGTH for name, _ in given):
        of_the_run += (LENGTH,)
    for name, key in given:
        for path, new, old in _differences(OmegaConf.select(composed, key), OmegaConf.select(saved, key), key):
            if path in of_the_run and (new is None or path == LENGTH):
                continue  # the command need not know it
            changes[path] = (new, old)
            if name.split(".")[0] == path.split(".")[0]:
                meant.add(path)
            whose[path] = f" (from {name}=…)" if (resource_dir("conf") / name).is_dir() else ""
    values = {key: value for key in PER_STEP if (value := OmegaConf.select(saved, key)) is not None}
    values |= batch_sizes_of_phases(OmegaConf.select(saved, "phase.phases") or {})
    if OmegaConf.select(saved, STRATEGY) == Strategy.device_map:  # whose devices are no processes
        values.pop(DEVICES, None)
    recorded = (Path(composed.resume).expanduser() / PROVENANCE_FILE).is_file()
    if reasons := refused(changes, values, meant=meant, watched=_validations_decide(saved), recorded=recorded):
        raise ConfigError(
            [
                f"{key} is {_shown(changes[key][0])}{whose[key]}, but the run was started with "
                f"{_shown(changes[key][1])}; {why}"
                for key, why in reasons.items()
            ]
        )
    if LENGTH in changes and OmegaConf.select(saved, "phase.phases") and saved.phase.of_steps is None:
        saved.phase.of_steps = saved.trainer.max_steps
    own = {key: value for key in of_the_run if (value := OmegaConf.select(saved, key)) is not None}
    for _, key in given:
        OmegaConf.update(saved, key, OmegaConf.select(composed, key), merge=False, force_add=True)
    for key, value in own.items():  # also where the whole section was named again
        OmegaConf.update(saved, key, value)
    saved.resume = composed.resume
    return saved


def _saved(file: Path, schema: type) -> DictConfig:
    """The config that a run has kept, as data: what looks like an interpolation is refused."""
    config, reading = read_section(schema, SAVED.yaml(file))
    raise_problems([f"resume: {file}: {problem}" for problem in reading.problems])
    return OmegaConf.structured(config)


def _shown(value: Any) -> str:
    """A value as it is written in a config."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, enum_to_str=True)
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else str(value)


def _validations_decide(saved: DictConfig) -> bool:
    phases = OmegaConf.select(saved, "phase.phases") or {}
    return bool(OmegaConf.select(saved, "callbacks")) or any(phase.start == PLATEAU for phase in phases.values())


def _set_by(overrides: list[str], schema: type) -> list[tuple[str, str]]:
    """(override's name, key that it may set): itself, or every section where it is a group such as experiment."""
    sections = [field.name for field in fields(schema)]
    pairs = []
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        file = resource_dir("conf") / name / f"{value}.yaml"
        if name in OWN_KEYS_ONLY and file.exists():
            pairs += [(name, f"{name}.{key}") for key in OmegaConf.load(file)]
        elif name.split(".")[0] in sections:
            pairs.append((name, name))
        else:
            pairs += [(name, section) for section in sections]
    return list(dict.fromkeys(pairs))


def _differences(new: Any, old: Any, path: str) -> list[tuple[str, Any, Any]]:
    if OmegaConf.is_dict(new) and OmegaConf.is_dict(old):
        return [
            found
            for name in sorted({*new.keys(), *old.keys()})
            for found in _differences(new.get(name), old.get(name), f"{path}.{name}")
        ]
    return [] if new == old else [(path, new, old)]
