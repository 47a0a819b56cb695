"""Ways in which a file can be damaged, or made to attack who reads it."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOSTILE = (
    "../../../nowhere/passwd",
    "/nowhere/passwd",
    "${oc.env:HOME}",
    "\x00",
    "a" * 5000,
    "../../esc",
    "",
    "nul\n",
    "..",
)
WRONG: tuple[Any, ...] = (None, True, -1, 0, 10**18, 10**400, 1e308, float("nan"), [], {}, [[1]], "text", {"a": {}})
AUTO_MAP = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")


DECOY = "a file elsewhere, which nobody may write to\n"
"""What links of a hostile folder lead to, in place of a file of the machine."""


class Bomb:
    """Makes a file when it is unpickled.

    Args:
        canary: the file.
    """

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def plant(folder: Path, canary: Path) -> None:
    """Python beside the files that makes the canary when anybody runs it."""
    text = f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n"
    for name in ("evil.py", "conftest.py", "sitecustomize.py"):
        (folder / name).write_text(text, encoding="utf-8")


def damage(file: Path, draw: random.Random, canary: Path) -> str:
    """Do one thing to a file, and return its name."""
    own: list[Callable[[Path, random.Random, Path], None]] = []
    if file.suffix == ".safetensors":
        own = [header_length, header_entry, header_entry, not_finite]
    elif file.suffix in (".json", ".jsonl"):
        own = [json_value] * 8
    elif file.suffix == ".yaml":
        own = [yaml_value] * 8
    chosen = draw.choice([*ANY, *own])
    chosen(file, draw, canary)
    return chosen.__name__


def replace(file: Path, content: bytes) -> None:
    """NOTE the file may be a link to one that other cases share: it is never written into."""
    file.unlink()
    file.write_bytes(content)


def cut(file: Path, draw: random.Random, canary: Path) -> None:
    content = file.read_bytes()
    replace(file, content[: draw.choice((0, 1, 7, 8, 9, len(content) // 2, max(0, len(content) - 1)))])


def flipped(file: Path, draw: random.Random, canary: Path) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 5, 50)) if content else 0):
        content[draw.randrange(min(len(content), draw.choice((64, 4096, len(content)))))] ^= 1 << draw.randrange(8)
    replace(file, bytes(content))


def not_utf8(file: Path, draw: random.Random, canary: Path) -> None:
    content = file.read_bytes()
    place = draw.randrange(len(content) + 1)
    replace(file, content[:place] + draw.choice((b"\xff", b"\xe9\n", b"\xed\xa0\x80", b"\x00")) + content[place:])


def other_top(file: Path, draw: random.Random, canary: Path) -> None:
    texts = (
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{}",
        b"[1]",
        b"- 1\n",
        b"\n\n",
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
        b"!!int x",
    )
    replace(file, draw.choice(texts))


def deep(file: Path, draw: random.Random, canary: Path) -> None:
    depth = draw.choice((65, 900, 1000, 5000, 100_000))
    replace(file, draw.choice((b"[", b'{"a":')) * depth if draw.random() < 0.5 else b"[" * depth + b"]" * depth)


def pickled(file: Path, draw: random.Random, canary: Path) -> None:
    replace(file, pickle.dumps(Bomb(canary), protocol=draw.choice((0, 2, 4))))


def pipe(file: Path, draw: random.Random, canary: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder_instead(file: Path, draw: random.Random, canary: Path) -> None:
    file.unlink()
    file.mkdir()


def link(file: Path, draw: random.Random, canary: Path) -> None:
    decoy = canary.with_name(f"{canary.name}-decoy")  # NOTE never a file of the machine: a fault could write over it
    decoy.write_text(DECOY, encoding="utf-8")
    target = draw.choice(("/dev/zero", "/dev/urandom", "nowhere", file.name, "..", decoy))
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def planted(file: Path, draw: random.Random, canary: Path) -> str:
    """Put a link where a file is, or where a reader looks for one, and return its name."""
    link(file, draw, canary)
    return f"link to {os.readlink(file)}"


def gone(file: Path, draw: random.Random, canary: Path) -> None:
    file.unlink()


def huge(file: Path, draw: random.Random, canary: Path) -> None:
    file.unlink()
    with open(file, "wb") as made:
        made.truncate(5_000_000)


ANY = (cut, flipped, not_utf8, other_top, deep, pickled, pipe, folder_instead, link, gone, huge)


def json_value(file: Path, draw: random.Random, canary: Path) -> None:
    """One value, or the name of one, becomes something else; of JSON lines, in one of them."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else [file.read_text("utf-8")]
    number = draw.randrange(len(lines))
    value = json.loads(lines[number])
    spoil(value, draw)
    lines[number] = json.dumps(value).replace('"<digits>"', "9" * 4301).replace('"<deep>"', "[" * 1000 + "]" * 1000)
    replace(file, ("\n".join(lines) + "\n").encode())


