"""`lmoe serve`: a base with experts, or a trained mixture, over HTTP."""

import os
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lmoe.cli.errors import exit_code_of
from lmoe.cli.speak import SpeakerFlags, open_speaker
from lmoe.config.named_values import names_given
from lmoe.config.problems import raise_problems, without_effect
from lmoe.errors import ConfigError
from lmoe.files.places import expanded
from lmoe.files.wording import shown
from lmoe.serve.expert_names import name_problem
from lmoe.serve.settings import ServeSettings, read_settings
from lmoe.vocabulary import BlendRouter

if TYPE_CHECKING:
    from lmoe.generate.speaker import Speaker
    from lmoe.serve.request import Engine

EXTRA = ("starlette", "uvicorn", "prometheus_client", "pydantic", "python_multipart")
OF_EXPERTS = ("experts", "weights", "fit")
"""Flags that name something of each expert, which a file may write as a mapping."""
StartEngine = Callable[["Speaker", ServeSettings], Awaitable["Engine"]]


@dataclass(slots=True, frozen=True, kw_only=True)
class Play:
    """What `lmoe play` has beside a server.

    Args:
        defaults: settings that are others than those of `lmoe serve`.
        browser: open the page in the user's browser.
    """

    defaults: Mapping[str, Any]
    browser: bool


def run(flags: Mapping[str, Any], settings: Mapping[str, Any], *, config: str | None, play: Play | None = None) -> int:
    """Returns the exit code.

    Args:
        flags: those of `SpeakerFlags` that were given.
        settings: those of `ServeSettings` that were given.
        config: file of both; what was given wins.
        play: of the playground; None: there is none.
    """

    async def start(speaker: "Speaker", found: ServeSettings) -> "Engine":
        from lmoe.serve.engine.start import start_engine

        return await start_engine(speaker, found)

    return exit_code_of(lambda: serve(flags, settings, config=config, play=play, start=start))


def serve(
    flags: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    config: str | None,
    start: StartEngine,
    play: Play | None = None,
    open_it: Callable[..., "Speaker"] = open_speaker,
) -> None:
    """Serve until a signal. All that can be known to be wrong is said before a model is loaded.

    Args:
        flags, settings, config, play: as for `run`.
        start: makes the engine, on the event loop of the server.
        open_it: loads what speaks.

    Raises:
        LmoeError: settings that cannot be, packages that are missing, a port in use, whatever loading meets.
    """
    found = settled(flags, settings, config, None if play is None else play.defaults)
    speaks, chosen = found.speaks, found.settings
    check_extra("serve" if play is None else "play")
    from lmoe.serve.http.auth import ADMIN, keys_of
    from lmoe.serve.http.playground import Playground, has_display, open_in_browser
    from lmoe.serve.http.request_log import RequestLog
    from lmoe.serve.http.run import listening_socket
    from lmoe.serve.http.run import run as run_server
    from lmoe.serve.http.service import Service

    keys, playground = keys_of(), None
    if play is not None:
        shown_by = open_in_browser if play.browser and has_display(os.environ) else None
        playground = Playground(keys, browser=shown_by)
        keys = playground.keys
    if not keys.admin:
        nobody = f"without {ADMIN} or {ADMIN}_FILE: nobody may"
        may = {"room": "add an expert", "upload_size": "upload one"}
        asked = [name for name in may if name in found.given and getattr(chosen, name)]
        raise_problems([without_effect(name, f"{nobody} {may[name]}") for name in asked])
    place = None if chosen.log_file is None else expanded(chosen.log_file)
    log = RequestLog(place, failures_alone=play is not None and place is None)
    with listening_socket(chosen, else_any=play is not None and "port" not in found.given) as bound:
        from lmoe.serve.prompts import Prompts

        speaker = open_it(speaks, room=chosen.room)

        async def make() -> Service:
            engine = await start(speaker, chosen)
            prompts = Prompts.of(speaker)
            return Service(engine=engine, prompts=prompts, settings=chosen, keys=keys, log=log, playground=playground)

        run_server(make, bound, say)


