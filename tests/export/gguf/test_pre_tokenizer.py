"""How a tokenizer cuts text is found by what it does, and what no name of llama.cpp stands for is refused."""

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split, Whitespace
from transformers import AutoTokenizer

from lmoe.errors import BackboneError
from lmoe.export.gguf.pre_tokenizer import REST, WORDS, pre_tokenizer_name
from tests.public_packages import TOKENIZERS, public_folder

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPELT_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


def split(pattern: str) -> Sequence:
    cut = Split(Regex(pattern), behavior="isolated")
    return Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])


QWEN2 = rf"{WORDS}|\p{{N}}|{REST}"
LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
KNOWN = {
    "Qwen2": (split(QWEN2), False, "qwen2"),
    "Qwen2, spelt out": (split(QWEN2.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", SPELT_OUT)), False, "qwen2"),
    "Qwen2, of which blanks take all line breaks but one": (
        split(QWEN2.replace(r"\s*[\r\n]+", r"\s*[\r\n]")),
        False,
        "qwen2",
    ),
    "GPT-2": (ByteLevel(add_prefix_space=False), False, "gpt-2"),
    "GPT-2 as a pattern": (split(GPT2), False, "gpt-2"),
    "SmolLM": (Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), False, "smollm"),
    "Llama 3": (split(LLAMA3), True, "llama-bpe"),
    "Llama 3 that merges": (split(LLAMA3), False, "smaug-bpe"),
}
UNKNOWN = {
    "none": (None, False),
    "a space before": (ByteLevel(add_prefix_space=True), False),
    "numbers as a whole": (Sequence([Digits(), ByteLevel(add_prefix_space=False)]), False),
    "digits by four": (split(LLAMA3.replace("{1,3}", "{1,4}")), True),
    "letters with marks": (split(QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")), False),
    "contractions in small letters": (split(QWEN2.replace("(?i:", "(?:")), False),
    "no contractions": (split(QWEN2.partition("|[^")[1][1:] + QWEN2.partition("|[^")[2]), False),
    "slashes with line breaks": (split(QWEN2.replace(r"[\r\n]*", r"[\r\n/]*")), False),
    "spaces by steps": (split(QWEN2.replace(r"\s+(?!\S)", r"\s{4}(?!\S)|\s{1,2}(?!\S)")), False),
    "Qwen2 with whole words": (split(QWEN2), True),
    "SentencePiece": (Metaspace(), False),
    "words": (Whitespace(), False),
}


@pytest.mark.parametrize("case", KNOWN)
def test_what_cuts_alike_has_the_same_name_however_it_is_written(case):
    found, ignore_merges, name = KNOWN[case]
    assert pre_tokenizer_name(found, ignore_merges=ignore_merges, where="here") == name


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_cuts_otherwise_is_refused_with_what_is_known(case):
    found, ignore_merges = UNKNOWN[case]
    with pytest.raises(
        BackboneError, match=r"here: the tokenizer .* none of qwen2 .* llama-bpe \(ignore_merges=true\)"
    ):
        pre_tokenizer_name(found, ignore_merges=ignore_merges, where="here")


@pytest.mark.parametrize(("name", "expected"), [("smollm2", "gpt-2"), ("deepseek", None), ("mistral-v3", None)])
def test_tokenizers_of_real_models_are_told_apart(name, expected):
    tokenizer = AutoTokenizer.from_pretrained(public_folder() / TOKENIZERS / name)
    found = tokenizer.backend_tokenizer.pre_tokenizer
    if expected is None:
        with pytest.raises(BackboneError, match="the tokenizer"):
            pre_tokenizer_name(found, ignore_merges=False, where=name)
    else:
        assert pre_tokenizer_name(found, ignore_merges=False, where=name) == expected