def spoil(value: Any, draw: random.Random) -> None:
    """Change something inside nested lists and dicts."""
    places = [(parent, key) for parent, key in _places(value)]
    if not places:
        return
    parent, key = draw.choice(places)
    kind = draw.random()
    if kind < 0.1 and isinstance(parent, dict):
        parent["_target_"] = draw.choice(("os.system", "evil.Evil", "builtins.eval", "pathlib.Path.touch"))
    elif kind < 0.2 and isinstance(parent, dict):
        value_at_top = value if isinstance(value, dict) else parent
        value_at_top["auto_map"] = AUTO_MAP
    elif kind < 0.3 and isinstance(parent, dict):
        parent[draw.choice(HOSTILE)] = parent.pop(key)
    elif kind < 0.35 and isinstance(parent, dict):
        del parent[key]
    elif kind < 0.45:
        parent[key] = draw.choice(("<digits>", "<deep>"))
    elif kind < 0.65:
        parent[key] = draw.choice(HOSTILE)
    else:
        parent[key] = draw.choice(WRONG)


def _places(value: Any) -> list[tuple[Any, Any]]:
    level, found = [value], []
    while level:
        each = level.pop()
        if isinstance(each, dict | list):
            keys = list(each) if isinstance(each, dict) else list(range(min(len(each), 8)))
            found += [(each, key) for key in keys]
            level += [each[key] for key in keys]
    return found


def yaml_value(file: Path, draw: random.Random, canary: Path) -> None:
    """One line of a config becomes something else."""
    lines = file.read_text(encoding="utf-8").splitlines()
    number = draw.randrange(len(lines))
    name = lines[number].split(":")[0]
    bomb = f"!!python/object/apply:pathlib.Path.touch [{canary}]"
    values = (
        "${oc.env:HOME}",
        bomb,
        "&a [*a]",
        "[[1]]",
        "9" * 4301,
        "1e400",
        ".nan",
        "[" * 900,
        "{",
        "'",
        "null",
        "-1",
    )
    made = [
        f"{name}: {draw.choice((*values, *HOSTILE[:3]))}",
        "_target_: evil.Evil",
        "\tx",
        "? [a]",
        lines[number] + "\n" + lines[number],
    ]
    lines[number] = draw.choice([made[0]] * 4 + made)
    replace(file, ("\n".join(lines) + "\n").encode())


def header_length(file: Path, draw: random.Random, canary: Path) -> None:
    content = file.read_bytes()
    replace(file, struct.pack("<Q", draw.choice((0, 1, 2**63, 2**64 - 1, 10**9, len(content)))) + content[8:])


def header_entry(file: Path, draw: random.Random, canary: Path) -> None:
    """One value in the header of a safetensors file."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[draw.choice(names)]
    kind = draw.choice(("shape", "dtype", "offsets", "name", "spoil"))
    if kind == "shape":
        entry["shape"] = draw.choice(([], [0], [2**40, 2**40], [-1], entry["shape"][::-1], [1, *entry["shape"]]))
    elif kind == "dtype":
        entry["dtype"] = draw.choice(("I64", "F64", "F8_E4M3", "BOOL", "Q", "BF16"))
    elif kind == "offsets":
        entry["data_offsets"] = draw.choice(([0, 0], [0, 2**62], [5, 1], [-4, 0]))
    elif kind == "name":
        header[draw.choice(HOSTILE)] = header.pop(draw.choice(names))
    else:
        spoil(header, draw)
    text = json.dumps(header).replace('"<digits>"', "9" * 4301).replace('"<deep>"', "[" * 1000 + "]" * 1000).encode()
    replace(file, struct.pack("<Q", len(text)) + text + content[8 + length :])


def not_finite(file: Path, draw: random.Random, canary: Path) -> None:
    content = file.read_bytes()
    bad = struct.pack("<f", draw.choice((float("nan"), float("inf"))))
    replace(file, content[:-4] + bad)
