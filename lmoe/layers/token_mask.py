"""Which tokens of a forward are no padding, from whatever the backbone is told of it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lmoe.errors import RoutingError


def valid_tokens(mask: object, given: Tensor) -> Tensor:
    """Whether each token is valid, (B, T) bool.

    `generate` makes a mask of queries and keys where a cache has a fixed size, and one for each kind of layer where
    there are several kinds. In each of them a token may look at itself, and padding may not.

    Args:
        mask: attention_mask as the model gets it: None, (B, T), (B or 1, heads or 1, T, keys) of bool or of what is
            added to the scores, or a dict of such.
        given: (B, T) input_ids, or inputs_embeds (B, T, D), of a forward that begins with an empty cache.

    Raises:
        RoutingError: a mask of another kind.
    """
    rows, length = given.shape[:2]
    if isinstance(mask, Mapping):
        mask = next((value for value in mask.values() if value is not None), None)
    if mask is None:
        return torch.ones(rows, length, dtype=torch.bool, device=given.device)
    if isinstance(mask, Tensor) and mask.shape == (rows, length):
        return mask.bool()
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == length <= mask.shape[3]:
        itself = mask[:, 0, :, :length].diagonal(dim1=1, dim2=2)
        return (itself if itself.dtype == torch.bool else itself == 0).expand(rows, length)
    found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise RoutingError(
        f"attention_mask {found} does not say which of {rows} x {length} tokens are padding; give one of (rows, tokens)"
    )
