"""Which attention spares packed rows a mask of all tokens, where it can be had."""

import pytest
import torch

from lmoe.backbones.attention import FLASH, FLEX, attention_for_packed_rows, attention_of, takes_row_bounds
from lmoe.objectives.sft import SupervisedFineTuning
from lmoe.run import announce
from tests.injection.model_scope import Rows
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("attention", "device", "flash", "flex", "expected"),
    [
        ("sdpa", "cuda", True, True, FLASH),
        ("eager", "cuda", True, False, FLASH),
        ("sdpa", "cuda", False, True, FLEX),
        ("sdpa", "cuda", False, False, None),
        ("sdpa", "cpu", True, True, None),
        (FLASH, "cuda", True, True, None),
        (FLEX, "cuda", True, True, None),
        ("their/kernel", "cuda", True, True, None),
    ],
)
def test_flash_comes_before_flex_and_both_on_a_gpu_only(attention, device, flash, flex, expected):
    assert attention_for_packed_rows(attention, device, flash=flash, flex=flex) == expected


def test_flash_attention_of_any_kind_is_told_of_rows():
    assert all(takes_row_bounds(name) for name in (FLASH, "flash_attention_3", "kernels-community/flash-attn2"))
    assert not any(takes_row_bounds(name) for name in ("sdpa", "eager", FLEX))


def test_the_start_of_a_packed_run_says_which_attention_needs_no_mask(micro, monkeypatch):
    parts = micro.parts("data.packing=true", "trainer.precision=bf16-mixed")
    assert attention_of(parts.model) == "sdpa"
    assert len(announce.packing_lines(parts)) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parts.config.trainer.accelerator = "auto"
    assert announce.packing_lines(parts)[1].endswith("backbone.attn_implementation=flex_attention needs none")
    monkeypatch.setattr(announce, "is_flash_attn_2_available", lambda: True)
    assert announce.packing_lines(parts)[1].endswith("backbone.attn_implementation=flash_attention_2 needs none")
    parts.config.trainer.precision = "32-true"
    assert announce.packing_lines(parts)[1].endswith("backbone.attn_implementation=flex_attention needs none")
    assert len(announce.packing_lines(micro.parts("data.packing=false"))) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [FLASH, FLEX])
def test_packed_rows_have_the_losses_of_the_dense_mask_on_a_gpu(attention):
    if attention == FLASH:
        pytest.importorskip("flash_attn")
    model = tiny_model(hidden_size=64, head_dim=64).to("cuda", torch.bfloat16)
    batch = Rows.of("ppppaaa", "ppaaaaaaaaaa", "pppaaaaa").batch(packed=[2, 1])
    batch = {name: values.to("cuda") for name, values in batch.items()}
    found = []
    for name in ("sdpa", attention):
        model.set_attn_implementation(name)
        model.zero_grad()
        losses = SupervisedFineTuning().losses(model, batch).values
        losses.sum().backward()
        found.append((losses.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))
