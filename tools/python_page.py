"""docs/PYTHON.md: what `import lmoe` gives, from signatures and docstrings; modules are read as text, not imported."""

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmoe

ROOT = Path(lmoe.__file__).resolve().parents[1]
SECTIONS = ("Args", "Returns", "Raises", "Yields")
HEAD = """\
# From Python

This page is generated from the docstrings by `make docs`; do not edit it. README shows the names
[at work in a training loop](../README.md#your-own-model), [EXPERTS.md](EXPERTS.md) and [BLENDING.md](BLENDING.md) with
adapters that exist, [CHECKPOINT.md](CHECKPOINT.md) what is written. Keys of `injection` and `moe` are those of
[CONFIG.md](CONFIG.md); errors are those of `lmoe.errors`, and all are `LmoeError`. The first use of a name imports
torch; `import lmoe` alone does not.
"""


@dataclass(slots=True, frozen=True)
class Found:
    """A public name.

    Args:
        name: as it is called behind `lmoe.`.
        node: its definition.
    """

    name: str
    node: ast.FunctionDef | ast.ClassDef


def python_page() -> str:
    """Return the page."""
    found = [_definition(name) for name in lmoe.__all__]
    listed = "\n".join(f"* [`lmoe.{one.name}`](#lmoe{one.name.lower()}): {_first_sentence(one.node)}" for one in found)
    return "\n".join([HEAD, listed, "", *(line for one in found for line in _section(one))]).rstrip() + "\n"


def _definition(name: str) -> Found:
    module = ROOT / (lmoe._PUBLIC[name].replace(".", "/") + ".py")
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return Found(name, node)
    raise LookupError(f"{module} defines no {name}")


def _section(found: Found) -> Iterator[str]:
    yield f"## lmoe.{found.name}"
    yield ""
    made = found.node
    if isinstance(made, ast.ClassDef):
        made = next(node for node in made.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    yield f"```python\n{_signature(made, f'lmoe.{found.name}')}\n```"
    yield ""
    yield _documented(found.node)
    if made is not found.node and (more := ast.get_docstring(made)):
        yield _body(more)
    if isinstance(found.node, ast.ClassDef):
        yield from _members(found.node)


def _members(node: ast.ClassDef) -> Iterator[str]:
    """A table of the public methods and properties of a class."""
    yield "| member | what it is or does |\n|---|---|"
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or member.name.startswith("_"):
            continue
        kinds = _decorators(member)
        if any(kind.endswith(".setter") for kind in kinds):
            continue
        shown = member.name if "property" in kinds else _signature(member, member.name)
        yield f"| `{_cell(shown)}` | {_cell(_first_paragraph(member))} |"
    yield ""


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _signature(node: ast.FunctionDef, name: str) -> str:
    """A call, with types and defaults; one line where it fits."""
    arguments = node.args
    arguments.posonlyargs = [argument for argument in arguments.posonlyargs if argument.arg != "self"]
    arguments.args = [argument for argument in arguments.args if argument.arg != "self"]
    returned = "" if node.returns is None or ast.unparse(node.returns) == "None" else f" -> {ast.unparse(node.returns)}"
    parts = [_spaced(part) for part in _split(ast.unparse(arguments))]
    name = f"with {name}" if "contextmanager" in _decorators(node) else name
    line = f"{name}({', '.join(parts)}){returned}"
    return line if len(line) <= 100 else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){returned}"])


def _decorators(node: ast.FunctionDef) -> list[str]:
    return [ast.unparse(decorator) for decorator in node.decorator_list]


def _spaced(argument: str) -> str:
    """Put blanks around the = of a default behind a type, which unparsing leaves out."""
    name, equals, default = argument.partition("=")
    return f"{name} = {default}" if equals and ":" in name else argument


def _split(arguments: str) -> list[str]:
    """Arguments one by one: at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _documented(node: ast.FunctionDef | ast.ClassDef) -> str:
    return _body(ast.get_docstring(node) or "")


def _body(doc: str) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    for block in doc.split("\n\n"):
        title, _, rest = block.partition("\n")
        if title.rstrip(":") not in SECTIONS:
            lines += [" ".join(block.split()), ""]
            continue
        items = [" ".join(rest.split())] if title in ("Returns:", "Yields:") else _items(textwrap.dedent(rest))
        lines += [f"**{title.rstrip(':')}**", "", *(f"* {item}" for item in items), ""]
    return "\n".join(lines)


def _items(text: str) -> list[str]:
    """The entries of a section: what stands further right belongs to the line before."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and items:
            items[-1] += f" {line.strip()}"
        else:
            items.append(line.strip())
    return items


def _first_paragraph(node: ast.FunctionDef | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n\n")[0]


def _first_sentence(node: ast.FunctionDef | ast.ClassDef) -> str:
    return _one_line(_first_paragraph(node)).partition(". ")[0].rstrip(".") + "."


def _one_line(text: str) -> str:
    return " ".join(text.split())
