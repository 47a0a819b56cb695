"""Chat templates that must end: a template comes with a model from anywhere, and Jinja's sandbox lets it loop for ever.

A rendering has a limit of time, which is looked at in each round of a loop, in each macro, call, filter and operation,
and limits of size, so that no single one of these takes long or fills the memory.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

SECONDS = 10.0
"""Of one rendering; an ordinary one takes a millisecond."""
CHARACTERS = 64_000_000
"""Of any text that a template makes, and items of any list."""
NUMBER, BITS = 100_000, 10_000
"""Largest whole number that is handed to a function, as Jinja's largest range; and size of a computed one."""
WIDENS = frozenset({"center", "expandtabs", "indent", "ljust", "rjust", "tojson", "wordwrap", "zfill"})
"""Calls whose result may be as long as a text times a number."""
WIDE = re.compile(r"%[^%a-zA-Z]*(\*|\d{6})|\{[^{}]*:[^{}]*(\{|\d{6})")
"""A width in a format that no template needs: a large one, or one that is computed."""


class TooMuchError(SecurityError):
    """A template took too long, or made too much."""


@dataclass(slots=True)
class Limit:
    """What is left of one rendering.

    Args:
        ends: when, on the clock of time.monotonic.
        written: characters so far.
    """

    ends: float
    written: int = 0

    def look(self, more: int = 0) -> None:
        """Count what is written, and stop a rendering that takes too long or writes too much.

        Raises:
            TooMuchError: the time is over, or too much is written.
        """
        if time.monotonic() > self.ends:
            raise TooMuchError(f"it takes more than {SECONDS:g} s, as one does that loops for ever")
        self.written += more
        if self.written > CHARACTERS:
            raise TooMuchError(f"it writes more than {CHARACTERS:,} characters")


_limit: ContextVar[Limit] = ContextVar("limit of the rendering under way")


def look(written: int) -> bool:
    """Look at the limit in each round of a loop and each macro; NOTE called from compiled templates."""
    _limit.get().look(written)
    return True


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Looks at the limit wherever Jinja lets an environment look."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _limit.get().look()
        _check_operation(operator, left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _limit.get().look()
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # the sandbox wraps str.format
        texts = [owner] if isinstance(owner, str) else []
        _check_call(getattr(obj, "__name__", ""), [*texts, *args, *kwargs.values()])
        return _checked(super().call(context, obj, *args, **kwargs))


def render(source: str, variables: dict[str, Any]) -> str:
    """What `apply_chat_template` of Transformers renders, within the limits.

    Raises:
        TooMuchError: beyond them.
        Exception: whatever a template may raise.
    """
    return "".join(_pieces(_compiled(source), variables, []))


def render_with_generation(source: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The same, and the (start, end) characters of what {% generation %} marks.

    Raises: as render.
    """
    template = _compiled(source)
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    with template.environment.activate_tracker(pieces, spans):  # type: ignore[attr-defined] # Transformers adds it
        _pieces(template, variables, pieces)
    return "".join(pieces), [(int(start), int(end)) for start, end in spans]


def _pieces(template: Template, variables: dict[str, Any], pieces: list[str]) -> list[str]:
    token = _limit.set(Limit(time.monotonic() + SECONDS))
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
    finally:
        _limit.reset(token)
    return pieces


def environment() -> LimitedEnvironment:
    """One with the extensions, filters and functions of Transformers' own."""
    theirs = chat_template_utils._compile_jinja_template("").environment  # NOTE it computes constants without a limit
    own = LimitedEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        keep_trailing_newline=theirs.keep_trailing_newline,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    own.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    own.tests = dict(theirs.tests)
    own.filters = {name: _limited(name, function) for name, function in theirs.filters.items()}
    own.filters[WRITTEN] = _written
    return own


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    own = environment()
    tree = own.parse(source)
    _add_looks(tree)
    return own.from_string(tree)


WRITTEN = "written"


def _written(value: Any) -> Any:
    _limit.get().look(len(value) if isinstance(value, str) else 0)
    return value


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # with what tells Jinja to hand over the context
    def limited(*args: Any, **kwargs: Any) -> Any:
        _limit.get().look()
        _check_call(name, [*args, *kwargs.values()])
        return _checked(function(*args, **kwargs))

    return limited


def _add_looks(tree: nodes.Template) -> None:
    """Put looks at the limit into loops and macros, and where text is joined or written."""
    for node in list(tree.find_all(nodes.For)):
        node.body = [_look_node(node.body), *node.body]
        if node.test is not None:  # a loop whose test fails has no body
            node.test = nodes.And(_look_call(0), node.test)
    for kind in (nodes.Macro, nodes.CallBlock, nodes.Block):
        for node in list(tree.find_all(kind)):
            node.body = [_look_node(node.body), *node.body]
    for node in list(tree.find_all(nodes.Output)):
        node.nodes = [
            piece if isinstance(piece, nodes.TemplateData) else _filtered(piece, WRITTEN) for piece in node.nodes
        ]
    _wrap_joins(tree)
    assert tree.environment is not None
    tree.set_environment(tree.environment)


def _wrap_joins(node: nodes.Node) -> None:
    """`a ~ b` as (a ~ b)|string, which is the same, and is looked at."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            wrapped = [_filtered(item, "string") if isinstance(item, nodes.Concat) else item for item in value]
            setattr(node, name, wrapped)
        elif isinstance(value, nodes.Concat):
            setattr(node, name, _filtered(value, "string"))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, nodes.Node):
                _wrap_joins(child)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _look_call(written: int) -> nodes.Call:
    return nodes.Call(nodes.ImportedName(f"{__name__}.look"), [nodes.Const(written)], [], None, None, lineno=1)


def _look_node(body: Sequence[nodes.Node]) -> nodes.ExprStmt:
    """Counts what the body writes of the template's own text."""
    own = sum(len(data.data) for node in body for data in node.find_all(nodes.TemplateData))
    return nodes.ExprStmt(_look_call(own), lineno=1)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        _check_call("format", [left, right])
    for text, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(text, str | list | tuple) and isinstance(times, int):
            _check_size(len(text) * times)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        if operator == "**":
            bits = left.bit_length() * abs(right)
        if operator in ("*", "**") and bits > BITS:
            raise TooMuchError("it computes too large a number")


def _check_call(name: str, arguments: list[Any]) -> None:
    flat = [item for a in arguments for item in (a if isinstance(a, tuple | list) and len(a) < 100 else [a])]
    numbers = [a for a in flat if isinstance(a, int) and not isinstance(a, bool)]
    texts = [a for a in arguments if isinstance(a, str)]
    if name in WIDENS and any(abs(number) > NUMBER for number in numbers):
        raise TooMuchError(f"{name} is called with a number above {NUMBER:,}")
    if name in WIDENS and texts and numbers:
        _check_size(len(texts[0]) * max(map(abs, numbers)))
    if name == "replace" and len(texts) >= 3:
        _check_size(len(texts[0]) + (len(texts[0]) // max(len(texts[1]), 1) + 1) * len(texts[2]))
    if name == "join" and texts:
        items = max((len(a) for a in arguments if isinstance(a, str | list | tuple | range)), default=0)
        _check_size(min(map(len, texts)) * items)
    if name in ("format", "format_map") and texts and WIDE.search(texts[0]):
        raise TooMuchError("a width in a format is too large")


def _check_size(size: int) -> None:
    if size > CHARACTERS:
        raise TooMuchError(f"it makes a text or a list of more than {CHARACTERS:,} characters or items")


def _checked(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
        _check_size(len(value))
    return value
