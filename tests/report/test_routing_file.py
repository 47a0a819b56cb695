"""report/routing.npz comes back as it was written; what is damaged or would be too large is refused by name."""

import io
import json
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from lmoe.errors import CheckpointError
from lmoe.report import routing_file
from lmoe.report.routing_file import DTYPES, RoutingHistory, in_255, read_routing, routing_bytes, write_routing
from tests.report.routing import made_up


def equal(one: RoutingHistory, other: RoutingHistory) -> bool:
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in fields(RoutingHistory))
    return all(a.dtype == b.dtype and np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


@pytest.mark.parametrize(
    "history",
    [
        made_up(),
        made_up(texts=(), validations=0),
        made_up(steps=0, validations=0, texts=()),
        made_up(domains=("a \"b' </script>", "\u202e"), texts=(("<b>", "😀", "\x00"),)),
    ],
    ids=["whole", "before a validation", "empty", "any text"],
)
def test_a_history_comes_back_as_it_was_written_and_has_the_same_bytes_each_time(history, tmp_path: Path) -> None:
    path = write_routing(history, tmp_path / "report")
    assert equal(read_routing(path), history)
    assert path.read_bytes() == routing_bytes(history) == routing_bytes(read_routing(path))


def test_shares_are_kept_to_half_a_255th_and_what_is_no_number_is_0() -> None:
    shares = np.linspace(0, 1, 1001)
    assert np.abs(in_255(shares) / 255 - shares).max() <= 0.5 / 255 + 1e-12
    assert in_255([np.nan, -1, 2, np.inf]).tolist() == [0, 0, 255, 255]


def changed(history: RoutingHistory, header: dict | None = None, without: str = "", **arrays) -> bytes:
    """The file with parts of its header, or some arrays, replaced, and without one of them."""
    with np.load(io.BytesIO(routing_bytes(history))) as found:
        parts = dict(found)
    text = json.loads(parts["header"].tobytes()) | (header or {})
    parts |= {"header": np.frombuffer(json.dumps(text).encode(), np.uint8)}
    parts |= arrays
    content = io.BytesIO()
    np.savez(content, **{name: part for name, part in parts.items() if name != without})
    return content.getvalue()


@pytest.mark.parametrize("name", ["header", *DTYPES])
def test_a_file_that_lacks_an_array_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "routing.npz").write_bytes(changed(made_up(), without=name))
    with pytest.raises(CheckpointError, match=f"routing.npz: is no history of routing: it has no {name}; remove it"):
        read_routing(tmp_path / "routing.npz")


@pytest.mark.parametrize(
    ("header", "arrays", "said"),
    [
        ({"format": 2}, {}, "has format 2, and this version reads 1"),
        ({"sites": ["a"]}, {}, "1 sites, and experts of 3"),
        ({"sites": "abc"}, {}, "sites is missing or of another type"),
        ({"experts": [4, 4, True]}, {}, "experts is missing"),
        ({"phases": {"a": "b"}}, {}, "phases is missing"),
        ({"rows": [{"domain": "a"}]}, {}, "rows is missing"),
        ({"max_steps": 1.5}, {}, "max_steps is missing"),
        ({}, {"load": np.zeros((5, 3), np.uint8)}, r"load is uint8 \(5, 3\), must be uint8 \(5, 11\)"),
        ({}, {"load": np.zeros((5, 11))}, "load is float64"),
        ({}, {"steps": np.zeros(5, np.int64)}, "steps do not ascend"),
        ({}, {"expert": np.full((5, 3), 9, np.uint16)}, "expert names one that its site does not have"),
        ({}, {"load": np.array([{}], dtype=object)}, "cannot be read: Object arrays cannot be loaded"),
    ],
)
def test_what_does_not_fit_together_is_refused_and_nothing_is_unpickled(header, arrays, said, tmp_path: Path) -> None:
    (tmp_path / "routing.npz").write_bytes(changed(made_up(), header, **arrays))
    with pytest.raises(CheckpointError, match=said):
        read_routing(tmp_path / "routing.npz")


def test_a_torn_file_and_one_that_unpacks_to_more_than_any_run_has_are_refused(tmp_path: Path, monkeypatch) -> None:
    path, whole = tmp_path / "routing.npz", routing_bytes(made_up())
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:200] + b"\xff" * 50 + whole[250:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"routing\.npz: cannot be read"):
            read_routing(path)
    monkeypatch.setattr(routing_file, "MOST", 2**20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("load.npy", bytes(2**21))
    with pytest.raises(CheckpointError, match="more than 1,048,576 bytes when unpacked"):
        read_routing(path)


def test_a_history_whose_parts_do_not_fit_is_never_written() -> None:
    with pytest.raises(AssertionError, match="largest"):
        routing_bytes(replace(made_up(), largest=np.zeros((1, 1), np.uint8)))
