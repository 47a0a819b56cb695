"""What llama.cpp calls the way in which a tokenizer cuts text before merging (tokenizer.ggml.pre).

It is found by what a pre-tokenizer does, since the same one can be written in many ways: on some thousand texts it must
cut as one does that llama.cpp knows (src/llama-vocab.cpp there has their patterns).
"""

from collections.abc import Iterator
from itertools import product

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from lmoe.errors import BackboneError

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("a", "'", "'s", "'RE", "e\u0301", "中", "1", "22", "²", " ", "  ", "\t", "\n", "\r\n", ".", "/", "😀")
"""A text of every kind that patterns tell apart; three of them after one another are tried in every order."""
MORE = ("B", "ll", "'Ve", "é", "ǅ", "ة", "333", "4444", "٣", "Ⅷ", " " * 7, "\u00a0", "\u2028", "!!", "_", "-", "\u200d")
"""Others, before and behind each of those and of one another."""
LONG = (" " * 600 + "x", "1" * 40, "x" * 400, "\n" * 40, "a_b/c-d.e!f?" * 20, "don't I'LL we've 'Tis o'clock", "A1b2C3")


def _split(pattern: str) -> PreTokenizer:
    cut = Split(Regex(pattern), behavior="isolated")
    return Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])


def known_cuts() -> dict[tuple[str, bool], PreTokenizer]:
    """What cuts alike, by tokenizer.ggml.pre and by whether llama.cpp then takes a whole word that is a token without
    merging (`ignore_merges`)."""
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    llama3 = _split(rf"{WORDS}|\p{{N}}{{1,3}}|{REST}")
    return {
        ("qwen2", False): _split(rf"{WORDS}|\p{{N}}|{REST}"),
        ("gpt-2", False): gpt2,
        ("smollm", False): Sequence([Digits(individual_digits=True), gpt2]),
        ("llama-bpe", True): llama3,
        ("smaug-bpe", False): llama3,
    }


def pre_tokenizer_name(found: PreTokenizer | None, *, ignore_merges: bool, where: object) -> str:
    """tokenizer.ggml.pre of a pre-tokenizer.

    Args:
        found: of the tokenizer.
        ignore_merges: of its BPE.
        where: the tokenizer is, for messages.

    Raises:
        BackboneError: none that llama.cpp knows cuts like it.
    """
    for (name, whole_words), known in known_cuts().items():
        if found is not None and whole_words == ignore_merges and _agree(found, known):
            return name
    names = ", ".join(f"{name} (ignore_merges={str(whole).lower()})" for name, whole in known_cuts())
    raise BackboneError(
        f"{where}: the tokenizer (ignore_merges={str(ignore_merges).lower()}) cuts text before merging as none of "
        f"{names} does, so llama.cpp would make other tokens of the same text; it is not written"
    )


def _agree(one: PreTokenizer, other: PreTokenizer) -> bool:
    return all(_pieces(one, text) == _pieces(other, text) for text in _texts())


def _pieces(cut: PreTokenizer, text: str) -> list[str]:
    return [piece for piece, _ in cut.pre_tokenize_str(text)]


def _texts() -> Iterator[str]:
    yield from LONG
    for parts in (*product(KINDS, repeat=3), *product((*KINDS, *MORE), repeat=2)):
        yield "".join(parts)
