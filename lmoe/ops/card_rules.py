"""Which cards compute experts faster sorted by expert: a table of rules, kept as data in card_rules.json.

The seventh part of `make gpu` measures the rules of a card, and writes them there where it is asked to.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

RULES_FILE = Path(__file__).with_name("card_rules.json")


@dataclass(slots=True, frozen=True, kw_only=True)
class CardRule:
    """From which E * R on `grouped` is faster than `stacked` on one card, in one type.

    Args:
        card: its name, as torch says it.
        device: type of the device.
        capability: compute capability; None: it has none.
        dtype: type of the branch, by its name in torch.
        break_even: by k, (a, b): grouped is faster from E * R = a + b * R on; a k without a pair never is. None: it
            never is, or nobody has looked.
        measured: whether somebody has; else the numbers are on paper.
        how: the command, the day and the machine, or the argument.
    """

    card: str
    device: str
    capability: tuple[int, int] | None
    dtype: str
    break_even: Mapping[int, tuple[float, float] | None] | None
    measured: bool
    how: str

    def grouped_from(self, rank: int, top_k: int) -> float | None:
        """E * R from which grouped is faster; in proportion to k, from the nearest k of the rule. None: never."""
        if not self.break_even:
            return None
        nearest = min(self.break_even, key=lambda k: (abs(k - top_k), k))
        pair = self.break_even[nearest]
        return None if pair is None else top_k / nearest * (pair[0] + pair[1] * rank)


@dataclass(slots=True, frozen=True, kw_only=True)
class ChosenRule:
    """The rule that a card is given.

    Args:
        rule: of the table.
        why: this rule, in words.
    """

    rule: CardRule
    why: str

    def __str__(self) -> str:
        start = None if self.rule.break_even is None else self.rule.grouped_from(0, 2)
        slope = 0.0 if start is None else (self.rule.grouped_from(1, 2) or 0.0) - start
        if start is None:
            what = "stacked"
        else:
            what = f"grouped from E * r = {start:g}{f' + {slope:g} r' if slope else ''} at top_k=2"
        return f"{self.rule.dtype}: {what} ({'measured' if self.rule.measured else 'on paper'}; {self.why})"


def read_rules(file: Path = RULES_FILE) -> tuple[CardRule, ...]:
    """The rules of a table, in its order."""
    return tuple(_rule(found) for found in json.loads(file.read_text(encoding="utf-8"))["rules"])


def write_rules(rules: Sequence[CardRule], file: Path = RULES_FILE) -> None:
    """Write a table; of one card, device and type the last rule stays, at the place of the first."""
    kept = {(rule.card, rule.device, rule.dtype): rule for rule in rules}
    listed = ",\n".join(f"  {_as_json(rule)}" for rule in kept.values())
    file.write_text(f'{{\n "rules": [\n{listed}\n ]\n}}\n', encoding="utf-8")


def _rule(found: Mapping[str, Any]) -> CardRule:
    pairs, capability = found["break_even"], found["capability"]
    by_k = pairs and {int(k): None if pair is None else (pair[0], pair[1]) for k, pair in pairs.items()}
    return CardRule(
        card=found["card"],
        device=found["device"],
        capability=capability and (capability[0], capability[1]),
        dtype=found["dtype"],
        break_even=by_k,
        measured=found["measured"],
        how=found["how"],
    )


def _as_json(rule: CardRule) -> str:
    fields = ("card", "device", "capability", "dtype", "break_even", "measured", "how")
    lines = [f'   "{name}": {json.dumps(getattr(rule, name), ensure_ascii=False)}' for name in fields]
    return "{\n" + ",\n".join(lines) + "\n  }"


def choose_rule(
    rules: Sequence[CardRule], *, card: str, device: str, capability: tuple[int, int] | None, dtype: torch.dtype
) -> ChosenRule | None:
    """The rule of a card in a type: its own, else one of its capability, else the nearest capability whose grouped
    matmul is computed in the same way; None: there is none for this device and type.

    Args:
        rules: the table.
        card: name of the device.
        device: its type.
        capability: compute capability, where it has one.
        dtype: type of the branch.
    """
    there = [rule for rule in rules if rule.device == device and rule.dtype == str(dtype).removeprefix("torch.")]
    if own := next((rule for rule in there if rule.card == card), None):
        return ChosenRule(rule=own, why=f"the rule of {own.card}")
    alike = [rule for rule in there if _kernel(rule.capability, dtype) == _kernel(capability, dtype)]
    if not alike:
        return None
    nearest = min(alike, key=lambda rule: _apart(rule.capability, capability))
    if nearest.capability == capability:
        return ChosenRule(rule=nearest, why=f"the rule of {nearest.card}, of the same capability")
    return ChosenRule(rule=nearest, why=f"the rule of {nearest.card}, the nearest capability; this card has none")


def _apart(first: tuple[int, int] | None, second: tuple[int, int] | None) -> int:
    numbers = [10 * major + minor for major, minor in (first or (0, 0), second or (0, 0))]
    return abs(numbers[0] - numbers[1])


def _kernel(capability: tuple[int, int] | None, dtype: torch.dtype) -> bool:
    """Whether torch (2.10 to 2.13) has a kernel for grouped matmuls on CUDA cards of this capability."""
    return capability is not None and capability[0] in (9, 10) and dtype is torch.bfloat16


@torch.compiler.assume_constant_result
def has_grouped_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped_mm may compute here: it is a kernel, or a loop that nothing waits for.

    On other accelerators it is a loop over experts that first reads how many rows each has, for which the host waits
    for the device.
    """
    if device.type == "cpu":
        return True
    return device.type == "cuda" and _kernel(_capability(device), dtype)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """None also where torch has been built without the kernel: for ROCm, whose capabilities are others, and Windows."""
    if not torch.cuda.is_available() or torch.version.hip is not None or sys.platform == "win32":
        return None
    return torch.cuda.get_device_capability(device)


@cache
def _rule_here(device: torch.device, dtype: torch.dtype) -> ChosenRule | None:
    """The rule of a device that is here."""
    cuda = device.type == "cuda" and torch.cuda.is_available()
    return choose_rule(
        read_rules(),
        card=torch.cuda.get_device_name(device) if cuda else device.type.upper(),
        device=device.type,
        capability=_capability(device) if cuda else None,
        dtype=dtype,
    )


def grouped_is_faster(*, num_experts: int, rank: int, top_k: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `grouped` beats `stacked`, which computes all experts for every token, by the rule of the device.

    Args:
        num_experts, rank, top_k: E, R, K.
        device: where the branch is computed.
        dtype: type of the branch.
    """
    found = _rule_here(device, dtype)
    start = None if found is None else found.rule.grouped_from(rank, top_k)
    return start is not None and num_experts * rank >= start
