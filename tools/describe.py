"""docs/CONFIG.md from the dataclasses and conf/, docs/PYTHON.md from docstrings, and the tables of routers in
docs/ROUTING.md from their declarations: `python -m tools.describe`, with --check to compare only.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from lmoe.config.pretrain import PretrainConfig
from lmoe.config.run import RunConfig
from lmoe.config.study import StudyFile
from lmoe.files.resources import resource_dir
from lmoe.rules.routers import ROUTERS
from lmoe.rules.strategies import STRATEGIES
from tools.python_page import python_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PYTHON_PAGE, ROUTER_PAGE = DOCS / "CONFIG.md", DOCS / "PYTHON.md", DOCS / "ROUTING.md"
SCHEMAS: dict[str, type] = {"train": RunConfig, "pretrain": PretrainConfig, "study": StudyFile}
CALLED = {"train": "python train.py", "pretrain": "lmoe pretrain", "study": "lmoe study study=…"}
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "any"}
COMMANDS = ("python ", "lmoe ")

HEAD = """\
# Every key of a run

This page is generated from the dataclasses in `lmoe/config/` and the files in `conf/` by `make docs`; do not edit it.

A key is set on the command line as `key=value`, for example `python train.py injection.num_experts=8`. A group such as
`backbone` is chosen by the name of its file, for example `backbone=llama`, and its keys can still be set one by one. A
list is written `[1,2,4]`, no value is `null`, and a comma outside brackets is a multirun (`python train.py -m
injection.num_experts=2,4,8`). Text with spaces or `=` needs quotes inside the shell's: `'name="a b"'`. An unknown key,
a wrong type and a changed value that could have no effect are errors.

**The default shown is that of the bare command**, `python train.py` or `lmoe pretrain`: what the group files which it
takes say. Where another file of the group leaves the key out, the value behind "else" holds. `required` has no
default. `<name>` stands for a name that you choose.
"""
HYDRA_KEYS = """\
## Where a run is written

These keys are Hydra's own.

| key | default | meaning |
|---|---|---|
| `hydra.run.dir` | `{run}` | The run directory. It must hold no run yet, unless `resume` names it. |
| `hydra.sweep.dir` | `{sweep}` | In a multirun (`-m`): the folder that holds the run directories. |
| `hydra.sweep.subdir` | `{subdir}` | In a multirun: the run directory of each job inside `hydra.sweep.dir`. |
"""


@cache
def field_docs(schema: type) -> dict[str, str]:
    """The string under each field of a dataclass, in one line; of a nested dataclass without one, its docstring."""
    source = Path(inspect.getsourcefile(schema) or "").read_text(encoding="utf-8")
    body = next(n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == schema.__name__)
    docs = {f.name: section_doc(inner) for f in fields(schema) if is_dataclass(inner := _hints(schema)[f.name])}
    for statement, below in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docs[statement.target.id] = _filled_in(" ".join(text.value.split()))
    return docs


def _filled_in(text: str) -> str:
    """A docstring with what is declared of each router and strategy in place of {routers} and {strategies}."""
    learning = "; ".join(f"{kind}: {router.description}" for kind, router in ROUTERS.items() if router.trains)
    baselines = "; ".join(f"{kind}: {router.description}" for kind, router in ROUTERS.items() if not router.trains)
    strategies = "; ".join(f"{name}: {strategy.description}" for name, strategy in STRATEGIES.items())
    text = text.replace("{routers}", f"{learning}. Baselines: {baselines}")
    return text.replace("{strategies}", strategies)


def section_doc(section: Any) -> str:
    """A dataclass's docstring in one line."""
    return " ".join((inspect.getdoc(section) or "").split())


def composed(config_name: str) -> DictConfig:
    """What Hydra makes of conf/<config_name>.yaml without overrides, its own node included."""
    ConfigStore.instance().store(name=f"{config_name}_schema", node=SCHEMAS[config_name])  # typed, as it is shown
    with initialize_config_dir(str(resource_dir("conf").resolve()), version_base="1.3"):
        return compose(config_name, return_hydra_config=True)


def page() -> str:
    """The whole of docs/CONFIG.md."""
    parts = [HEAD]
    for verb, schema in SCHEMAS.items():
        config = composed(verb)
        parts += [f"# `{CALLED[verb]}`\n", *_sections(schema, config, "", section_doc(schema))]
        if verb == "train":
            hydra = OmegaConf.to_container(config.hydra, resolve=False)
            assert isinstance(hydra, dict)
            run, sweep = hydra["run"]["dir"], hydra["sweep"]
            parts += [HYDRA_KEYS.format(run=run, sweep=sweep["dir"], subdir=sweep["subdir"])]
    return "\n".join([*parts, "# Group files\n", *_groups()])


