"""A tokenizer as llama.cpp has it: texts, types, ends of answers; and those of which it would make other tokens."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, models, normalizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lmoe.errors import BackboneError
from lmoe.export.gguf.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, vocabulary_of
from lmoe.pretrain.bpe import train_bpe
from tests.export.gguf.folders import TEXTS

VOCAB = 270


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, VOCAB, 64)


def test_every_id_has_its_text_and_type_and_every_pair_its_place(tokenizer):
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    found = vocabulary_of(tokenizer, VOCAB + 4, None, "here")
    assert found.tokens[:VOCAB] == tokenizer.convert_ids_to_tokens(list(range(VOCAB)))
    assert found.tokens[VOCAB:] == ["<tool>", "[UNUSED271]", "[UNUSED272]", "[UNUSED273]"]
    assert found.types == [CONTROL] * 4 + [NORMAL] * (VOCAB - 4) + [USER_DEFINED] + [UNUSED] * 3
    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found.merges == [f"{left} {right}" for left, right in stored] and len(found.merges) == VOCAB - 4 - 256
    assert (found.eos, found.bos, found.pad) == (tokenizer.eos_token_id, None, tokenizer.pad_token_id)
    assert found.chat_template == tokenizer.chat_template


def test_an_unused_row_never_takes_the_text_of_a_token(tokenizer):
    tokenizer.add_tokens(["[UNUSED271]"])
    found = vocabulary_of(tokenizer, VOCAB + 2, None, "here")
    assert found.tokens[VOCAB:] == ["[UNUSED271]", "[[UNUSED271]]"] and len(set(found.tokens)) == VOCAB + 2


@pytest.mark.parametrize(("told", "more"), [(None, []), (3, []), ([3, 0], [0]), ([0, 2, 3], [0, 2])])
def test_all_tokens_that_end_an_answer_are_named_the_tokenizers_own_first(told, more, tokenizer):
    generation = GenerationConfig(eos_token_id=told)
    found = vocabulary_of(tokenizer, VOCAB, generation, "here")
    assert tokenizer.eos_token_id == 3 and (found.eos, found.more_ends) == (3, more)


def test_what_is_put_around_a_text_is_found_by_trying(tokenizer):
    plain = vocabulary_of(tokenizer, VOCAB, None, "here")
    assert (plain.add_bos, plain.add_eos) == (False, False)
    tokenizer.bos_token = "<|endoftext|>"
    backend = tokenizer.backend_tokenizer
    for single, expected in (("<|endoftext|> $A", (True, False)), ("<|endoftext|> $A <|im_end|>", (True, True))):
        special = [("<|endoftext|>", 0), ("<|im_end|>", 3)]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
        found = vocabulary_of(tokenizer, VOCAB, None, "here")
        assert (found.add_bos, found.add_eos) == expected
    backend.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 1)])
    with pytest.raises(BackboneError, match="with more around it than bos and eos"):
        vocabulary_of(tokenizer, VOCAB, None, "here")


def without_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None


def with_lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def with_strip(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])


def with_end_of_word(tokenizer: PreTrainedTokenizerFast) -> None:
    backend = tokenizer.backend_tokenizer
    backend.model = models.BPE(vocab={"a</w>": 0, "b": 1}, merges=[], end_of_word_suffix="</w>")


def with_word_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.model = models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")


REFUSED = {
    "no end of an answer": (without_eos, "names a token that ends an answer; set eos_token"),
    "a normalizer": (with_lower_case, "normalizer 'Lowercase' (none or NFC is written)"),
    "a token that eats spaces": (with_strip, "token '<mask>' has lstrip"),
    "another BPE": (with_end_of_word, "end_of_word_suffix=</w>"),
    "no BPE": (with_word_piece, "its model is WordPiece, and byte-level BPE is what is written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_do_otherwise_is_refused_by_name(case, tokenizer):
    change, reason = REFUSED[case]
    change(tokenizer)
    with pytest.raises(BackboneError) as refusal:
        vocabulary_of(tokenizer, VOCAB + 1, None, "here")
    assert reason in str(refusal.value)


def test_more_tokens_than_rows_and_more_ends_than_a_file_names_are_refused(tokenizer):
    with pytest.raises(BackboneError, match=r"has a token 269, and the model's embedding has 200 rows"):
        vocabulary_of(tokenizer, 200, None, "here")
    with pytest.raises(BackboneError, match="4 tokens end an answer"):
        vocabulary_of(tokenizer, VOCAB, GenerationConfig(eos_token_id=[0, 1, 2]), "here")


def test_a_tokenizer_of_sentencepiece_is_refused(tmp_path: Path):
    backend = models.BPE(vocab={"<unk>": 0, "▁a": 1}, merges=[], byte_fallback=True, unk_token="<unk>")
    tokenizer = train_bpe(TEXTS, VOCAB, 64)
    tokenizer.backend_tokenizer.model = backend
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="BPE with byte_fallback, and byte-level BPE is what is written"):
        vocabulary_of(AutoTokenizer.from_pretrained(tmp_path), VOCAB, None, "here")
