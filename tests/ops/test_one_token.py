"""Products of one token take torch's own kernel, and leave its switch as it was."""

import pytest
import torch
from torch.nn.functional import linear

from lmoe.ops.one_token import directly, is_one_token


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.ones(1, 1, 64, dtype=torch.bfloat16), True),
        (torch.ones(1, 64, dtype=torch.bfloat16), True),
        (torch.ones(1, 2, 64, dtype=torch.bfloat16), False),
        (torch.ones(2, 1, 64, dtype=torch.bfloat16), False),
        (torch.ones(1, 1, 64), False),
        (torch.ones(1, 1, 64, dtype=torch.bfloat16, device="meta"), False),
    ],
)
def test_it_pays_for_one_token_in_bfloat16_on_a_cpu(x, expected):
    assert is_one_token(x) is expected


@pytest.mark.parametrize("shape", [(64, 1024), (384, 1024), (1024, 128)])
def test_the_product_is_that_of_float32_rounded_once(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, shape[1]).bfloat16(), torch.randn(shape).bfloat16()
    torch.testing.assert_close(directly(linear, x, weight), linear(x.float(), weight.float()).bfloat16())


def test_the_switch_is_off_inside_and_on_again_whatever_happens():
    seen = []

    def product(x):
        seen.append(torch._C._get_mkldnn_enabled())
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        directly(product, torch.ones(1))
    assert seen == [False] and torch._C._get_mkldnn_enabled()


def test_who_has_switched_it_off_finds_it_off():
    torch._C._set_mkldnn_enabled(False)
    try:
        directly(linear, torch.ones(1, 4), torch.ones(2, 4))
        assert not torch._C._get_mkldnn_enabled()
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_without_the_switch_the_product_is_as_usual(monkeypatch):
    monkeypatch.setattr("lmoe.ops.one_token._enable", None)
    assert directly(linear, torch.ones(1, 4), torch.ones(2, 4)).tolist() == [[4.0, 4.0]]
