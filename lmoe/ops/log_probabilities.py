"""-log p(label) from hidden states and the weight of an output layer; the logits of all tokens never exist at once.

Shapes: N tokens with a label, D hidden, V vocabulary, C columns of a tile of the vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lmoe.ops.labels import IGNORE

LOGITS_AT_ONCE = 2**24
"""Logits that exist at the same time: 64 MB in float32. On two idle cores 8 MB are a tenth faster; on busy ones not."""


@dataclass(slots=True, frozen=True, kw_only=True)
class LogitMap:
    """What a model makes of the output y of its output layer: z = c tanh(s y / c), or z = s y without a cap.

    Args:
        scale: s.
        soft_cap: c, above 0; None: no cap (Gemma 2, 2408.00118, section 2).
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, y: Tensor) -> Tensor:
        """z, in the type of y, as the code of the models computes it."""
        z = y if self.scale == 1.0 else y * self.scale
        return z if self.soft_cap is None else torch.tanh(z / self.soft_cap) * self.soft_cap

    def in_place(self, y: Tensor) -> Tensor:
        """The same, written over y."""
        if self.scale != 1.0:
            y.mul_(self.scale)
        if self.soft_cap is not None:
            y.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return y

    def slope(self, z: Tensor) -> Tensor:
        """dz/dy, a new tensor."""
        if self.soft_cap is None:
            return torch.full_like(z, self.scale)
        return (z / self.soft_cap).square_().neg_().add_(1.0).mul_(self.scale)


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, 0 where the label is -100; float32 whatever the logits are.

    Args:
        logits_BTV: (B, T, V), aligned with the labels (already shifted).
        labels_BT: (B, T).

    Returns:
        (B, T) float32.
    """
    flat = cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="none")
    return flat.view_as(labels_BT)


def linear_label_losses(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, logit_map: LogitMap | None = None
) -> Tensor:
    """-log p(label) of each token: logsumexp_v z_v - z_label, with z = logit_map(h W^T + b).

    What `cross_entropy(logit_map(linear(h, W, b)).float(), labels, reduction="none")` returns, with its gradients of
    h, W and b. The vocabulary goes by in tiles of C columns, and a running maximum and sum give the logsumexp
    (Milakov and Gimelshein, 1805.02867), so no more than LOGITS_AT_ONCE logits exist, in forward and backward.

    With a frozen output layer the gradient of h is made in the forward, in the same pass: that of token n is
    (sum_v p_v W_v - W_label) times dz/dy, and depends on no other token. With W or b trained the forward keeps
    maximum and sum alone, and the backward computes each tile of logits again; a row of W gets its gradient in one
    matmul over all tokens, so nothing is added up in a type of low precision. The idea is that of cut cross-entropy
    (2411.09009), which drops small gradients; here all of them count.

    Under autocast the matmuls run in its type, else in that of W. There is no second derivative.

    Args:
        h_ND: (N, D); N may be 0.
        weight_VD: (V, D).
        bias_V: (V,) or None.
        labels_N: (N,) int64 from 0 to V - 1.
        logit_map: None: z = y.

    Returns:
        (N,) nats in float32, or float64 for float64 weights.

    Raises:
        IndexError: on a CPU, a label outside the vocabulary; a GPU fails on its side.
    """
    device, dtype = h_ND.device.type, weight_VD.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return _LinearLabelLosses.apply(  # type: ignore[return-value]
        h_ND, weight_VD, bias_V, labels_N, logit_map or LogitMap(), dtype, torch.is_grad_enabled()
    )


def chunked_label_losses(
    logits_of: Callable[[Tensor], Tensor], h_ND: Tensor, labels_N: Tensor, vocabulary: int
) -> Tensor:
    """-log p(label) of each token, from logits that any code makes: chunks of tokens, each run again in the backward.

    Slower than `linear_label_losses`, for output layers that are more than a matrix: quantised, adapted, hooked.

    Args:
        logits_of: (1, n, D) to (1, n, V).
        h_ND: (N, D); N may be 0.
        labels_N: (N,) int64.
        vocabulary: V, or about it: the size of a chunk follows from it.

    Returns:
        (N,) nats in float32, or float64 for float64 logits, on the device of h.
    """

    def losses(h_nD: Tensor, labels_n: Tensor) -> Tensor:
        logits_nV = logits_of(h_nD.unsqueeze(0)).squeeze(0)
        wide = torch.promote_types(logits_nV.dtype, torch.float32)
        found = cross_entropy(logits_nV.to(wide), labels_n.to(logits_nV.device), reduction="none")
        return found.to(h_nD.device)

    rows = max(1, LOGITS_AT_ONCE // max(1, vocabulary))
    chunks = zip(h_ND.split(rows), labels_N.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([losses(h_nD, labels_n) for h_nD, labels_n in chunks])
    return torch.cat([checkpoint(losses, h_nD, labels_n, use_reentrant=False) for h_nD, labels_n in chunks])


class _Tiles:
    """The logits of N tokens, C columns of the vocabulary after the other, each time in the same memory.

    Args:
        h_ND: in the type of the matmuls.
        dtype: that type; W and b are converted tile by tile.
    """

    def __init__(
        self, h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, logit_map: LogitMap, dtype: torch.dtype
    ) -> None:
        self.h, self.weight, self.bias, self.map, self.dtype = h_ND, weight_VD, bias_V, logit_map, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        (tokens, hidden), vocabulary = h_ND.shape, weight_VD.shape[0]
        self.columns = min(vocabulary, max(1, LOGITS_AT_ONCE // max(tokens, hidden)))
        # NOTE a power of two: blocks of another size in each step would leave holes in the heap of a CPU.
        self._y = h_ND.new_empty(1 << max(0, tokens * self.columns - 1).bit_length())
        self._z = self._y if self.wide == dtype else self._y.to(self.wide)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Which columns, their rows of W (C, D), and z (N, C) in float32, to be written over."""
        for first in range(0, self.weight.shape[0], self.columns):
            here = slice(first, min(first + self.columns, self.weight.shape[0]))
            w_CD = self.weight[here].to(self.dtype)
            y_NC = self._tile(self._y, w_CD)
            if self.bias is None:
                torch.mm(self.h, w_CD.t(), out=y_NC)
            else:
                torch.addmm(self.bias[here].to(self.dtype), self.h, w_CD.t(), out=y_NC)
            self.map.in_place(y_NC)
            z_NC = y_NC if self._z is self._y else self._tile(self._z, w_CD).copy_(y_NC)
            yield here, w_CD, z_NC

    def narrow(self, values_NC: Tensor) -> Tensor:
        """A tile of float32 in the type of the matmuls, over what the matmul wrote."""
        if self._z is self._y:
            return values_NC
        return self._y[: values_NC.numel()].view_as(values_NC).copy_(values_NC)

    def _tile(self, memory: Tensor, w_CD: Tensor) -> Tensor:
        rows, columns = self.h.shape[0], w_CD.shape[0]
        return memory[: rows * columns].view(rows, columns)


