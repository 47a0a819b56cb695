"""Who may ask, and who may change experts: keys that come from the environment, and never from an argument."""

import hmac
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers

from lmoe.errors import ConfigError
from lmoe.files.places import expanded
from lmoe.files.small_file import Reader
from lmoe.serve.http.problem import Problem

KEY, ADMIN = "LMOE_API_KEY", "LMOE_ADMIN_TOKEN"
OPEN = ("/health",)
"""Paths that need no key."""


@dataclass(slots=True, frozen=True)
class Keys:
    """The keys of a server.

    Args:
        api: any of them lets ask; none: everybody may.
        admin: let change experts, and ask; none: nobody may change any.
    """

    api: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        return f"Keys({len(self.api)} of the API, {len(self.admin)} of the administration)"

    def check(self, headers: Headers) -> None:
        """See that a request may ask.

        Raises:
            Problem: it has no key, or another one.
        """
        if self.api and not self._has(headers, (*self.api, *self.admin)):
            raise _unknown("the API key is missing or wrong; send it as Authorization: Bearer KEY")

    def check_admin(self, headers: Headers) -> None:
        """See that a request may change experts.

        Raises:
            Problem: nobody may, or it has no admin token.
        """
        if not self.admin:
            message = f"experts cannot be changed here: the server was started without {ADMIN} or {ADMIN}_FILE"
            raise Problem(403, message, code="admin_off")
        if not self._has(headers, self.admin):
            raise _unknown("the admin token is missing or wrong; send it as Authorization: Bearer TOKEN")

    def let_change(self, headers: Headers) -> bool:
        """Whether a request may change experts."""
        return self._has(headers, self.admin)

    @staticmethod
    def _has(headers: Headers, keys: Collection[bytes]) -> bool:
        """Whether a request brings one of the keys; the time that this takes tells nothing of them."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        content = given.strip().encode("utf-8", errors="replace")
        matches = [hmac.compare_digest(content, key) for key in keys]
        return any(matches) and scheme.lower() == "bearer"


def _unknown(message: str) -> Problem:
    return Problem(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def keys_of(environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys that the environment, or a file that it names, holds: separated by blanks, commas or lines.

    Raises:
        ConfigError: a variable that is set and empty, both of a pair, a file that cannot be read.
    """
    problems: list[str] = []
    found = {name: _read(name, environment, problems) for name in (KEY, ADMIN)}
    if problems:
        raise ConfigError(problems)
    return Keys(api=found[KEY], admin=found[ADMIN])


def _read(name: str, environment: Mapping[str, str], problems: list[str]) -> tuple[bytes, ...]:
    text, place = environment.get(name), environment.get(f"{name}_FILE")
    if text is None and place is None:
        return ()
    if text is not None and place is not None:
        problems.append(f"{name} and {name}_FILE are both set; unset one of them")
        return ()
    what = name
    if place is not None:
        what = f"{name}_FILE"
        try:
            text = Reader(error=ConfigError, what="a file of keys").text(expanded(place))
        except ConfigError as error:
            problems += [f"{what}: {problem}" for problem in error.problems]
            return ()
    keys = tuple((text or "").replace(",", " ").split())
    if not keys:
        problems.append(f"{what} is set and holds no key; unset it, or give one")
    if not all(key.isascii() and key.isprintable() for key in keys):
        problems.append(f"{what}: a key has letters that no header can hold; take ASCII ones")
    return tuple(key.encode() for key in keys)
