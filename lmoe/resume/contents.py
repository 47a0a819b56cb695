"""What a checkpoint is built of: a digest of the names, types and shapes in each of its entries.

The seal tells that bytes have changed since the file was written; this tells that a file which was written anew lacks
something, before a run takes anything from it. Values do not count: reading it touches no tensor's data.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

CONTENTS = "lmoe_contents"
"""Entry that holds the digests, by the name of the entry."""


def add_contents(checkpoint: dict[str, Any]) -> None:
    """Describe a checkpoint that is otherwise complete, in place."""
    checkpoint[CONTENTS] = _digests(checkpoint)


def differing(checkpoint: dict[str, Any]) -> list[str]:
    """Names of the entries that are not built as they were when the checkpoint was written."""
    found, written = _digests(checkpoint), checkpoint.get(CONTENTS)
    if not isinstance(written, dict):
        return [CONTENTS]
    return sorted(name for name in {*found, *written} if found.get(name) != written.get(name))


def _digests(checkpoint: dict[str, Any]) -> dict[str, str]:
    return {
        name: hashlib.sha256("\n".join(_leaves(value, "")).encode()).hexdigest()
        for name, value in checkpoint.items()
        if name != CONTENTS
    }


def _leaves(value: Any, path: str) -> Iterator[str]:
    """One line for each thing in nested dicts and lists, and for each of these."""
    if isinstance(value, Tensor):
        yield f"{path} {value.dtype} {tuple(value.shape)}"
    elif isinstance(value, dict):
        yield f"{path} {len(value)} by name"
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        yield f"{path} {len(value)} in order"
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}.{number}")
    else:
        yield f"{path} {type(value).__name__}"
