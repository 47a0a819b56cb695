"""Sites are stacked with those of their own shape alone."""

import torch

from lmoe.ops.site_groups import sites_of_one_shape


def test_sites_of_equal_shape_share_a_group_and_groups_and_sites_keep_their_order():
    shapes = {"a": (2, 3, 4), "b": (2, 3, 2), "c": (2, 3, 4), "d": (6, 4), "e": (2, 3, 2)}
    groups = sites_of_one_shape({site: torch.empty(shape) for site, shape in shapes.items()})
    assert groups == [["a", "c"], ["b", "e"], ["d"]]
    assert sites_of_one_shape({}) == []
