"""Hold the first rows of tensors while an optimizer works on the whole.

Shapes: N rows, K kept ones.
"""

from collections.abc import Mapping

from torch import Tensor


def first_rows(tensors: Mapping[str, Tensor], rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Copies of the K first rows of each (N, ...) tensor, by name; of a () tensor, itself."""
    return {name: _kept(tensors[name], count).detach().clone() for name, count in rows.items()}


def put_back(tensors: Mapping[str, Tensor], originals: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
    """Write the kept rows back bit by bit: AdamW decays a row whose gradient is zero (1711.05101, algorithm 2)."""
    for name, original in originals.items():
        _kept(tensors[name].detach(), rows[name]).copy_(original)


def drop_gradients(gradients: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
    """Zero the gradient of the kept rows, in place: neither moments nor the norm that clipping sees know of them."""
    for name, gradient in gradients.items():
        _kept(gradient, rows.get(name, 0)).zero_()


def _kept(tensor: Tensor, rows: int) -> Tensor:
    return tensor[:rows] if tensor.ndim else tensor
