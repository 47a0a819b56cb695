"""What is shown of a row is what training makes of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lmoe.config.data import DataConfig
from lmoe.data.chats.template import ChatTemplate
from lmoe.data.encode import NO_ASSISTANT_TEXT, Encoder, cut_reason
from lmoe.data.rows.row import Row
from lmoe.data.show import MOST_CUT, ShownSample, first_rows, show_answers, show_rows
from lmoe.vocabulary import RowKind
from tests.data.chats.templates import LLAMA2_STYLE, QWEN_STYLE, WITHOUT_GENERATION
from tests.data.chats.test_template import CONVERSATIONS, chat

TEXTS = ("Two plus two", "  é 日本語 👩‍👩‍👧\n\n\ttail ", "日", "<|im_end|> inside")


def text_row(text: str, domain: str = "all") -> Row:
    return Row(text=text, domain=domain, where="f:1")


def chat_row(*contents: str) -> Row:
    return Row(messages=chat(*contents), domain="all", where="f:1")


def encoder_of(tokenizer: PreTrainedTokenizerBase, template: str | None = None, max_length: int = 512) -> Encoder:
    if template is not None:
        tokenizer.chat_template = template
    return Encoder(tokenizer, ChatTemplate.of(tokenizer, None), max_length)


def show_row(row: Row, encoder: Encoder) -> ShownSample:
    """The one sample of a row that is not of pairs."""
    [sample] = show_answers(row, encoder)
    return sample


def joined(sample: ShownSample) -> str:
    return "".join(token.text for token in sample.tokens)


def with_byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's and Mistral's first ones: a space before the text, bytes of what is not in the vocabulary, a bos."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: len(vocab) + i for i, piece in enumerate(["▁", "h", "e", "l", "o", "he", "ll", "▁he"])}
    merges = [("h", "e"), ("l", "l"), ("▁", "he")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["<s>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("template", [None, WITHOUT_GENERATION, QWEN_STYLE])
@pytest.mark.parametrize("name", [n for n in CONVERSATIONS if n != "no assistant"])
def test_tokens_joined_are_the_rendering_and_learnt_ones_the_labels_of_training(
    tokenizer: PreTrainedTokenizerFast, name: str, template: str | None
) -> None:
    row = Row(messages=CONVERSATIONS[name], domain="all", where="f:1")
    encoder = encoder_of(tokenizer, template)
    [sample] = show_answers(row, encoder)
    assert joined(sample) == encoder.template.render(row).text
    [encoded] = encoder.encode([row]).rows
    assert [token.id for token in sample.tokens] == encoded.input_ids.tolist()
    assert [token.learnt for token in sample.tokens] == encoded.is_label.tolist()
    assert sample.turns == sample.ends_learnt > 0 and not sample.note and not sample.cut


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_is_shown_with_the_tokens_that_the_tokenizer_adds(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert joined(show_row(text_row(text), encoder_of(tokenizer))) == f"{text}<|im_end|>"
    assert joined(show_row(text_row(text), encoder_of(with_byte_fallback()))) == f"<s>{text}</s>"
    assert joined(show_row(text_row(text), encoder_of(ByT5Tokenizer()))) == f"{text}</s>"


@pytest.mark.parametrize("make", [None, with_byte_fallback, ByT5Tokenizer])
def test_a_character_of_several_tokens_belongs_to_the_first_of_them(
    tokenizer: PreTrainedTokenizerFast, make: Callable[[], PreTrainedTokenizerBase] | None
) -> None:
    sample = show_row(text_row("hé 日"), encoder_of(tokenizer if make is None else make()))
    texts = [token.text for token in sample.tokens if not token.special]
    assert texts[-6:] == ["é", "", " ", "日", "", ""]


def test_what_is_predicted_by_nothing_is_not_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = encoder_of(tokenizer)
    sample = show_row(text_row("Two plus two"), encoder)
    assert not sample.tokens[0].learnt and all(token.learnt for token in sample.tokens[1:])
    assert sample.learnt == encoder.encode([text_row("Two plus two")]).rows.label_tokens()


def test_what_is_cut_is_counted_and_only_its_beginning_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    row = chat_row("hi", "four " * 50)
    whole = show_row(row, encoder_of(tokenizer))
    sample = show_row(row, encoder_of(tokenizer, max_length=20))
    assert sample.kept == 20 and sample.cut == whole.kept - 20
    assert len(sample.tokens) == 20 + min(MOST_CUT, sample.cut)
    assert [token.id for token in sample.tokens] == [token.id for token in whole.tokens[: len(sample.tokens)]]
    assert sample.learnt == encoder_of(tokenizer, max_length=20).encode([row]).rows.label_tokens()
    assert (sample.turns, sample.ends_learnt) == (1, 0)
    longer = show_row(chat_row("hi", "four " * 500), encoder_of(tokenizer, max_length=20))
    assert longer.cut > MOST_CUT == len(longer.tokens) - longer.kept


def test_an_end_that_the_template_leaves_out_of_the_turn_is_found_and_not_learnt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    template = tokenizer.chat_template.replace(
        "message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    sample = show_row(chat_row("a", "b", "c", "d"), encoder_of(tokenizer, template))
    assert (sample.turns, sample.ends_learnt) == (2, 0)
    assert [sample.tokens[end].text for end in sample.turn_ends] == ["<|im_end|>"] * 2


def test_the_end_of_a_turn_is_its_own_and_not_the_beginning_of_the_next(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '\n' }}{% endfor %}"
    sample = show_row(chat_row("a", "b", "c", "six"), encoder_of(tokenizer, template))
    assert (sample.turns, sample.turn_ends) == (2, ())
    spaced = show_row(chat_row("a", "four"), encoder_of(tokenizer, LLAMA2_STYLE))
    assert (spaced.turns, spaced.ends_learnt) == (1, 1)


def test_rows_that_are_dropped_or_refused_are_shown_with_the_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    dropped = show_row(chat_row("hi", " "), encoder_of(tokenizer))
    assert dropped.note == f"dropped: {NO_ASSISTANT_TEXT}" and dropped.tokens and not dropped.learnt
    behind = show_row(chat_row("hi " * 50, "x"), encoder_of(tokenizer, max_length=20))
    assert behind.note == f"dropped: {cut_reason(20)}" and behind.kept == 20 and not behind.learnt
    refused = show_row(chat_row("hi", "x"), encoder_of(tokenizer, "{{ raise_exception('not this one') }}"))
    assert refused.note == "refused: the chat template refuses this conversation: not this one"
    assert refused.tokens == () and (refused.where, refused.domain) == ("f:1", "all")


def test_the_first_rows_of_each_domain_are_shown(
    tokenizer: PreTrainedTokenizerFast, write_rows: Any, tmp_path: Path
) -> None:
    rows = [text_row(str(n), "b" if n % 3 else "a") for n in range(9)]
    assert [row.text for row in first_rows(rows, 2)] == ["0", "3", "1", "2"]
    share = Path(write_rows({"text": "one", "source": "s"}, {"text": "two"}, name="share/sft/train/math.jsonl"))
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    [sample] = show_rows(config, tokenizer, bundled=share.parents[2], count=1)
    assert (sample.where, sample.domain, sample.ignored) == (f"{share}:1", "math", ("source",))
    assert joined(sample) == "one<|im_end|>"


def test_a_record_that_is_no_row_is_shown_by_its_file_and_line(
    tokenizer: PreTrainedTokenizerFast, write_rows: Any, tmp_path: Path
) -> None:
    path = write_rows({"text": "one"}, {"text": 2}, {"text": None})
    config = DataConfig(path=path, cache_dir=str(tmp_path / "cache"))
    _, refused = show_rows(config, tokenizer, bundled=tmp_path, count=1)
    assert (refused.where, refused.domain, refused.note) == (f"{path}:2", "", "refused: text must be text, got 2")


def test_a_row_is_rendered_once_to_be_shown(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, rendered = encoder_of(tokenizer), []
    render = encoder.template.render
    monkeypatch.setattr(encoder.template, "render", lambda row: rendered.append(row) or render(row))
    row = chat_row("hi", "four")
    assert show_row(row, encoder).tokens
    assert rendered == [row]


PAIR = Row(
    messages=chat("Two plus two", "an earlier answer", "And three?"),
    chosen=({"role": "assistant", "content": "Four."},),
    rejected=({"role": "assistant", "content": "Five, I think."},),
    domain="all",
    where="f:1",
)


@pytest.mark.parametrize("kind", [RowKind.pairs, RowKind.labelled])
def test_a_pair_is_shown_as_the_two_sequences_that_training_sees(kind: RowKind, tokenizer) -> None:
    encoder = pair_encoder(tokenizer, kind)
    kept = list(encoder.encode([PAIR]).rows)
    seen = [sequence for row in kept for sequence in (row.pair() if row.second else (row,))]
    shown = show_answers(PAIR, encoder)
    for sample, sequence in zip(shown, seen, strict=True):
        assert [token.id for token in sample.tokens] == sequence.input_ids.tolist()
        assert [token.learnt for token in sample.tokens] == sequence.is_label.tolist()
        assert sample.turns == sample.ends_learnt == 1
    learnt = ["".join(token.text for token in sample.tokens if token.learnt) for sample in shown]
    assert learnt[0].startswith("Four.") and learnt[1].startswith("Five, I think.")
    assert not any("earlier" in text for text in learnt)
    names = {RowKind.pairs: ["chosen answer", "rejected answer"], RowKind.labelled: ["good answer", "bad answer"]}
    assert [sample.answer for sample in shown] == names[kind]
    assert [sample.of_row_before for sample in shown] == [False, True]


def test_of_a_pair_that_is_dropped_nothing_is_learnt(tokenizer) -> None:
    pair = replace(PAIR, rejected=({"role": "assistant", "content": ""},))
    shown = show_answers(pair, pair_encoder(tokenizer, RowKind.pairs))
    assert [(sample.note, sample.learnt, sample.turns) for sample in shown] == [
        (f"dropped: {NO_ASSISTANT_TEXT}", 0, 0)
    ] * 2
    apart = show_answers(pair, pair_encoder(tokenizer, RowKind.labelled))
    assert [bool(sample.note) for sample in apart] == [False, True] and apart[0].learnt


def test_what_is_no_pair_is_refused_once(tokenizer) -> None:
    [sample] = show_answers(chat_row("a", "b"), pair_encoder(tokenizer, RowKind.pairs))
    assert sample.note.startswith("refused: it is no pair of answers") and not sample.tokens


def pair_encoder(tokenizer: PreTrainedTokenizerBase, kind: RowKind) -> Encoder:
    tokenizer.chat_template = QWEN_STYLE
    return Encoder(tokenizer, ChatTemplate.of(tokenizer, None), 512, kind=kind)
