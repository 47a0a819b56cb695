"""Values by name in one text of a command line, such as code=DIR,chat=DIR or code=0.7,chat=0.3."""

import math

from lmoe.errors import ConfigError


def names_given(text: str | None) -> list[str]:
    """The names of `code=…,chat=…`; what is written otherwise is passed over."""
    pairs = [part.partition("=") for part in (text or "").split(",")]
    return [name.strip() for name, separator, _ in pairs if separator and name.strip()]


def named_places(text: str | None, what: str = "experts") -> dict[str, str]:
    """Places by name, read from `code=DIR,chat=DIR`.

    Args:
        what: these are, for messages.

    Raises:
        ConfigError: something without a name or a place, or a name twice.
    """
    places: dict[str, str] = {}
    for part in [part.strip() for part in (text or "").split(",") if part.strip()]:
        name, separator, place = part.partition("=")
        name, place = name.strip(), place.strip()
        if not separator or not name or not place:
            raise ConfigError(f"{what}: {part!r} is not name=value; write them as one=VALUE,other=VALUE")
        if name in places:
            raise ConfigError(f"{what}: {name} is named twice")
        places[name] = place
    return places


def named_weights(text: str | None, names: list[str]) -> dict[str, float] | None:
    """`0.7,0.3` in the order of the names, or `code=0.7,chat=0.3`, commas or blanks between; None: not given.

    Raises:
        ConfigError: another number of weights than names, or what is no finite number.
    """
    if text is None:
        return None
    parts = text.replace(",", " ").split()
    named = [part.partition("=") for part in parts]
    if parts and not any(separator for _, separator, _ in named):
        if len(parts) != len(names):
            raise ConfigError(f"weights: {len(parts)} numbers for {len(names)} experts ({', '.join(names)})")
        named = [(name, "=", part) for name, part in zip(names, parts, strict=True)]
    weights: dict[str, float] = {}
    for name, separator, value in named:
        if name in weights:
            raise ConfigError(f"weights: {name} is named twice")
        if not separator:
            raise ConfigError(f"weights: {name!r} has no name, and others have; write code=0.7,chat=0.3")
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ConfigError(f"weights: {name}={value} is no finite number")
    if not weights:
        raise ConfigError("weights: none given; write 0.7,0.3 or code=0.7,chat=0.3")
    return weights
