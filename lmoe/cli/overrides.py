"""The settings of a command line: what is wrong with them before anything is composed, and how Hydra takes the rest."""

from dataclasses import dataclass, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_origin

import yaml
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Transformer
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lmoe.cli.compose import compose_config
from lmoe.cli.launchers import launcher_problem
from lmoe.cli.resume import run_to_resume
from lmoe.config.keys import field_type, is_section, near, target, unknown_key
from lmoe.config.read import no_mapping, value_problems
from lmoe.errors import ConfigError
from lmoe.files.places import is_dir
from lmoe.files.resources import resource_dir
from lmoe.files.run_folder import hydra_quoted, name_problems
from lmoe.files.wording import shown

CONFIG_DIR, SEARCHPATH = ("--config-dir", "-cd"), "hydra.searchpath="
"""How a command names folders with more choices for a group."""
MULTIRUN = ("-m", "--multirun")
TAKE_A_VALUE = (
    *CONFIG_DIR,
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--experimental-rerun"),
    *("--info", "-i"),
)
"""Options of Hydra with a value behind them."""
MOST_LEVELS = 20
"""Of lists in lists in a value."""
MOST_VALUES = 1000
"""Of one setting of a multirun that are looked at before it starts."""


@dataclass(slots=True, kw_only=True)
class Command:
    """A command line, taken apart.

    Args:
        arguments: what Hydra gets.
        settings: those of them that set something.
        problems: of settings that are left out.
        multirun: whether it is one.
        places: arguments that name folders with more choices.
    """

    arguments: list[str]
    settings: list["Setting"]
    problems: list[str]
    multirun: bool
    places: list[str]


@dataclass(slots=True, frozen=True, kw_only=True)
class Setting:
    """One override.

    Args:
        text: as it was written.
        parsed: by Hydra's grammar.
        values: in a multirun those that it takes, as far as they can be counted; else the one.
        choices: where its key is a group: its files by name; none where they are not known.
    """

    text: str
    parsed: Override
    values: tuple[Any, ...]
    choices: dict[str, Path] | None

    @property
    def key(self) -> str:
        """Dotted key, or group."""
        return self.parsed.key_or_group

    @property
    def of_hydra(self) -> bool:
        """Whether it is one of Hydra's own."""
        return self.key.split(".")[0] == "hydra" or self.key.startswith("hydra/")

    @property
    def sets_value(self) -> bool:
        """Whether it gives a key of the config a value."""
        return self.choices is None and not self.of_hydra and not self.parsed.is_delete()

    @property
    def first(self) -> str:
        """Text of the setting with the first of its values."""
        swept = self.parsed.is_sweep_override() and self.values
        return f"{self.parsed.get_key_element()}={self.values[0]}" if swept else self.text


def read_command(argv: list[str], config_name: str, schema: type) -> Command:
    """The command line, with the problem of each setting that cannot be.

    Args:
        argv: arguments.
        config_name: which file of conf/ is composed.
        schema: its dataclass.
    """
    arguments, places, multirun = options_first(argv), own_folders(argv), any(flag in argv for flag in MULTIRUN)
    given = {
        number: text
        for number, text in enumerate(arguments)
        if not (text.startswith("-") or text in places or (number and arguments[number - 1] in TAKE_A_VALUE))
    }
    folders = _choice_folders(places)
    settings, problems = _read_settings(given, schema, folders, multirun=multirun)
    problems += [f"{folder}: no such folder of choices" for folder in folders or [] if not is_dir(folder)]
    run = None
    try:
        run = run_to_resume([setting.parsed for setting in settings.values()])
    except ConfigError as error:
        problems += error.problems
    if run is None:
        absent = _absent_entries(list(settings.values()), config_name, schema, places)
        problems += absent.values()
        settings = {number: setting for number, setting in settings.items() if setting.text not in absent}
    elif multirun:
        problems.append("resume continues one run, so it cannot be part of a multirun; leave out -m")
    settings = {number: _as_hydra_takes_it(setting, schema) for number, setting in settings.items()}
    kept = [
        settings[number].text if number in settings else text
        for number, text in enumerate(arguments)
        if number in settings or number not in given
    ]
    own = [f"hydra.run.dir={hydra_quoted(run)}"] if run is not None else []
    return Command(
        arguments=kept + own, settings=list(settings.values()), problems=problems, multirun=multirun, places=places
    )


