"""report/routing.npz: what the routers of a run did over its steps, in 1/255, for the run's page (docs/REPORT.md).

Shapes: N logged steps, V validations, M domains, S sites, A experts of all sites behind one another, E the most experts
of a site, P phases, T tokens of all rows behind one another.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmoe.errors import CheckpointError
from lmoe.files.small_file import Reader, is_deeper
from lmoe.files.write import write_whole

ROUTING_FILE = "routing.npz"
FORMAT = 1
MOST = 2**27
"""Bytes of the file, and of its arrays once they are unpacked."""
ROUTING = Reader(most=MOST, what="it", cure="remove it, and the page is drawn without it")
HEADER = "header"
"""The array that holds all that is no number, as JSON."""
WHOLE = 255
"""What stands for 1."""

Bytes = NDArray[np.uint8]
Steps = NDArray[np.int64]


@dataclass(slots=True, frozen=True, kw_only=True)
class SampleRow:
    """A validation row whose tokens are kept.

    Args:
        domain: of the row.
        name: of the row among those of its domain.
        texts: what each token adds to the text before it; empty where it goes on with a character.
        cut: tokens behind these that are not kept.
    """

    domain: str
    name: str
    texts: list[str]
    cut: int = 0


@dataclass(slots=True, frozen=True, kw_only=True)
class RoutingHistory:
    """What the routers did; shares and entropies in 1/255.

    Args:
        sites: names, in order.
        experts: experts of each site.
        expert_names: of the experts in their order; empty where they have none.
        domains: names, in the order of `domain_load`.
        phases: first optimizer step of each phase by name.
        judged: phases whose sites are watched for collapse.
        max_steps: length of the run in optimizer steps.
        gates: limits of the watch for collapse by name.
        rows: the rows whose tokens are kept.
        rows_step: optimizer step of the validation in which they were routed.
        steps: (N,) optimizer steps, ascending.
        load: (N, A) share of the assignments of each expert.
        largest: (N, S) largest share of the routing weight that one expert has.
        entropy: (N, S) mean entropy of a token's probabilities, over ln E.
        load_entropy: (N, S) entropy of the load, over ln E.
        phase_steps: (P,) first logged step of each phase; 0: not reached.
        phase_entropy: (P, S) load entropy there.
        validation_steps: (V,) optimizer steps, ascending.
        domain_load: (V, M, A) share of the assignments of each domain; all 0 where it has none.
        expert: (T, S) uint16, expert with the largest routing weight.
        weight: (T, S) its share of the token's routing weight; 0 where no expert acts.
        mean: (T, E) share of the token's routing weight of each expert, mean over sites.
    """

    sites: list[str]
    experts: list[int]
    expert_names: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)
    phases: dict[str, int] = field(default_factory=dict)
    judged: list[str] = field(default_factory=list)
    max_steps: int = 0
    gates: dict[str, float] = field(default_factory=dict)
    rows: list[SampleRow] = field(default_factory=list)
    rows_step: int = 0
    steps: Steps
    load: Bytes
    largest: Bytes
    entropy: Bytes
    load_entropy: Bytes
    phase_steps: Steps
    phase_entropy: Bytes
    validation_steps: Steps
    domain_load: Bytes
    expert: NDArray[np.uint16]
    weight: Bytes
    mean: Bytes

    def problem(self) -> str | None:
        """What does not fit together; None: all does."""
        N, V, P = len(self.steps), len(self.validation_steps), len(self.phases)
        S, A, T = len(self.sites), sum(self.experts), sum(len(row.texts) for row in self.rows)
        shapes = {
            "steps": (N,),
            "load": (N, A),
            "largest": (N, S),
            "entropy": (N, S),
            "load_entropy": (N, S),
            "phase_steps": (P,),
            "phase_entropy": (P, S),
            "validation_steps": (V,),
            "domain_load": (V, len(self.domains), A),
            "expert": (T, S),
            "weight": (T, S),
            "mean": (T, max(self.experts, default=0)),
        }
        if len(self.experts) != S:
            return f"{S} sites, and experts of {len(self.experts)}"
        for name, shape in shapes.items():
            found: NDArray[Any] = getattr(self, name)
            if found.shape != shape or found.dtype != DTYPES[name]:
                return f"{name} is {found.dtype} {found.shape}, must be {np.dtype(DTYPES[name])} {shape}"
        for name in ("steps", "validation_steps"):
            if (np.diff(getattr(self, name)) <= 0).any():
                return f"{name} do not ascend"
        if T and (self.expert >= np.array(self.experts)).any():
            return "expert names one that its site does not have"
        return None


DTYPES: dict[str, type[np.generic]] = {
    **dict.fromkeys(("steps", "phase_steps", "validation_steps"), np.int64),
    **dict.fromkeys(("load", "largest", "entropy", "load_entropy", "phase_entropy", "domain_load"), np.uint8),
    "expert": np.uint16,
    "weight": np.uint8,
    "mean": np.uint8,
}
"""Type of each array."""
KINDS: dict[str, tuple[type, type]] = {
    **dict.fromkeys(("sites", "expert_names", "domains", "judged"), (list, str)),
    "experts": (list, int),
    "phases": (dict, int),
    "gates": (dict, float),
}
"""What a part of the header is, and what is in it."""


def in_255(shares: ArrayLike) -> Bytes:
    """Numbers from 0 to 1 in 1/255; what is no number is 0."""
    values = np.nan_to_num(np.asarray(shares, dtype=np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(np.clip(values, 0, 1) * WHOLE).astype(np.uint8)


def routing_bytes(history: RoutingHistory) -> bytes:
    """The file, the same bytes for the same history."""
    assert (problem := history.problem()) is None, problem
    header = {name: getattr(history, name) for name in (*KINDS, "max_steps", "rows_step")}
    header |= {"format": FORMAT, "rows": [{f.name: getattr(row, f.name) for f in fields(row)} for row in history.rows]}
    text = json.dumps(header, ensure_ascii=True, allow_nan=False).encode()
    content = io.BytesIO()
    arrays = {name: getattr(history, name) for name in DTYPES}
    np.savez_compressed(content, **{HEADER: np.frombuffer(text, dtype=np.uint8)}, **arrays)
    return content.getvalue()


def write_routing(history: RoutingHistory, folder: Path) -> Path:
    """Write `folder`/routing.npz, so that a reader finds the old file or this one.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    write_whole(folder, {ROUTING_FILE: routing_bytes(history)})
    return folder / ROUTING_FILE


