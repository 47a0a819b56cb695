"""Text for pre-training: which files are its domains, and where their tails are kept out."""

import gzip
from pathlib import Path

import pytest

from lmoe.errors import DataError
from lmoe.pretrain.corpus import read_corpus

LEAST = 400
"""Characters that are kept out."""
SENTENCES = [f"Sentence {number} says little." for number in range(200)]


def folder_with(folder: Path, names: list[str]) -> str:
    for name in names:
        content = " ".join(SENTENCES).encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(folder)


@pytest.mark.parametrize("names", [["en.a.txt", "en.b.txt", "fr.txt"], ["en.txt", "en.txt.gz"]])
def test_two_files_of_one_domain_are_refused(tmp_path, names):
    with pytest.raises(DataError, match=rf"{names[1]}: {names[0]} gives the domain 'en' too; rename the file"):
        read_corpus(folder_with(tmp_path, names), 0.01, LEAST)


def test_a_text_may_be_called_chats_where_there_are_none_beside_it(tmp_path):
    folder = folder_with(tmp_path, ["chats.txt", "en.txt", ".hidden.txt"])
    assert [text.name for text in read_corpus(folder, 0.01, LEAST)] == ["chats", "en"]
    with pytest.raises(DataError, match=r"chats.txt: corpus.chats_path gives the domain 'chats' too"):
        read_corpus(folder, 0.01, LEAST, with_chats=True)


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("\n\n".join(SENTENCES), "Sentence "),
        ("\r\n\r\n".join(SENTENCES), "Sentence "),
        ("\n".join(SENTENCES), "Sentence "),
        ("Title\n\n" + "\n".join(SENTENCES), "Sentence "),
        (" ".join(SENTENCES), ""),
        ("".join(SENTENCES).replace(" ", ""), ""),
    ],
    ids=["paragraphs", "Windows line breaks", "lines", "lines below a title", "words", "one word"],
)
def test_the_tail_begins_at_a_border_nearby(tmp_path, text, begins):
    """Of text without blank lines all but the first character was kept out."""
    (tmp_path / "en.txt").write_bytes(text.encode())
    [found] = read_corpus(str(tmp_path), 0.01, LEAST)
    assert found.train + found.held_out == text.replace("\r\n", "\n")
    assert LEAST <= len(found.held_out) <= 2 * LEAST
    assert found.held_out.startswith(begins)
    assert found.train[-1].isspace() or " " not in text