def _read_settings(
    given: dict[int, str], schema: type, folders: list[Path] | None, *, multirun: bool
) -> tuple[dict[int, Setting], list[str]]:
    """Settings without a problem by themselves, and the problems of the others."""
    settings, problems = {}, []
    for number, text in given.items():
        try:
            setting = _setting(text, folders)
        except ValueError as error:
            problems.append(str(error))
            continue
        if (problem := _problem(setting, schema, multirun=multirun)) is None:
            settings[number] = setting
        else:
            problems.append(problem)
    return settings, problems


def options_first(argv: list[str]) -> list[str]:
    """The same arguments, with -m and folders of choices in front."""
    first = [*(arg for arg in argv if arg in MULTIRUN), *own_folders(argv)]
    rest = list(argv)
    for arg in first:
        rest.remove(arg)
    return first + rest


def own_folders(argv: list[str]) -> list[str]:
    """The arguments that name folders with more choices for a group."""
    found = []
    for number, arg in enumerate(argv):
        if arg in CONFIG_DIR:
            found += argv[number : number + 2]
        elif arg.startswith(f"{CONFIG_DIR[0]}=") or arg.lstrip("+").startswith(SEARCHPATH):
            found.append(arg)
    return found


def _choice_folders(places: list[str]) -> list[Path] | None:
    """conf/ and the folders that a command names; None where one of them cannot be looked into from here."""
    folders = [resource_dir("conf")]
    for place in places:
        if place in CONFIG_DIR:
            continue
        name, _, value = place.partition("=")
        if name.lstrip("+") != SEARCHPATH.rstrip("="):
            folders.append(Path(value if name in CONFIG_DIR else place))
            continue
        found = [text.strip().strip("'\"") for text in value.strip("[]").split(",")]
        if any("://" in text and not text.startswith("file://") for text in found):
            return None
        folders += [Path(text.removeprefix("file://")) for text in found]
    return folders


def _setting(text: str, folders: list[Path] | None) -> Setting:
    """One setting of the command line, read by Hydra's grammar.

    Raises:
        ValueError: the problem of one that cannot be read.
    """
    if "=" not in text and not text.startswith("~"):
        raise ValueError(f"{shown(text)} is no setting; write key=value")
    try:
        parsed = OverridesParser.create().parse_override(text)
        value = parsed.value()
    except (HydraException, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise ValueError(
            f"{shown(text)} cannot be read: {shown(reason)}; text with spaces, commas or = needs quotes, as in "
            "'name=\"a b\"'"
        ) from None
    if _is_deeper(value, MOST_LEVELS):
        raise ValueError(f"{shown(text)} is nested more than {MOST_LEVELS} deep, which nothing here needs")
    choices = _choices(parsed.key_or_group, folders)
    if parsed.is_sweep_override():
        discrete = parsed.is_discrete_sweep() and not isinstance(value, Glob)
        values = tuple(islice(parsed.sweep_iterator(Transformer.encode), MOST_VALUES)) if discrete else ()
    else:
        values = tuple(value) if isinstance(value, list) and choices is not None else (value,)
    return Setting(text=text, parsed=parsed, values=values, choices=choices)


def _choices(key: str, folders: list[Path] | None) -> dict[str, Path] | None:
    """The names of a group's files, none where they are not known; None: no group."""
    places = [folder / key for folder in folders or [resource_dir("conf")]]
    if "." in key or not any(is_dir(place) for place in places):
        return None
    return {file.stem: file for place in reversed(places) if folders for file in place.glob("*.yaml")}


def _is_deeper(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inner))


def _problem(setting: Setting, schema: type, *, multirun: bool) -> str | None:
    """What is wrong with a setting by itself."""
    parsed, key = setting.parsed, setting.key
    if parsed.is_sweep_override() and not multirun:
        return (
            f"{shown(setting.text)}: several values are a multirun, which needs -m; a list is written [1,2], and text "
            "with a comma in quotes"
        )
    if setting.of_hydra:
        launcher = launcher_problem(parsed, multirun=multirun)
        known = "/" in key or parsed.is_add() or parsed.is_force_add()
        return launcher or (None if known else unknown_key(HydraConf, key.split(".")[1:], "hydra"))
    if setting.choices is not None:
        return None if parsed.is_delete() else _choice_problem(setting, setting.choices)
    if (unknown := unknown_key(schema, key.split("."))) is not None:
        return unknown
    if key == "name" and (wrong_names := [p for value in setting.values for p in name_problems(_unquoted(value))]):
        return wrong_names[0]  # before Hydra makes the folder
    hint = target(schema, key)
    if parsed.is_delete():
        may_go = _entry(schema, key) == key or (hint is Any and _is_free(schema, key))
        return None if may_go else f"{shown(setting.text)}: a setting cannot be taken away; give it another value"
    wrong = [value for value in setting.values if hint is not Any and isinstance(value, dict) is not is_section(hint)]
    if is_section(hint):
        return no_mapping(hint, wrong[0], key) if wrong else None
    return next(
        (problem for value in wrong if isinstance(value, dict) for problem in value_problems(hint, value, key)), None
    )