@dataclass(slots=True, frozen=True, kw_only=True)
class Settled:
    """What flags, file and defaults come to.

    Args:
        speaks: which model speaks.
        settings: of the server.
        given: names of the settings that somebody chose.
    """

    speaks: SpeakerFlags
    settings: ServeSettings
    given: Collection[str]


def settled(
    flags: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: str | None,
    defaults: Mapping[str, Any] | None = None,
) -> Settled:
    """Which model speaks, and the settings: what was given, else what the file says, else the defaults.

    Args:
        defaults: of settings, in place of those of `ServeSettings`; None: those.

    Raises:
        ConfigError: all problems at once.
    """
    names = [field.name for field in fields(SpeakerFlags)]
    own, others = ({}, {}) if config is None else read_settings(config, names)
    problems = _flag_problems(others)
    speaks = SpeakerFlags(**({name: _flag(name, value) for name, value in others.items()} | dict(flags)))
    problems += [] if problems else speaks.problems()
    given = own | dict(settings)
    problems += [] if problems else _idle_settings(speaks, given)
    chosen = ServeSettings()
    try:
        chosen = ServeSettings(**(dict(defaults or {}) | given))
    except ConfigError as error:
        problems += error.problems
    raise_problems([*problems, *_name_problems(speaks, chosen)])
    return Settled(speaks=speaks, settings=chosen, given=frozenset(given))


def _idle_settings(speaks: SpeakerFlags, given: Mapping[str, Any]) -> list[str]:
    """Settings for experts that come later, where none can; a 0 says what is so anyway."""
    if speaks.checkpoint is not None:
        why = "with --checkpoint: the experts of a run neither come nor go"
    elif speaks.experts is None:
        why = "without --experts"
    elif speaks.head is not None:
        why = "with --head: none comes to the experts that it was trained with"
    elif speaks.router == BlendRouter.arrow:
        why = "with --router arrow: the experts that its tokens choose among neither come nor go"
    else:
        return []
    return [without_effect(name, why) for name in ("room", "upload_size") if given.get(name)]


def _name_problems(speaks: SpeakerFlags, chosen: ServeSettings) -> list[str]:
    """Experts that nobody could ask for or change: by names that no path can hold, or by that of the whole model."""
    experts = names_given(speaks.experts)
    problems = [problem for name in experts if (problem := name_problem(name)) is not None]
    if chosen.name not in experts:
        return problems
    taken = f"an expert has the name {shown(chosen.name)}, as the served model does: give one of them another (--name)"
    return [*problems, taken]


def _flag_problems(others: Mapping[str, Any]) -> list[str]:
    """What of a file can be no flag."""
    kinds: dict[str, tuple[type, ...]] = {
        "experts_top_k": (int,),
        "router_temperature": (int, float),
        "trust_remote_code": (bool,),
    }
    problems = []
    for name, value in others.items():
        if name in OF_EXPERTS and isinstance(value, dict):
            entries = [value] if any("," in f"{key}{place}" for key, place in value.items()) else []
            problems += [f"{name} is {shown(entry)}, whose names and values must have no comma" for entry in entries]
        elif value is not None and type(value) not in kinds.get(name, (str,)):
            wanted = " or ".join(kind.__name__ for kind in kinds.get(name, (str,)))
            problems.append(f"{name} is {shown(value)}, must be {wanted.replace('str', 'a text')}")
    return problems


def _flag(name: str, value: Any) -> Any:
    """A value of a file as its flag takes it."""
    if name in OF_EXPERTS and isinstance(value, dict):
        return ",".join(f"{key}={place}" for key, place in value.items())
    return False if name == "trust_remote_code" and value is None else value


def check_extra(verb: str = "serve") -> None:
    """See that the packages of the server are installed.

    Args:
        verb: that needs them.

    Raises:
        ConfigError: they are not.
    """
    from importlib.util import find_spec

    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f'lmoe {verb} needs {", ".join(missing)}: pip install "lmoe[serve]"')


def say(line: str) -> None:
    """Write a line for the operator, where there is still a terminal."""
    with suppress(OSError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
