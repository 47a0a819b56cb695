"""What a server is started with: limits, where it listens, what it keeps free."""

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from lmoe.config.keys import near
from lmoe.config.problems import raise_problems
from lmoe.errors import ConfigError
from lmoe.files.places import expanded, is_dir
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown

NAME = "lmoe"
MOST = 1_000_000_000
SECRET = ("key", "token", "secret", "password")
"""Words in a key that ask for what no file of settings may hold."""
SECRETS = (
    "keys and tokens do not belong into a file of settings; set LMOE_API_KEY or LMOE_API_KEY_FILE, LMOE_ADMIN_TOKEN or "
    "LMOE_ADMIN_TOKEN_FILE in the environment"
)
BOUNDS: Mapping[str, tuple[type, float, float]] = {
    "port": (int, 0, 65_535),
    "max_batch_tokens": (int, 1, MOST),
    "max_requests": (int, 1, 4_096),
    "max_queue": (int, 0, 1_000_000),
    "cache_tokens": (int, 16, MOST),
    "max_tokens": (int, 1, MOST),
    "max_n": (int, 1, 1_024),
    "request_size": (int, 1_000, 1_000_000_000),
    "upload_size": (int, 0, 1_000_000_000_000),
    "timeout": (float, 0.001, 1_000_000),
    "patience": (float, 0, 1_000_000),
    "room": (int, 0, 65_536),
}
"""Type, least and most of each number."""


@dataclass(slots=True, frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a server.

    Args:
        host, port: where it listens; port 0: any free one.
        name: of the model that clients ask for.
        max_batch_tokens: in one forward.
        max_requests: rows in the batch.
        max_queue: requests that wait for a row; more are refused.
        cache_tokens: that the KV cache holds; None: the engine decides.
        max_tokens: of an answer, whatever the request asks.
        max_n: answers to one request.
        request_size: bytes of a request's body.
        upload_size: bytes of an expert that is uploaded; 0: none is taken.
        timeout: seconds that a request may take, its wait included.
        patience: seconds that requests under way have to end when the server stops.
        warm_up: whether it answers itself once before it says that it is ready.
        log_file: of the request log; None: standard error.
        allow_origin: web pages that may ask from a browser; "*": all.
        room: ranks kept free for experts that come later.

    Raises:
        ConfigError: values that cannot be, all of them at once.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = NAME
    max_batch_tokens: int = 512
    max_requests: int = 16
    max_queue: int = 64
    cache_tokens: int | None = None
    max_tokens: int = 2_048
    max_n: int = 8
    request_size: int = 4_000_000
    upload_size: int = 0
    timeout: float = 600.0
    patience: float = 30.0
    warm_up: bool = True
    log_file: str | None = None
    allow_origin: tuple[str, ...] = ()
    room: int = 32

    def __post_init__(self) -> None:
        raise_problems(
            [
                *(problem for name in BOUNDS if (problem := self._number_problem(name))),
                *(problem for name in ("host", "name") if (problem := self._text_problem(name))),
                *self._log_problems(),
                *self._origin_problems(),
                *self._switch_problems(),
            ]
        )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def _number_problem(self, name: str) -> str | None:
        kind, least, most = BOUNDS[name]
        value: Any = getattr(self, name)
        if value is None and name == "cache_tokens":
            return None
        kinds = int | float if kind is float else int
        if isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most:  # which a NaN is not
            return None
        called = "a whole number" if kind is int else "a number"
        return f"{name} is {shown(value)}, must be {called} from {least:,} to {most:,}"

    def _text_problem(self, name: str) -> str | None:
        value = getattr(self, name)
        if isinstance(value, str) and value.strip() == value and value.isprintable() and 0 < len(value) <= 255:
            return None
        return f"{name} is {shown(value)}, must be a text of 1 to 255 characters without blanks around it"

    def _switch_problems(self) -> list[str]:
        return [] if isinstance(self.warm_up, bool) else [f"warm_up is {shown(self.warm_up)}, must be true or false"]

    def _log_problems(self) -> list[str]:
        if self.log_file is None:
            return []
        if not isinstance(self.log_file, str) or not self.log_file:
            return [f"log_file is {shown(self.log_file)}, must be a file to write"]
        path = expanded(self.log_file)
        if is_dir(path):
            return [f"log_file is {shown(self.log_file)}, which is a folder; name a file in it"]
        return [] if is_dir(path.parent) else [f"log_file is {shown(self.log_file)}: there is no folder {path.parent}"]

    def _origin_problems(self) -> list[str]:
        if not isinstance(self.allow_origin, tuple):
            return [f"allow_origin is {shown(self.allow_origin)}, must be a list of origins"]
        return [
            f"allow_origin is {shown(origin)}, must be * or an origin such as https://example.org, without a path"
            for origin in self.allow_origin
            if origin != "*" and not _is_origin(origin)
        ]


def _is_origin(origin: object) -> bool:
    if not isinstance(origin, str) or not origin.isprintable():
        return False
    try:
        parts = urlsplit(origin)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and origin == f"{parts.scheme}://{parts.netloc}"
        )
    except ValueError:
        return False


def read_settings(place: str, others: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a server that a YAML file holds, and beside them values of other keys, unchecked.

    Args:
        place: the file.
        others: keys that are none of `ServeSettings`.

    Raises:
        ConfigError: it cannot be read, or holds unknown keys, keys of both spellings, or what looks like a secret.
    """
    found = Reader(error=ConfigError).yaml(expanded(place))
    own = [field.name for field in fields(ServeSettings)]
    settings: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    problems = []
    for written, value in found.items():
        key = written.replace("-", "_")
        if key in settings or key in rest:
            problems.append(f"{written}: given twice, with - and with _")
        elif key in own:
            settings[key] = value
        elif key in others:
            rest[key] = value
        elif any(word in key.lower() for word in SECRET):
            problems.append(f"{shown(written)}: {SECRETS}")
        else:
            problems.append(f"{shown(written)}: no such key; {near(key, [*own, *others])}")
    if problems:
        raise ConfigError([f"{place}: {problem}" for problem in problems])
    if isinstance(origins := settings.get("allow_origin"), str | list):
        settings["allow_origin"] = (origins,) if isinstance(origins, str) else tuple(origins)
    elif "allow_origin" in settings:
        settings["allow_origin"] = () if origins is None else settings["allow_origin"]
    return settings, rest
