"""Sites are stacked with those of their own shape alone, and no more of them than are worth it."""

import pytest
import torch

from lmoe.ops.site_groups import sites_of_one_shape, sites_together, stacked


def test_sites_of_equal_shape_share_a_group_and_groups_and_sites_keep_their_order():
    shapes = {"a": (2, 3, 4), "b": (2, 3, 2), "c": (2, 3, 4), "d": (6, 4), "e": (2, 3, 2)}
    groups = sites_of_one_shape({site: torch.empty(shape) for site, shape in shapes.items()})
    assert groups == [["a", "c"], ["b", "e"], ["d"]]
    assert sites_of_one_shape({}) == []


@pytest.mark.parametrize(
    ("device", "groups"), [("cpu", [["a", "c"], ["d"], ["b"]]), ("meta", [["a", "c", "d"], ["b"]])]
)
def test_a_cpu_takes_fewer_sites_together_and_always_one(device: str, groups: list[list[str]], monkeypatch) -> None:
    monkeypatch.setattr("lmoe.ops.site_groups.ELEMENTS_ON_CPU", 50)
    monkeypatch.setattr("lmoe.ops.site_groups.ELEMENTS_AT_ONCE", 72)
    shapes = {"a": (2, 3, 4), "b": (20, 3, 2), "c": (2, 3, 4), "d": (2, 3, 4)}
    assert list(sites_together({site: torch.empty(shape, device=device) for site, shape in shapes.items()})) == groups


def test_one_tensor_alone_is_stacked_without_a_copy():
    one, other = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(stacked([one, other]), torch.stack([one, other]))
    assert stacked([one]).shape == (1, 2, 3) and stacked([one]).data_ptr() == one.data_ptr()
