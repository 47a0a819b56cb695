"""What moe.backend=auto takes follows from a table, from the card's capability and from the type."""

import json
from dataclasses import replace

import pytest
import torch

from lmoe.ops import card_rules
from lmoe.ops.card_rules import (
    RULES_FILE,
    CardRule,
    choose_rule,
    grouped_is_faster,
    has_grouped_kernel,
    read_rules,
    write_rules,
)

A100 = {"card": "NVIDIA A100-SXM4-80GB", "device": "cuda", "capability": (8, 0)}
H100 = {"card": "NVIDIA H100 80GB HBM3", "device": "cuda", "capability": (9, 0)}
UNKNOWN = {"card": "NVIDIA X", "device": "cuda"}
EXAMPLE = CardRule(
    card="NVIDIA X",
    device="cuda",
    capability=(9, 0),
    dtype="bfloat16",
    break_even={1: None, 2: (600, 1.5), 4: (1400, 0)},
    measured=True,
    how="make gpu",
)


def cards(monkeypatch, *, name: str, capability: tuple[int, int], hip: str | None = None) -> torch.device:
    """Let torch see one card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(card_rules, "_rule_here", card_rules._rule_here.__wrapped__)
    return torch.device("cuda", 0)


def test_the_table_names_card_capability_type_and_how_each_rule_came_about():
    found = json.loads(RULES_FILE.read_text())["rules"]
    assert len(found) == len(read_rules()) >= 5
    for rule in found:
        assert list(rule) == ["card", "device", "capability", "dtype", "break_even", "measured", "how"]
        assert rule["how"].startswith("make ") if rule["measured"] else rule["how"].startswith("on paper: ")
        assert hasattr(torch, rule["dtype"])


def test_only_rules_that_were_measured_say_so():
    """Of cards nothing has been measured yet: a rule that says otherwise was written by `make gpu`."""
    for rule in read_rules():
        assert rule.measured == (rule.device == "cpu" or "make gpu" in rule.how)


@pytest.mark.parametrize(("dtype", "a", "b"), [(torch.float32, 32, 4), (torch.bfloat16, 256, 2)])
def test_on_a_cpu_grouped_is_taken_from_k_times_a_plus_b_r_on(dtype, a, b):
    cases = [(k, experts, rank) for k in (1, 2, 3, 4, 8) for experts in (4, 8, 16, 32, 64, 128) for rank in (4, 8, 48)]
    answers = set()
    for k, experts, rank in cases:
        ours = grouped_is_faster(num_experts=experts, rank=rank, top_k=k, device=torch.device("cpu"), dtype=dtype)
        assert ours == (experts * rank >= k * (a + b * rank))
        answers.add(ours)
    assert answers == {True, False}


def test_types_and_devices_without_a_rule_are_stacked():
    for device, dtype in (("cpu", torch.float16), ("meta", torch.float32)):
        found = grouped_is_faster(num_experts=512, rank=64, top_k=1, device=torch.device(device), dtype=dtype)
        assert found is False


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_where_torch_has_no_kernel_nothing_that_auto_takes_waits_for_the_device(monkeypatch, capability, dtype):
    """Neither torch's loop, nor, until they are measured, tiles in place of stacking."""
    device = cards(monkeypatch, name="NVIDIA X", capability=capability)
    assert not has_grouped_kernel(device, dtype)
    assert not grouped_is_faster(num_experts=512, rank=64, top_k=1, device=device, dtype=dtype)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_hopper_and_blackwell_of_data_centres_have_the_kernel_in_bfloat16_alone(monkeypatch, capability):
    device = cards(monkeypatch, name="NVIDIA X", capability=capability)
    assert has_grouped_kernel(device, torch.bfloat16)
    assert not has_grouped_kernel(device, torch.float16) and not has_grouped_kernel(device, torch.float32)
    given = {"rank": 16, "top_k": 2, "device": device, "dtype": torch.bfloat16}
    assert [grouped_is_faster(num_experts=e, **given) for e in (8, 36, 64, 128)] == [False, False, True, True]


def test_a_capability_of_rocm_is_no_capability_of_cuda(monkeypatch):
    device = cards(monkeypatch, name="AMD Instinct MI300X", capability=(9, 4), hip="6.4")
    assert not has_grouped_kernel(device, torch.bfloat16)
    assert not grouped_is_faster(num_experts=512, rank=64, top_k=1, device=device, dtype=torch.bfloat16)


def test_without_a_card_a_cuda_device_is_stacked():
    """Such as a tensor that only claims to be on one."""
    assert not torch.cuda.is_available()
    device = torch.device("cuda")
    assert not has_grouped_kernel(device, torch.bfloat16)
    assert not grouped_is_faster(num_experts=512, rank=64, top_k=1, device=device, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("card", "named", "why"),
    [
        (H100, "NVIDIA H100 80GB HBM3", "the rule of NVIDIA H100 80GB HBM3"),
        (UNKNOWN | {"capability": (9, 0)}, "NVIDIA H100 80GB HBM3", "of the same capability"),
        (UNKNOWN | {"capability": (10, 3)}, "NVIDIA H100 80GB HBM3", "the nearest capability; this card has none"),
        (A100, "NVIDIA A100-SXM4-80GB", "the rule of NVIDIA A100-SXM4-80GB"),
        (UNKNOWN | {"capability": (8, 6)}, "NVIDIA L40S", "the nearest capability"),
        (UNKNOWN | {"capability": (12, 0)}, "NVIDIA L40S", "the nearest capability"),
        (UNKNOWN | {"capability": None}, "NVIDIA A100-SXM4-80GB", "the nearest capability"),
    ],
)
def test_an_unknown_card_takes_the_nearest_rule_and_says_so(card, named, why):
    """A card without the kernel never takes the rule of one that has it, however near the number is."""
    found = choose_rule(read_rules(), **card, dtype=torch.bfloat16)
    assert found is not None and found.rule.card == named and why in str(found)
    assert "on paper" in str(found)


def test_a_rule_of_the_card_goes_before_one_of_its_capability():
    own = replace(EXAMPLE, card="NVIDIA H200")
    found = choose_rule([*read_rules(), own], **(H100 | {"card": "NVIDIA H200"}), dtype=torch.bfloat16)
    assert found is not None and found.rule is own and "measured" in str(found)


def test_between_measured_k_the_nearest_counts_in_proportion():
    assert EXAMPLE.grouped_from(rank=10, top_k=2) == 615
    assert EXAMPLE.grouped_from(rank=10, top_k=3) == 615 * 1.5
    assert EXAMPLE.grouped_from(rank=10, top_k=8) == 2800
    assert EXAMPLE.grouped_from(rank=10, top_k=1) is None
    assert replace(EXAMPLE, break_even=None).grouped_from(rank=10, top_k=2) is None


def test_a_table_reads_back_as_it_was_written_and_a_new_rule_takes_the_place_of_the_old(tmp_path):
    file = tmp_path / "rules.json"
    write_rules([*read_rules(), EXAMPLE], file)
    assert read_rules(file) == (*read_rules(), EXAMPLE)
    anew = replace(EXAMPLE, break_even=None, how="make gpu, later")
    write_rules([*read_rules(file), anew], file)
    assert read_rules(file) == (*read_rules(), anew)
    write_rules(read_rules(), file)
    assert file.read_text() == RULES_FILE.read_text()