def read_routing(path: Path) -> RoutingHistory:
    """Read what `write_routing` wrote. No code is run, and nothing is unpacked that would be larger than a run's.

    Raises:
        CheckpointError: no such file, damaged, or of another format.
    """
    content = ROUTING.bytes_of(path)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > MOST:
                raise ROUTING.refusal(path, f"more than {MOST:,} bytes when unpacked")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            found: dict[str, NDArray[Any]] = {name: arrays[name] for name in (HEADER, *DTYPES) if name in arrays}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, MemoryError) as error:
        raise ROUTING.refusal(path, f"cannot be read: {error}") from None
    if missing := [name for name in (HEADER, *DTYPES) if name not in found]:
        raise ROUTING.refusal(path, f"is no history of routing: it has no {missing[0]}")
    header = ROUTING.parsed(ROUTING.decoded(found.pop(HEADER).tobytes(), path), path, "header: ")
    parts: dict[str, Any] = _header(header, path) | found
    history = RoutingHistory(**parts)
    if (problem := history.problem()) is not None:
        raise ROUTING.refusal(path, problem)
    return history


def _header(header: Any, path: Path) -> dict[str, Any]:
    """Fields of the history that are no arrays.

    Raises:
        CheckpointError: one of them is missing, or is something else than it must be.
    """
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT or is_deeper(header, 4):
        raise ROUTING.refusal(path, f"has format {version!r}, and this version reads {FORMAT}")
    for name, (outer, inner) in KINDS.items():
        if not _is(header.get(name), outer, inner):
            raise _wrong(path, name)
    for name in ("max_steps", "rows_step"):
        if type(header.get(name)) is not int:
            raise _wrong(path, name)
    rows = header.get("rows")
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise _wrong(path, "rows")
    return {name: header[name] for name in (*KINDS, "max_steps", "rows_step")} | {
        "rows": [SampleRow(**row) for row in rows]
    }


def _wrong(path: Path, name: str) -> CheckpointError:
    error = ROUTING.refusal(path, f"is no history of routing: {name} is missing or of another type")
    assert isinstance(error, CheckpointError)
    return error


def _is(value: Any, outer: type, inner: type) -> bool:
    allowed = (int, float) if inner is float else (inner,)
    if not isinstance(value, outer):
        return False
    return all(type(item) in allowed for item in (value.values() if isinstance(value, Mapping) else value))


def _is_row(row: Any) -> bool:
    names = {"domain": str, "name": str, "cut": int}
    return (
        isinstance(row, dict)
        and row.keys() == {*names, "texts"}
        and all(type(row[name]) is kind for name, kind in names.items())
        and _is(row["texts"], list, str)
    )
