"""A number that is drawn for a prompt by its tokens alone: the same in every batch, process and machine.

Shapes: B sequences of T tokens, P rows packed into one sequence.
"""

import torch
from torch import Tensor

BITS = 64


def _signed(constant: int) -> int:
    """The int64 with these 64 bits."""
    return constant - 2**BITS if constant >= 2 ** (BITS - 1) else constant


STEP = _signed(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: the steps of SplitMix64."""
FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
SHIFTS = 30, 27, 31


def prompt_hashes(input_ids: Tensor, prompt: Tensor) -> Tensor:
    """h = mix(sum_i mix(t_i + i * STEP)) over the tokens t_1, t_2, … of each prompt, modulo 2^64.

    mix is the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"). What
    is not of the prompt has no part in it, nor in the places i: neither padding nor other rows of the sequence. All is
    arithmetic of int64, which wraps, so nothing is rounded and nothing is read back to the host.

    Args:
        input_ids: (B, T) whole numbers.
        prompt: (B, P, T) bool: the prompt tokens of each row.

    Returns:
        (B, P) int64, of any sign; 0 for a row without a prompt.
    """
    places = prompt.cumsum(-1)
    each = _mix(input_ids.long().unsqueeze(1) + places * STEP)
    return _mix(each.masked_fill(~prompt, 0).sum(-1))


def _mix(values: Tensor) -> Tensor:
    """The values with their bits mixed: each bit of one changes about half the bits of what it becomes."""
    first, second, third = SHIFTS
    values = (values ^ _shifted(values, first)) * FACTORS[0]
    values = (values ^ _shifted(values, second)) * FACTORS[1]
    return values ^ _shifted(values, third)


def _shifted(values: Tensor, by: int) -> Tensor:
    """The 64 bits shifted to the right, with zeros in front; torch puts copies of the sign there."""
    return torch.bitwise_right_shift(values, by) & (2 ** (BITS - by) - 1)