def _sections(schema: type, config: DictConfig | None, prefix: str, intro: str, shipped: str = "") -> Iterator[str]:
    """The table of a dataclass, then those of its sections; keys of a mapping's entries have no composed value."""
    hints, docs = _hints(schema), field_docs(schema)
    rows, nested = [], []
    for f in fields(schema):
        key, hint = f"{prefix}{f.name}", hints[f.name]
        unset = f.default if f.default is not MISSING else f.default_factory() if callable(f.default_factory) else None
        element = get_args(hint)[1] if get_origin(hint) is dict else None
        if is_dataclass(hint):
            nested.append((hint, config[f.name] if config is not None else None, f"{key}.", docs.get(f.name, ""), ""))
        elif is_dataclass(element):
            entries = OmegaConf.to_container(config[f.name]) if config is not None else {}
            usual = OmegaConf.to_container(OmegaConf.structured(element))
            default = f" By default: {_names(entries, usual)}." if entries else " By default: none."
            nested.append((element, None, f"{key}.<name>.", docs.get(f.name, ""), default))
        else:
            shown = _default(config, f.name, unset)
            rows.append(f"| `{key}` | {_type(hint)} | {shown} | {_plain(docs.get(f.name, ''))} |")
    if rows:
        title = f"## `{prefix.removesuffix('.')}`" if prefix else "## The run"
        yield (
            f"{title}\n\n{_plain(intro)}{shipped}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
    for inner, part, path, text, entries in nested:
        yield from _sections(inner, part, path, text, entries)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([<|*]|\b_|_\b)", r"\\\1", text)


def _names(entries: Any, usual: Any) -> str:
    """Each entry with what it has otherwise than an empty one."""
    return ", ".join(
        f"`{name}` ({', '.join(f'{k}: {_value(v)}' for k, v in e.items() if v != usual[k])})"
        for name, e in entries.items()
    )


def _default(config: DictConfig | None, name: str, unset: Any) -> str:
    if config is None:
        return f"`{_value(unset)}`"
    if OmegaConf.is_missing(config, name):
        return "required"
    value = config[name]
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return f"`{_value(value)}`" + ("" if value == unset else f", else `{_value(unset)}`")


def _value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _type(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return ", ".join(_type(option) for option in get_args(hint) if option is not type(None)) + " or null"
    if get_origin(hint) is list:
        return f"list ({_type(get_args(hint)[0])})"
    if get_origin(hint) is dict:
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return ", ".join(f"`{choice}`" for choice in hint)
    return WORDS[hint]


@cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)


def _groups() -> Iterator[str]:
    yield "Each is chosen as `group=file`; a file of your own in the same folder is chosen the same way.\n"
    for folder in sorted(path for path in resource_dir("conf").iterdir() if path.is_dir()):
        rows = [f"| `{folder.name}={file.stem}` | {_about(file)} |" for file in sorted(folder.glob("*.yaml"))]
        if not rows:
            continue
        yield f"## `{folder.name}=`\n\n| choice | what it sets |\n|---|---|\n" + "\n".join(rows) + "\n"


def _about(file: Path) -> str:
    """The first comment that describes the file; without one, what the file says."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    described = [c for c in comments if not c.startswith(("@package", *COMMANDS))]
    return (
        _plain(described[0])
        if described
        else ", ".join(f"`{line}`" for line in lines if line and not line.startswith("#"))
    )


def router_page() -> str:
    """The whole of docs/ROUTING.md, with its two tables of routers as they are declared.

    Raises:
        ValueError: the page lacks the head of a table.
    """
    learning = [
        f"| `{kind}` | {router.row.chooses} | {router.row.weights} | {router.row.use_for} | {router.row.source} |"
        for kind, router in ROUTERS.items()
        if router.trains
    ]
    baselines = [
        f"| `{kind}` | {router.row.chooses} | {router.row.use_for} |"
        for kind, router in ROUTERS.items()
        if not router.trains
    ]
    text = ROUTER_PAGE.read_text(encoding="utf-8")
    text = _with_rows(text, "| `moe=` | chooses | weights | use it for | source |", learning)
    return _with_rows(text, "| `moe=` | every token gets | answers |", baselines)


def _with_rows(text: str, head: str, rows: list[str]) -> str:
    """A page with other rows in the table under this head; an empty last cell is written without its spaces."""
    before, found, after = text.partition(f"{head}\n")
    if not found:
        raise ValueError(f"{ROUTER_PAGE} has no table {head!r}")
    line, _, after = after.partition("\n")
    rest = after[after.index("\n\n") :]
    return before + found + "\n".join([line, *(row.replace("|  |", "| |") for row in rows)]) + rest


def main(arguments: list[str]) -> int:
    """Write the pages, or with --check say which are stale; returns the exit code."""
    pages, stale = {PAGE: page(), PYTHON_PAGE: python_page(), ROUTER_PAGE: router_page()}, False
    for place, text in pages.items():
        if "--check" not in arguments:
            place.write_text(text, encoding="utf-8")
        elif not place.exists() or place.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"{place} is stale: run `make docs`\n")
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
