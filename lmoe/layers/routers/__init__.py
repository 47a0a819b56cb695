"""The routers' classes; which one a name of the config means is declared in lmoe.rules.routers."""

from functools import cache
from pkgutil import resolve_name

from lmoe.layers.routers.base import LinearRouter, Router, RouterSettings
from lmoe.layers.routers.sequence import PromptReader, SequenceRouter
from lmoe.layers.routers.token import ReluRouter
from lmoe.rules.routers import ROUTERS
from lmoe.vocabulary import RouterKind, RouterScope

__all__ = ["LinearRouter", "PromptReader", "ReluRouter", "Router", "RouterSettings", "SequenceRouter", "router_class"]


@cache
def router_class(kind: RouterKind, scope: RouterScope = RouterScope.linear) -> type[Router]:
    """The class that is declared as this router.

    Raises:
        TypeError: it is no Router.
    """
    declared = ROUTERS[kind]
    name = declared.of_model if scope is RouterScope.model else declared.implementation
    found = resolve_name(name)
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise TypeError(f"lmoe/rules/routers.py: implementation={name} of {kind} is no subclass of Router")
    return found
