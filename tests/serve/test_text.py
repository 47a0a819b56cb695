"""Text of answers while it comes: never half a character, never a part of a stop string."""

import random

import pytest

from lmoe.serve.stop import StopStrings
from lmoe.serve.text import UNFINISHED, Detokeniser, TokenTexts
from tests.serve.fake_engine import SAID, end, tokenizer


def pieces_of(ids: list[int]) -> list[str]:
    text = Detokeniser(tokenizer())
    return [*(text.push(number) for number in ids), text.flush()]


def test_the_pieces_are_the_text_and_none_ends_in_half_a_character():
    text = SAID + " 日本語 👩‍👩‍👧 ñ\n\tend"
    ids = tokenizer().encode(text, add_special_tokens=False)
    pieces = pieces_of(ids)
    assert "".join(pieces) == text
    assert len(pieces) > 20
    assert not [piece for piece in pieces if UNFINISHED in piece]


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_tokens_the_pieces_together_are_what_the_tokenizer_makes_of_them(seed):
    draw = random.Random(seed)
    ids = [draw.randrange(len(tokenizer())) for _ in range(60)]
    if seed % 2:  # mostly single bytes, of which many make no character
        ids = [draw.choice(ids) if draw.random() < 0.2 else draw.randrange(300) for _ in range(60)]
    assert "".join(pieces_of(ids)) == tokenizer().decode(ids, skip_special_tokens=True)


def test_special_tokens_are_no_text():
    ids = tokenizer().encode("one", add_special_tokens=False)
    assert "".join(pieces_of([*ids, end(), *ids])) == "oneone"


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back_for_ever():
    broken = tokenizer().encode("€", add_special_tokens=False)[:1]
    pieces = pieces_of(broken * 50)
    assert sum(map(len, pieces[:-1])) > 40


def test_the_bytes_of_tokens_together_are_those_of_the_text():
    ids, texts = tokenizer().encode(SAID, add_special_tokens=False), TokenTexts(tokenizer())
    assert b"".join(texts.of(number).content for number in ids) == SAID.encode()
    assert texts.of(end()).text == tokenizer().eos_token
    assert texts.of(10**6).content == b""


def stopped(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    found = StopStrings(stops)
    shown = ""
    for piece in pieces:
        new = found.push(piece)
        shown += new
    return shown + found.flush(), found.found


def letter_by_letter(stops: list[str], text: str) -> tuple[str, bool]:
    """The dumb way: the first stop string that is whole."""
    for length in range(1, len(text) + 1):
        ends = [stop for stop in stops if text[:length].endswith(stop)]
        if ends:
            return text[: length - max(map(len, ends))], True
    return text, False


def test_text_is_cut_before_the_first_stop_string_however_it_is_cut_into_pieces():
    draw, cut = random.Random(0), 0
    for _ in range(400):
        text = "".join(draw.choice("abc") for _ in range(draw.randrange(12)))
        stops = ["".join(draw.choice("abc") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        places = sorted(draw.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        expected = letter_by_letter(stops, text)
        assert stopped(stops, pieces) == expected, (text, stops, pieces)
        cut += expected[1]
    assert 50 < cut < 390


def test_nothing_that_may_be_the_beginning_of_a_stop_string_is_shown():
    found = StopStrings(["<end>"])
    assert [found.push(letter) for letter in "a<en"] == ["a", "", "", ""]
    assert found.push("e") == "<ene"
    assert found.push("<end>b") == ""
    assert found.found and found.flush() == ""
