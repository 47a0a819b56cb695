"""Linears that read one and the same input."""

from torch import nn

from lmoe.backbones.layout import family_of, layouts

SIDE_BY_SIDE = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""In the order in which the backbones call them, inside one block."""


def siblings(model: nn.Module) -> list[tuple[str, ...]]:
    """Module paths of Linears that read the same input, in the order in which they are called.

    Names decide, in the blocks that the layout finds; whoever uses this still has to see that the inputs are the same.
    """
    family = family_of(model)
    names = SIDE_BY_SIDE
    if family is not None and family.ffn_names.gate is not None:
        names = (*names, (family.ffn_names.gate, family.ffn_names.up))
    found: dict[tuple[str, ...], None] = {}
    for layer in layouts(model):
        linears = layer.attention | layer.ffn | layer.shared | layer.other
        blocks = dict.fromkeys(path.rpartition(".")[0] for path in linears)
        for block in blocks:
            for group in names:
                here = tuple(path for name in group if (path := f"{block}.{name}") in linears)
                if len(here) > 1:
                    found[here] = None
    return list(found)
