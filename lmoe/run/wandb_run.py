"""A W&B run that never asks for anything, and never keeps the work from starting: offline where it cannot be online."""

import netrc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmoe.errors import ConfigError
from lmoe.vocabulary import WandbMode

if TYPE_CHECKING:
    import wandb

LONGEST_NAME = 128
START_SECONDS = 30.0
"""How long W&B may wait for its server at the start, unless WANDB_INIT_TIMEOUT says otherwise."""
MODES = {"online": "online", "offline": "offline", "disabled": "disabled", "run": "online", "dryrun": "offline"}
"""What WANDB_MODE may be; the last two are its older names."""
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Under which `wandb login` has stored a key, if WANDB_BASE_URL names no server."""
KEY = "WANDB_API_KEY"


def wandb_mode(mode: WandbMode) -> str:
    """online, offline or disabled.

    auto is online only where an API key is stored or WANDB_MODE asks for it, so that W&B never prompts.

    Raises:
        ConfigError: online without a key, or a WANDB_MODE that is none.
    """
    asked = os.environ.get("WANDB_MODE", "").strip()
    if asked and asked not in MODES:
        raise ConfigError(f"WANDB_MODE={asked}: no such mode of W&B; allowed: online, offline, disabled, or unset it")
    if mode is not WandbMode.auto:
        mode_name = mode.value
    elif asked:
        mode_name = MODES[asked]
    else:
        mode_name = "online" if has_api_key() else "offline"
    if mode_name == "online" and not has_api_key():
        name = "WANDB_MODE" if mode is WandbMode.auto else "logger.mode"
        raise ConfigError(f"{name}=online, but no W&B API key is stored; run `wandb login`, or use {name}=offline")
    return mode_name


def check_environment() -> None:
    """Look at what W&B takes from the environment, before anything takes time. Empty variables count as unset.

    Raises:
        ConfigError: every variable that W&B would refuse. Of the key it is not asked: without one a run is offline.
    """
    import wandb  # slow to import, and only this kind needs it
    from wandb.errors import Error as WandbError

    problems = []
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        if not os.environ[name].strip():
            del os.environ[name]
        elif name not in (KEY, "WANDB_MODE"):
            try:
                wandb.Settings().update_from_env_vars({name: os.environ[name]})
            except (ValueError, TypeError, WandbError) as error:
                problems.append(f"{name}: W&B does not take it ({_reason(error)}); change it, or unset it")
    if problems:
        raise ConfigError(problems)


def has_api_key() -> bool:
    """Whether a key is in the environment, or stored by `wandb login`; it may be no good one."""
    if os.environ.get(KEY, "").strip():
        return True
    url = os.environ.get("WANDB_BASE_URL", "").strip()
    hosts = [url.split("//")[-1].split("/")[0]] if url else HOSTS
    try:
        stored = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(stored.authenticators(host) is not None for host in hosts)


def start_wandb(
    mode: str, arguments: Callable[[str], dict[str, Any]], folder: Path, say: Callable[[str], object]
) -> "tuple[wandb.Run, str]":
    """Start a W&B run; where that cannot be online, offline.

    Args:
        mode: see `wandb_mode`.
        arguments: of wandb.init, for a mode.
        folder: gets wandb/.
        say: told in one line that the run is offline though it was to be online, and why.

    Returns:
        The run, and the mode in which it is.
    """
    import wandb
    from wandb.errors import Error as WandbError

    settings = wandb.Settings(silent=True, console="off")
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings.init_timeout = START_SECONDS

    def start(mode: str) -> "wandb.Run":
        return wandb.init(
            **arguments(mode),
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            settings=settings,
            reinit="finish_previous",
        )

    before = _folders(folder)
    try:
        return start(mode), mode
    except (WandbError, OSError, ValueError) as error:  # no network, a key that is none, no such team
        if mode != "online":
            raise ConfigError(f"W&B cannot start a run: {_reason(error)}; logger=none leaves it out") from None
        say(f"W&B is not reached ({_reason(error)}): this run is recorded offline, to be uploaded with `wandb sync`")
    for begun in _folders(folder) - before:  # the try has left an empty run, which nobody is to upload
        shutil.rmtree(begun, ignore_errors=True)
    return start("offline"), "offline"


def _folders(folder: Path) -> set[Path]:
    return set((folder / "wandb").glob("run-*"))


def _reason(error: Exception) -> str:
    """The first thing that W&B says; of pydantic's errors, what was wrong with the value."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "validation error" in (lines or [""])[0] and len(lines) > 2:
        return lines[2].split(" [type=")[0]
    return lines[0].rstrip(".") if lines else type(error).__name__
