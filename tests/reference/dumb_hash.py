"""The hash of a prompt in Python's own whole numbers, token by token."""

from collections.abc import Sequence

WORD = 2**64


def mix(value: int) -> int:
    """The finaliser of SplitMix64, as it is printed, on numbers without a sign."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


def prompt_hash(tokens: Sequence[int]) -> int:
    """Of the tokens of one prompt, from -2^63 to 2^63 - 1."""
    total = 0
    for place, token in enumerate(tokens, start=1):
        total = (total + mix((token + place * 0x9E3779B97F4A7C15) % WORD)) % WORD
    hashed = mix(total)
    return hashed - WORD if hashed >= WORD // 2 else hashed
