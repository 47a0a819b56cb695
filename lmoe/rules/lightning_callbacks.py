"""What Lightning's callbacks are made with, read from its source: importing it would take seconds."""

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "lightning.pytorch.callbacks"
ONE = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "None": "null"}
KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}


@dataclass(slots=True, frozen=True)
class Argument:
    """One argument of a constructor.

    Args:
        kinds: names of KINDS and choices in quotes that it may be; empty: anything.
        required: it has no default.
    """

    kinds: tuple[str, ...]
    required: bool

    def problem(self, value: Any) -> str | None:
        """What the value must be, or None if it is so."""
        if not self.kinds or any(_fits(kind, value) for kind in self.kinds):
            return None
        return " or ".join(ONE.get(kind, kind) for kind in self.kinds)


def _fits(kind: str, value: Any) -> bool:
    if kind not in KINDS:
        return repr(value) == kind
    return isinstance(value, KINDS[kind]) and (not isinstance(value, bool) or kind == "bool")


@cache
def exported_callbacks() -> dict[str, str]:
    """Module by class, of what lightning.pytorch.callbacks exports; empty where Lightning's source is not there."""
    imports = [node for node in ast.parse(_source(PACKAGE)).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports if node.module for alias in node.names}


@cache
def callback_arguments(class_name: str) -> dict[str, Argument] | None:
    """The arguments by name of an exported callback; None where its source does not name them all."""
    body = ast.parse(_source(exported_callbacks()[class_name])).body
    made = next((node for node in body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    if made is None:
        return None
    init = next((n for n in made.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return {} if [ast.unparse(base) for base in made.bases] == ["Callback"] else None
    if init.args.kwarg is not None or init.args.vararg is not None:
        return None
    given = init.args.args[1:]
    first_default = len(given) - len(init.args.defaults)
    arguments = {a.arg: Argument(_kinds(a.annotation), n < first_default) for n, a in enumerate(given)}
    more = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return arguments | {a.arg: Argument(_kinds(a.annotation), default is None) for a, default in more}


def _source(module: str) -> str:
    """Text of a module of Lightning."""
    spec = find_spec(module.split(".")[0])
    if spec is None or spec.origin is None:
        return ""
    place = Path(spec.origin).parent.parent.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _kinds(annotation: ast.expr | None) -> tuple[str, ...]:
    """Empty for what is not made of numbers, texts, switches, null and literals."""
    kinds = list(_parts(annotation)) if annotation is not None else [""]
    return tuple(dict.fromkeys(kinds)) if all(kinds) else ()


def _parts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id if node.id in KINDS else ""]
    if isinstance(node, ast.Constant):
        return [repr(node.value)]
    if isinstance(node, ast.BinOp):
        return _parts(node.left) + _parts(node.right)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        parts = [part for item in inner for part in _parts(item)]
        return {"Optional": [*parts, "None"], "Union": parts, "Literal": parts}.get(node.value.id, [""])
    return [""]
