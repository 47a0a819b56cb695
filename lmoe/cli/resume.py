"""`resume=<run directory>`: the saved config, and which changes to it are safe."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from lmoe.errors import ConfigError
from lmoe.schema.resources import resource_dir
from lmoe.schema.run_folder import CONFIG_FILE

# Neither the weights nor the order of the data depends on these.
SAFE = (
    "logger",
    "name",
    "resume",
    "dry_run",
    "checkpoint",
    "analysis",
    "trainer.val_every_n_steps",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "data.num_workers",
    "data.cache_dir",
    "output",
    "eval_sft",
)


def run_to_resume(overrides: list[Override]) -> Path | None:
    """The folder named by resume=…, or None.

    Raises:
        ConfigError: it holds no run.
    """
    value = next((o.value() for o in reversed(overrides) if o.key_or_group == "resume"), None)
    if value is None:
        return None
    run = Path(str(value)).expanduser().resolve()
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"resume={value}: no {CONFIG_FILE} in this folder, so it holds no run")
    return run


def refuse_existing(run_dir: Path) -> None:
    """
    Raises:
        ConfigError: a new run would write over an old one.
    """
    if (run_dir / CONFIG_FILE).exists():
        raise ConfigError(
            f"{run_dir} already holds a run; resume={run_dir} continues it, another hydra.run.dir starts a new one"
        )


def merge_saved(composed: DictConfig, schema: type, overrides: list[str]) -> DictConfig:
    """The saved config with the overrides of this command.

    Raises:
        ConfigError: every override that would make another run of it, with both values.
    """
    saved = OmegaConf.merge(OmegaConf.structured(schema), _load(Path(composed.resume).expanduser() / CONFIG_FILE))
    problems: list[str] = []
    for name, key in _set_by(overrides, schema):
        group = (resource_dir("conf") / name).is_dir()
        for path, new, old in _differences(OmegaConf.select(composed, key), OmegaConf.select(saved, key), key):
            if not path.startswith(SAFE):
                whose = f" (from {name}=…)" if group else ""
                problems.append(
                    f"{path} is {new!r}{whose}, but the run was started with {old!r}; it cannot change on resume"
                )
        if not problems:
            OmegaConf.update(saved, key, OmegaConf.select(composed, key), force_add=True)
    if problems:
        raise ConfigError(problems)
    saved.resume = composed.resume
    assert isinstance(saved, DictConfig)
    return saved


def _load(file: Path) -> Any:
    try:
        return OmegaConf.load(file)
    except (OSError, YAMLError) as error:
        raise ConfigError(f"resume: {file} cannot be read: {' '.join(str(error).split())}") from None


def _set_by(overrides: list[str], schema: type) -> list[tuple[str, str]]:
    """(override's name, key that it may set): itself, or every section where it is a group such as experiment."""
    sections = [field.name for field in fields(schema)]
    names = dict.fromkeys(override.lstrip("+~").split("=", 1)[0] for override in overrides)
    return [(name, key) for name in names for key in ([name] if name.split(".")[0] in sections else sections)]


def _differences(new: Any, old: Any, path: str) -> list[tuple[str, Any, Any]]:
    if OmegaConf.is_dict(new) and OmegaConf.is_dict(old):
        return [
            found
            for name in sorted({*new.keys(), *old.keys()})
            for found in _differences(new.get(name), old.get(name), f"{path}.{name}")
        ]
    return [] if new == old else [(path, new, old)]
