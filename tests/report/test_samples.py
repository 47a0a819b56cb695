"""Samples in the terminal and as a page."""

import io
import re

import pytest
from rich.console import Console

from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import Encoder
from lmoe.data.rows.row import Row
from lmoe.data.show import ShownSample, show_answers
from lmoe.pretrain.bpe import train_bpe
from lmoe.report.samples import figures_line, print_samples, samples_page
from lmoe.report.tokens import visible
from lmoe.vocabulary import RowKind
from tests.report.html_page import ParsedPage

EVIL = "<script>alert('x')</script></style>]]>-->\"&lt;&amp;{{ 7*7 }}{% raw %}\u202e\x1b[31m\x00"
"""What would act in HTML, in a template, or on a terminal."""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = train_bpe(["What is the capital of France? Paris is the capital."] * 4, 300, 512)
    return Encoder(tokenizer, ChatTemplate.of(tokenizer, None), 60)


def shown(encoder: Encoder, prompt: str, answer: str, domain: str = "all", where: str = "f:1") -> ShownSample:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    [sample] = show_answers(Row(messages=messages, domain=domain, where=where, ignored=("source",)), encoder)
    return sample


def printed(*samples: ShownSample, **options: object) -> str:
    file = io.StringIO()
    print_samples(Console(file=file, width=40, **{"force_terminal": False, **options}), samples)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "no_color": True, "color_system": "truecolor"}])
def test_without_colour_what_is_learnt_stands_between_marks_and_lines_stay_whole(
    encoder: Encoder, options: dict[str, object]
) -> None:
    text = re.sub(r"\x1b\[[\d;]*m", "", printed(shown(encoder, "a\nb", "Paris is\nthe"), **options))
    assert "<|im_start|>user↵\na↵\nb<|im_end|>↵\n<|im_start|>assistant↵\n⟦Paris is↵\nthe<|im_end|>⟧↵\n" in text
    assert figures_line(shown(encoder, "a\nb", "Paris is\nthe")) in text


def test_in_colour_learnt_is_bold_and_the_rest_dim(encoder: Encoder) -> None:
    text = printed(shown(encoder, "a", "b"), force_terminal=True, color_system="standard", no_color=False)
    assert "⟦" not in text
    assert "\x1b[1;32mb\x1b[0m\x1b[1;4;32m<|im_end|>\x1b[0m" in text
    assert "\x1b[2;4m<|im_start|>\x1b[0m\x1b[2mu" in text


def test_the_line_of_figures_counts_tokens(encoder: Encoder) -> None:
    sample = shown(encoder, "a", "bc", domain="code", where="rows.jsonl:7")
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"})
    rows = encoder.encode([Row(messages=messages, domain="code", where="")]).rows
    length, learnt = int(rows.lengths.sum()), rows.label_tokens()
    assert figures_line(sample) == (
        f"rows.jsonl:7: domain code; {length} tokens, {learnt} learnt ({100 * learnt / length:.1f}%), 0 cut, "
        "turn ends learnt: 1 of 1; ignored fields: source"
    )


def test_what_is_cut_is_shown_behind_its_count(encoder: Encoder) -> None:
    text = printed(shown(encoder, "a", "é" * 60))
    assert re.search(r"⟦é+⟧\ncut here, behind 60 tokens: \d+ more\né+<\|im_end\|>↵\n", text)
    assert "turn ends learnt: 0 of 1; the end of 1 of 1 turns is not learnt" in text
    assert "of which the first 100 are shown" in printed(shown(encoder, "a", "é" * 300))


def test_a_dropped_row_has_its_reason(encoder: Encoder) -> None:
    text = printed(shown(encoder, "a", " "))
    assert "0 learnt (0.0%)" in text and "dropped: no assistant text" in text and "⟦" not in text.split("\n", 1)[1]
    refused = ShownSample(where="f:2", domain="all", note="refused: \x1bno")
    assert "f:2: domain all; refused: [U+001B]no\n" in printed(refused)


def test_text_cannot_act_on_the_terminal(encoder: Encoder) -> None:
    text = printed(shown(encoder, EVIL[:40], EVIL[40:], domain=EVIL, where=EVIL))
    assert not {"\x1b", "\x00", "\u202e"} & {*text}
    assert "[U+202E][U+001B][31m[U+0000]" in text


def test_a_terminal_without_these_characters_gets_their_names() -> None:
    raw = io.BytesIO()
    sample = ShownSample(where="é", domain="all", note="dropped: 日")
    file = io.TextIOWrapper(raw, encoding="latin-1", write_through=True)
    print_samples(Console(file=file), [sample])
    assert "é: domain all; dropped: \\u65e5" in raw.getvalue().decode("latin-1")


def page(*samples: ShownSample) -> ParsedPage:
    return ParsedPage(samples_page(samples, {"data": EVIL}))