def _unquoted(value: Any) -> str:
    """A value of a multirun is written as in a command."""
    text = str(value)
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def _choice_problem(setting: Setting, choices: dict[str, Path]) -> str | None:
    for value in setting.values:
        name = str(value).strip("'\"") if value is not None else "null"
        if value is None or (choices and name not in choices and setting.parsed.package is None):
            return f"{setting.key}={shown(name)}: no such choice; {near(name, sorted(choices))}"
        if name in choices and (reason := _unreadable(choices[name])) is not None:
            return f"{setting.key}={name}: {choices[name]} cannot be read: {reason}"
    return None


def _unreadable(file: Path) -> str | None:
    """Why a file is no YAML, or None."""
    try:
        yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError, RecursionError) as error:
        return " ".join(str(error).split())
    return None


def _entry(schema: type, key: str) -> str | None:
    """The entry of a mapping, such as phase.phases.experts, that a key sets or lies in."""
    current: Any = schema
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if get_origin(current) is dict:
            return ".".join(parts[: depth + 1])
        if not (is_dataclass(current) and isinstance(current, type)):
            return None
        current = field_type(current, part)
    return None


def first_point(command: Command) -> list[str]:
    """The settings of the first job of a command, for composing them without running anything."""
    settings = [s.first for s in command.settings if not (s.of_hydra and s.text in command.places)]
    return [*searchpath(command.places), *settings]


def _absent_entries(settings: list[Setting], config_name: str, schema: type, places: list[str]) -> dict[str, str]:
    """The problem of each setting of an entry that neither a file nor another setting makes, by its text."""
    values = [s for s in settings if s.choices is None and not s.of_hydra]
    adds = {_entry(schema, s.key) for s in values if s.parsed.is_add() or s.parsed.is_force_add()}
    needs = {s.text: entry for s in values if (entry := _entry(schema, s.key)) is not None and entry not in adds}
    if not needs:
        return {}
    try:
        base = compose_config(
            config_name, schema, [*searchpath(places), *(s.first for s in settings if s.choices is not None)]
        )
    except (HydraException, OmegaConfBaseException):
        return {}  # Hydra says it again, and better, when the command is composed
    problems = {}
    for text, entry in needs.items():
        mapping, _, name = entry.rpartition(".")
        there = OmegaConf.select(base, mapping) or {}
        gone = text.startswith("~") and OmegaConf.select(base, text[1:].split("=")[0]) is None
        if name not in there or gone:
            cure = near(name, [str(other) for other in there]) if there else "there is none"
            problems[text] = f"{shown(text)}: there is no {entry}; {cure} (+{entry}.…=… adds one)"
    return problems


def searchpath(places: list[str]) -> list[str]:
    """Folders of choices as a setting of Hydra."""
    folders = _choice_folders(places)
    own = [f"'file://{folder.resolve()}'" for folder in (folders or [])[1:] if is_dir(folder)]
    return [f"hydra.searchpath=[{','.join(own)}]"] if own else []


def _as_hydra_takes_it(setting: Setting, schema: type) -> Setting:
    """The setting with ++ where its key is not in the files of conf/, which has been found to be right."""
    plus = setting.parsed.is_add() or setting.parsed.is_force_add()
    inside = setting.sets_value and (_entry(schema, setting.key) is not None or _is_free(schema, setting.key))
    whole = any(isinstance(value, dict) for value in setting.values)
    if not setting.sets_value or not (plus or inside or whole):
        return setting
    text = f"++{setting.text.lstrip('+')}"
    return replace(setting, text=text, parsed=OverridesParser.create().parse_override(text))


def _is_free(schema: type, key: str) -> bool:
    """Whether a key lies inside a value of any shape."""
    current: Any = schema
    for part in key.split("."):
        if not (is_dataclass(current) and isinstance(current, type)):
            return True
        current = field_type(current, part)
    return False