def _place_of(labels_N: Tensor, here: slice) -> tuple[Tensor, Tensor]:
    """Column of each label in a tile (N, 1), 0 where it is not in it, and whether it is (N,)."""
    column = labels_N - here.start
    inside = (column >= 0) & (labels_N < here.stop)
    return torch.where(inside, column, 0).unsqueeze(1), inside


class _LinearLabelLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit_map: LogitMap,
        dtype: torch.dtype,
        grad_enabled: bool,
    ) -> Tensor:
        trained = grad_enabled and any(ctx.needs_input_grad[1:3])
        direct = grad_enabled and ctx.needs_input_grad[0] and not trained
        with torch.autocast(h.device.type, enabled=False):
            of_label_ND = weight.index_select(0, labels).to(dtype)  # where a label outside the vocabulary fails
            tiles = _Tiles(h.to(dtype), weight, bias, logit_map, dtype)
            max_N, sum_N, z_label_N, mean_ND = _reduced(tiles, labels, with_gradient=direct)
        ctx.logit_map, ctx.dtype, ctx.trained = logit_map, dtype, trained
        if trained:
            ctx.save_for_backward(h, weight, bias, labels, max_N, sum_N)
        elif mean_ND is not None:
            slope_N1 = logit_map.slope(z_label_N).unsqueeze(1)
            ctx.save_for_backward(mean_ND.sub_(of_label_ND * slope_N1).to(h.dtype))
        return sum_N.log() + (max_N - z_label_N)  # NOTE max + log first would round away what large logits differ by

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            (grad_ND,) = ctx.saved_tensors
            return (grad_ND * grad_N.unsqueeze(1)).to(grad_ND.dtype), *[None] * 6
        h, weight, bias, labels, max_N, sum_N = ctx.saved_tensors
        wants_h, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        logit_map: LogitMap = ctx.logit_map
        with torch.autocast(h.device.type, enabled=False):
            tiles = _Tiles(h.to(ctx.dtype), weight, bias, logit_map, ctx.dtype)
            grad_h = torch.zeros(h.shape, dtype=tiles.wide, device=h.device) if wants_h else None
            grad_weight = torch.empty_like(weight) if wants_weight else None
            grad_bias = torch.empty_like(bias) if wants_bias else None
            scaled_N = grad_N * (1.0 if logit_map.soft_cap is not None else logit_map.scale)
            for here, w_CD, z_NC in tiles:
                slope_NC = None if logit_map.soft_cap is None else logit_map.slope(z_NC)
                d_NC = z_NC.sub_(max_N.unsqueeze(1)).exp_().mul_((scaled_N / sum_N).unsqueeze(1))
                column_N1, inside_N = _place_of(labels, here)
                d_NC.scatter_add_(1, column_N1, torch.where(inside_N, -scaled_N, 0.0).unsqueeze(1))
                if slope_NC is not None:
                    d_NC.mul_(slope_NC)
                if grad_bias is not None:
                    grad_bias[here] = d_NC.sum(0)
                d_NC = tiles.narrow(d_NC)
                if grad_weight is not None:
                    grad_weight[here] = d_NC.t() @ tiles.h
                if grad_h is not None:
                    grad_h += d_NC @ w_CD
        return None if grad_h is None else grad_h.to(h.dtype), grad_weight, grad_bias, *[None] * 4


