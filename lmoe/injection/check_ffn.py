"""Does a feed-forward block compute what its parts suggest?"""

import torch
from torch import Tensor, nn

from lmoe.errors import InjectionError
from lmoe.ops.ffn_names import FfnNames
from lmoe.ops.linear_sizes import sizes

TOLERANCE = 0.02
"""Of the largest output; what the rounding of bfloat16 may make of four tokens."""


@torch.no_grad()
def check_ffn(block: nn.Module, names: FfnNames, path: str) -> None:
    """Try a block on four random tokens beside its parts put together; one on the meta device is believed.

    Raises:
        InjectionError: it computes something else, as a block of a family that nobody has described may.
    """
    if any(parameter.is_meta for parameter in block.parameters()):
        return
    weight = next(block.parameters())
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), torch.float32)
    width, _ = sizes(block.get_submodule(names.up))
    x = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    training = block.training
    block.eval()
    try:
        expected = block(x)
    except TypeError:  # it reads more than the hidden states
        expected = torch.full_like(x, torch.nan)
    finally:
        block.train(training)
    put_together = from_parts(block, names, x)
    if not (expected - put_together).abs().max() <= TOLERANCE * expected.abs().max():  # which nan is not either
        raise InjectionError(
            f"{path} ({type(block).__name__}) computes something else than {names.formula()}; use "
            "injection=mixture_lora, or describe the family in lmoe/backbones/families"
        )


def from_parts(block: nn.Module, names: FfnNames, x: Tensor) -> Tensor:
    """The formula of `names` with the parts of a block; (..., D) to (..., D)."""
    activation, up = block.get_submodule(names.activation), block.get_submodule(names.up)(x)
    if names.gate is not None:
        inner = activation(block.get_submodule(names.gate)(x)) * up
    elif names.fused:
        gate, up = up.chunk(2, dim=-1)
        inner = activation(gate) * up
    else:
        inner = activation(up)
    return block.get_submodule(names.down)(inner)
