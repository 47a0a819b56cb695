"""Forms with files, cut wherever the network cuts them."""

import random

import pytest

from lmoe.serve.http.multipart import LONGEST_HEADER, MOST_HEADERS, FormFiles
from lmoe.serve.http.problem import Problem

KIND = "multipart/form-data; boundary=--=_b0"
EDGE = b"----=_b0"


def form(*files: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    parts = [
        EDGE + b'\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n%s\r\n" % (name.encode(), content)
        for name, content in files
    ]
    return b"".join(parts) + EDGE + end


def read(body: bytes, sizes: list[int] | None = None, kind: str = KIND) -> list[tuple[str, bytes]]:
    """The files of a body that comes in pieces of these sizes, and then the rest."""
    found: list[tuple[str, bytearray]] = []
    parser = FormFiles(
        kind, lambda name: found.append((name, bytearray())), lambda content: found[-1][1].extend(content)
    )
    for size in sizes or []:
        parser.feed(body[:size])
        body = body[size:]
    parser.feed(body)
    parser.end()
    return [(name, bytes(content)) for name, content in found]


def test_files_are_the_same_wherever_the_body_is_cut() -> None:
    draw = random.Random(0)
    hard = b"\r\n--\r\n----=_b\r\n----=_b1\r\n-\r\r\n" + draw.randbytes(300) + b"\r\n----=_"
    files = [("adapter_config.json", b"{}"), ("empty.safetensors", b""), ("adapter_model.safetensors", hard)]
    body = form(*files)
    assert read(body) == read(body, [1] * len(body)) == files
    for _ in range(200):
        assert read(body, [draw.randrange(0, 60) for _ in range(12)]) == files


def test_what_stands_behind_the_end_says_nothing() -> None:
    assert read(form(("a", b"1")) + b"more" + form(("b", b"2"))) == [("a", b"1")]
    assert read(EDGE + b"--") == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "ends before its last boundary"),
        (form(("a", b"1"))[:-4], "ends before its last boundary"),
        (form(("a", b"1"), end=b"\r\n"), "ends before its last boundary"),
        (b"before\r\n" + form(("a", b"1")), "Expected boundary"),
        (b"{}" * 100, "Expected boundary"),
        (form(("a", b"1"), end=b"ab"), "ends before its last boundary"),
        (EDGE + b'\r\nContent-Disposition: form-data; name="place"\r\n\r\n/etc\r\n' + EDGE + b"--", "no file"),
        (EDGE + b'\r\nContent-Disposition: attachment; filename="a"\r\n\r\n1\r\n' + EDGE + b"--", "no file"),
        (EDGE + b"\r\n" + b"x" * 2 * LONGEST_HEADER, "header size exceeded"),
        (EDGE + b"\r\n" + b"x: y\r\n" * (MOST_HEADERS + 1), "header count exceeded"),
        (form(*[("a", b"1")] * 17), "more than 16 files"),
    ],
)
def test_what_is_no_form_with_files_is_refused(body: bytes, said: str) -> None:
    for sizes in (None, [1] * len(body)):
        with pytest.raises(Problem, match=said) as caught:
            read(body, sizes)
        assert caught.value.status == 400


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'b' * 71}",
    ],
)
def test_another_kind_of_body_is_refused(kind: str) -> None:
    with pytest.raises(Problem, match="Content-Type: multipart/form-data") as caught:
        read(form(), kind=kind)
    assert caught.value.status == 415


def test_no_bytes_end_in_anything_but_files_or_a_refusal() -> None:
    draw, refused = random.Random(1), 0
    whole = form(("adapter_config.json", b"{}"), ("a.safetensors", bytes(range(256))))
    for _ in range(500):
        body = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            at = draw.randrange(len(body))
            body[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        try:
            read(bytes(body))
        except Problem:
            refused += 1
    assert refused > 50
