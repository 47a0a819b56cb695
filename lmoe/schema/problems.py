"""Problems of a config: collected as text, raised together."""

from lmoe.errors import ConfigError


def raise_problems(problems: list[str]) -> None:
    """
    Raises:
        ConfigError: if there is any problem; its message lists them all.
    """
    if problems:
        raise ConfigError(problems)


def at_least(value: float, least: float, key: str) -> list[str]:
    """One problem if a value is too small."""
    return [] if value >= least else [f"{key} is {value}, must be at least {least}"]


def above_zero(value: float | None, key: str) -> list[str]:
    """One problem if a value is given and not above 0."""
    return [] if value is None or value > 0 else [f"{key} is {value}, must be above 0"]


def without_effect(key: str, why: str) -> str:
    """The problem of a setting that the user changed and that cannot act."""
    return f"{key} has no effect {why}; leave it out"