def test_the_page_has_the_tokens_as_the_text_of_the_row(encoder: Encoder) -> None:
    parsed = page(shown(encoder, "What?\n", "Paris é 日"))
    text = parsed.text("article", "tokens", without="edge")
    assert text == "<|im_start|>user↵\nWhat?↵\n<|im_end|>↵\n<|im_start|>assistant↵\nParis é 日<|im_end|>↵\n"
    assert parsed.text("article", "learnt", without="edge") == "Paris é 日<|im_end|>"
    assert parsed.text("article", "mark") == "⟦Paris é 日<|im_end|>⟧"  # not by colour alone
    assert parsed.text("article", "end") == "<|im_end|>" and parsed.text("article", "special").count("<|im_end|>") == 2


def test_the_page_names_every_token(encoder: Encoder) -> None:
    sample = shown(encoder, "What?", "é 日")
    titles = [title for title in page(sample).values("title") if title]
    found = [int(number) for title in titles for number in re.findall(r"\d+", title)]
    assert found == [token.id for token in sample.tokens]
    assert sum("special" in title for title in titles) == 4 and sum("ends a turn" in title for title in titles) == 1


def test_the_page_counts(encoder: Encoder) -> None:
    samples = [shown(encoder, "a", "b"), shown(encoder, "a", "é" * 60), shown(encoder, "a", "", domain="code")]
    parsed = page(*samples)
    kept, learnt = sum(sample.kept for sample in samples), sum(sample.learnt for sample in samples)
    last = ["all", "3", str(kept), str(learnt), f"{100 * learnt / kept:.1f}%", str(samples[1].cut), "1 of 2"]
    assert parsed.rows[-1] == last and [row[:2] for row in parsed.rows[1:3]] == [["all", "2"], ["code", "1"]]
    assert parsed.text("article", "cut").endswith("é<|im_end|>↵\n")
    assert "cut here, behind 60 tokens" in parsed.text("article")
    assert "dropped: no assistant text" in parsed.text("warning")
    assert "the end of 1 of 1 turns is not learnt" in parsed.text("warning")


def test_text_of_rows_cannot_become_markup(encoder: Encoder) -> None:
    samples = [shown(encoder, EVIL, EVIL[:20], domain=EVIL, where=EVIL)]
    samples.append(ShownSample(where="f", domain=EVIL, note=f"refused: {EVIL}", ignored=(EVIL,)))
    parsed = page(*samples)
    assert not {"script", "link", "iframe", "img"} & {*parsed.tags} and parsed.tags.count("style") == 1
    text = parsed.text()
    assert text.count(visible(EVIL)) >= 6 and "49" not in parsed.text("h2")
    assert not {"\x1b", "\x00", "\u202e"} & {*text}


def test_the_page_needs_nothing_from_elsewhere_and_says_what_it_is(encoder: Encoder) -> None:
    parsed = page(shown(encoder, "a", "b"), shown(encoder, "a", "b", domain="code"))
    assert {*parsed.values("href"), *parsed.values("src")} == {"#domain-1", "#domain-2"}
    assert {"domain-1", "domain-2"} <= {*parsed.values("id")}
    assert parsed.values("lang") == ["en"] and parsed.text("title") == "What training sees"
    assert "url(" not in parsed.text("style") and "@import" not in parsed.text("style")
    assert "prefers-color-scheme: dark" in parsed.text("style")
    assert "default-src 'none'" in " ".join(parsed.values("content"))
    for word in ("learnt", "seen", "special", "end", "cut", "↵"):
        assert word in parsed.text("legend")


def test_a_domain_of_refused_rows_has_no_share() -> None:
    parsed = page(ShownSample(where="f:1", domain="all", note="refused: no"))
    assert parsed.rows[1] == ["all", "1", "0", "0", "-", "0", "0 of 0"]
    assert "tokens" not in parsed.text("article")


def test_a_record_that_is_no_row_has_no_domain() -> None:
    line = figures_line(ShownSample(where="f:1", domain="", note="refused: no"))
    assert line == "f:1: refused: no"


def test_a_pair_is_one_row_of_two_articles_that_say_which_answer_they_hold(encoder: Encoder) -> None:
    answers = {name: ({"role": "assistant", "content": name},) for name in ("chosen", "rejected")}
    row = Row(messages=({"role": "user", "content": "a"},), domain="all", where="f:1", **answers)
    samples = show_answers(row, Encoder(encoder.tokenizer, encoder.template, 60, kind=RowKind.pairs))
    parsed = page(*samples)
    assert parsed.tags.count("article") == 2 and parsed.rows[-1][:2] == ["all", "1"]
    assert "f:1: chosen answer" in parsed.text("h3") and "f:1: rejected answer" in parsed.text("h3")
    assert parsed.text("article", "learnt", without="edge") == "chosen<|im_end|>rejected<|im_end|>"
    text = printed(*samples)
    assert "f:1: domain all; chosen answer; " in text and "f:1: domain all; rejected answer; " in text
    assert "⟦chosen<|im_end|>⟧" in text and "⟦rejected<|im_end|>⟧" in text
