"""Tokens as a reader sees them."""

import pytest

from lmoe.data.show import ShownSample, ShownToken
from lmoe.report.tokens import NO_TEXT, token_runs, visible


def token(text: str, number: int = 0, *, learnt: bool = False, special: bool = False, cut: bool = False) -> ShownToken:
    return ShownToken(text=text, id=number, learnt=learnt, special=special, cut=cut)


def sample_of(*tokens: ShownToken, turn_ends: tuple[int, ...] = ()) -> ShownSample:
    return ShownSample(where="f:1", domain="all", tokens=tokens, turns=len(turn_ends), turn_ends=turn_ends)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\nb\r\n", "a↵\nb[U+000D]↵\n"),
        ("\x00\x1b[31m\x7f\x9b", "[U+0000][U+001B][31m[U+007F][U+009B]"),
        ("a\u202eb\u2066\u200f\u200b\ufeff\u2028", "a[U+202E]b[U+2066][U+200F][U+200B][U+FEFF][U+2028]"),
        ("\U000e0041\udc80", "[U+E0041][U+DC80]"),
        ("\t⟦↵⇥⟧", "⇥\t[U+27E6][U+21B5][U+21E5][U+27E7]"),
        ("é 日 👩\u200d👧 \u0645\u200c <b>&amp;", "é 日 👩\u200d👧 \u0645\u200c <b>&amp;"),
    ],
)
def test_what_cannot_be_seen_or_would_act_gets_a_mark(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_neighbours_of_one_kind_are_one_run_and_no_token_is_lost() -> None:
    runs = token_runs(
        sample_of(
            *(token("<s>", 1, special=True), token("a", 2), token("b", 3, learnt=True)),
            *(token("</s>", 4, learnt=True, special=True), token("c", 5), token("d", 6, cut=True)),
            turn_ends=(3,),
        )
    )
    assert [(run.text, run.learnt, run.cut) for run in runs] == [
        *(("<s>a", False, False), ("b</s>", True, False), ("c", False, False), ("d", False, True))
    ]
    assert [text.label for run in runs for text in run.tokens] == [
        *("token 1, special", "token 2", "token 3", "token 4, special, ends a turn", "token 5", "token 6")
    ]


def test_a_character_of_several_tokens_is_shown_once_with_their_ids() -> None:
    [run] = token_runs(sample_of(token("é", 7), token("", 8), token("", 9), token("x", 10)))
    assert [(text.text, text.label) for text in run.tokens] == [("é", "tokens 7, 8, 9"), ("x", "token 10")]


def test_a_character_at_a_border_is_learnt_where_one_of_its_tokens_is_and_kept_where_it_begins_before_the_cut() -> None:
    [run] = token_runs(sample_of(token("é", 7), token("", 8, learnt=True)))
    assert run.learnt
    [run] = token_runs(sample_of(token("é", 7), token("", 8, cut=True)))
    assert not run.cut


def test_a_token_without_text_is_not_lost_behind_a_special_one() -> None:
    [run] = token_runs(sample_of(token("<s>", 1, special=True), token("", 2), token("a", 3)))
    assert [text.text for text in run.tokens] == ["<s>", NO_TEXT, "a"]
