"""Settings for every key of a config, drawn at random: what fits its type, and what does not."""

import random
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, get_args, get_origin

from lmoe.config.keys import field_type, leaf_keys
from lmoe.config.read import without_none
from lmoe.files.resources import resource_dir
from lmoe.rules.lightning_callbacks import PACKAGE, callback_arguments, exported_callbacks

WRONG = (
    *("null", "abc", "''", "[]", "[[1]]", "[[[1]]]", "[1,[2]]", "[null]", "{a: 1}", "{1: {2: 3}}", "[{a: [b]}]"),
    *("nan", "inf", "-inf", "[nan]", "-1", "0", "1.5", "1e308", "-1e308", "1e-320", "[1e308,1e308]", "true", "2.0"),
    *(str(10**11), str(2**63), str(-(2**63)), "9" * 400, "9" * 5000, "1e400", f"[{2**70}]", "100%", "-5%", "nan%"),
    *(
        "'a b'",
        "${nosuch}",
        "${seed}",
        "[${name}]",
        "???",
        "é😀",
        "'\\n'",
        "../nosuch/x",
        "~nobody/x",
        "/nosuch",
        "a/b/c",
    ),
    *("[" * 200 + "]" * 200, "x" * 5000, "0:0:0:" + "9" * 400, "1,2", "choice(1,2)", "range(1,3)", "int(a)", "{", "["),
)
"""What some key or other cannot be, as it is written behind the =."""
NAMES = {
    "phase.phases": ("router_warmup", "experts", "last"),
    "data.sources": ("code", "chat", "nobody"),
    "optim.roles": ("router", "lora", "attn_lora", "head", "nobody"),
}
"""Entries of a mapping, some of which are not there."""
GROUPS = ("backbone", "callbacks", "data", "experiment", "injection", "logger", "moe", "optim", "phase", "trainer")
WRONG_CHOICES = ("nope", "null", "3", "[[1]]", "''", "top_kk")
TEXTS = {
    "start": ("0", "1", "20%", "50%", "plateau", "100%"),
    "latest": ("1", "50%"),
    "steps": ("1", "50%", "100%"),
    "anneal_steps": ("1", "2", "100%"),
    "monitor": ("val/loss", "train/loss", "val/code/loss", "val/nope"),
    "max_time": ("00:00:10:00", "1:0:0:0"),
    "precision": ("32-true", "bf16-mixed", "16-mixed"),
    "attn_implementation": ("eager", "sdpa", "nope"),
    "keywords": ("q_proj", "v_proj", "o_proj"),
    "target_keywords": ("gate_proj", "up_proj", "down_proj"),
    "domains": ("code", "math", "words"),
}
"""What fits a text, by the last part of its key."""
WHOLE = (1, 1, 2, 2, 3, 4, 8)
NUMBERS = (0.0, 1e-8, 1e-3, 0.01, 0.1, 0.5, 0.9, 1.0, 1.2, 2.0, 16.0, 1e4, 1e30, 1e-30)


def settable_keys(schema: type) -> list[tuple[str, Any]]:
    """Every key that can be set, sections too, with its type; <name> stands for an entry of a mapping."""
    sections = [(f.name, field_type(schema, f.name)) for f in fields(schema)]
    inner = [
        (f"{name}.{f.name}", field_type(section, f.name))
        for name, section in sections
        if is_dataclass(section) and isinstance(section, type)
        for f in fields(section)
    ]
    return list(dict.fromkeys([*leaf_keys(schema), *sections, *inner]))


def setting(keys: list[tuple[str, Any]], draw: random.Random, *, fitting: float) -> str:
    """One override, drawn at random.

    Args:
        keys: to choose from.
        draw: random numbers.
        fitting: probability of a value of the right type.
    """
    key, hint = draw.choice(keys)
    if key == "callbacks" and draw.random() < 0.8:
        return callback(draw, fitting=fitting)
    if "<name>" in key:
        mapping = key.split(".<name>")[0]
        key = key.replace("<name>", draw.choice(NAMES[mapping]))
    plus = draw.choice(("", "", "", "+", "++")) if key.startswith(tuple(NAMES)) else draw.choice(("",) * 19 + ("++",))
    if draw.random() < fitting:
        return f"{plus}{key}={fitting_value(hint, key, draw)}"
    if draw.random() < 0.05:
        return draw.choice((f"~{key}", f"{key[:-1]}=1", f"{key}x=1", f"{key}.more=1", f"{key}", f"+{key}.a.b=[1]"))
    return f"{plus}{key}={draw.choice(WRONG)}"


def fitting_value(hint: Any, key: str, draw: random.Random) -> str:
    """A value of the right type, which need not make sense."""
    kind, _ = without_none(hint)
    if get_origin(kind) is list:
        return f"[{','.join(fitting_value(get_args(kind)[0], key, draw) for _ in range(draw.choice((1, 1, 2, 3))))}]"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return draw.choice([choice.value for choice in kind])
    if kind is bool:
        return draw.choice(("true", "false"))
    if kind is int:
        return str(draw.choice(WHOLE))
    if kind is float:
        return str(draw.choice(NUMBERS))
    if kind is str:
        return draw.choice(TEXTS.get(key.rpartition(".")[2], ("null", "some/name")))
    return "{}"


def callback(draw: random.Random, *, fitting: float) -> str:
    """A callback of Lightning with some argument."""
    name = draw.choice([*exported_callbacks(), "Nope", "os.system"])
    known = callback_arguments(name) if name in exported_callbacks() else None
    values = {"_target_": f"{PACKAGE}.{name}"}
    for argument in draw.sample(sorted(known or {"x"}), k=min(len(known or "x"), draw.choice((0, 1, 2)))):
        plain = draw.choice(("1", "3", "0.5", "true", "val/loss", "min", "step", "null"))
        values[argument] = plain if draw.random() < fitting else draw.choice(("abc", "[[1]]", "-1", "null", "nan"))
    if name == "EarlyStopping" and draw.random() < 0.7:
        values["monitor"] = "val/loss"
    return f"+callbacks.mine={{{','.join(f'{key}: {value}' for key, value in values.items())}}}"


def group_choices(draw: random.Random, *, fitting: float) -> list[str]:
    """None to two choices of groups of conf/."""
    folders = [folder for folder in sorted(resource_dir("conf").iterdir()) if folder.name in GROUPS]
    chosen = []
    for folder in draw.sample(folders, k=draw.choice((0, 1, 1, 2))):
        right = [file.stem for file in sorted(folder.glob("*.yaml"))]
        chosen.append(f"{folder.name}={draw.choice(right if draw.random() < fitting else WRONG_CHOICES)}")
    return chosen