def _reduced(tiles: _Tiles, labels: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """m = max_v z_v, sum_v exp(z_v - m), z of the label, each (N,), and sum_v p_v dz_v/dy_v W_v (N, D) if wanted.

    m is a running maximum: where it grows, what was summed shrinks by exp(old m - new m).
    """
    (tokens, hidden), options = tiles.h.shape, {"dtype": tiles.wide, "device": tiles.h.device}
    lowest = torch.finfo(tiles.wide).min  # NOTE not -inf, for -inf - -inf is NaN
    max_N, sum_N = torch.full((tokens,), lowest, **options), torch.zeros(tokens, **options)
    z_label_N = torch.zeros(tokens, **options)
    mean_ND = torch.zeros(tokens, hidden, **options) if with_gradient else None
    for here, w_CD, z_NC in tiles:
        column_N1, inside_N = _place_of(labels, here)
        z_label_N = torch.where(inside_N, z_NC.gather(1, column_N1).squeeze(1), z_label_N)
        slope_NC = tiles.map.slope(z_NC) if with_gradient and tiles.map.soft_cap is not None else None
        new_N = torch.maximum(max_N, z_NC.amax(1))
        shrink_N, max_N = (max_N - new_N).exp_(), new_N
        e_NC = z_NC.sub_(new_N.unsqueeze(1)).exp_()
        sum_N.mul_(shrink_N).add_(e_NC.sum(1))
        if mean_ND is not None:
            e_NC = e_NC if slope_NC is None else e_NC.mul_(slope_NC)
            mean_ND.mul_(shrink_N.unsqueeze(1))
            if e_NC.dtype == w_CD.dtype:
                mean_ND.addmm_(e_NC, w_CD)
            else:
                mean_ND += tiles.narrow(e_NC) @ w_CD
    if mean_ND is not None:
        mean_ND.div_(sum_N.unsqueeze(1))
        if tiles.map.soft_cap is None:
            mean_ND.mul_(tiles.map.scale)
    return max_N, sum_N, z_label_N, mean_ND
