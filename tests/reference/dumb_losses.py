"""Losses of labels from the logits of all tokens, one token after the other, so that nobody can doubt them."""

import torch
from torch import Tensor, nn


def label_losses(model: nn.Module, input_ids: Tensor, labels_BL: Tensor) -> Tensor:
    """(B, L): -log p of what follows each token, and 0 where the label is -100."""
    logits_BTV = model(input_ids=input_ids, use_cache=False).logits
    rows = []
    for b in range(labels_BL.shape[0]):
        for t in range(labels_BL.shape[1]):
            label = int(labels_BL[b, t])
            p_V = torch.log_softmax(logits_BTV[b, t].float(), dim=0)
            rows.append(p_V[0] * 0 if label == -100 else -p_V[label])
    return torch.stack(rows).view(labels_BL.shape)


def linear_label_losses(
    h_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, scale: float, soft_cap: float | None
) -> Tensor:
    """(N,): logsumexp_v z_v - z_label with z = c tanh(s (W h + b) / c), token by token, in float32 or float64."""
    losses = []
    for h, label in zip(h_ND, labels_N.tolist(), strict=True):
        y = weight_VD @ h if bias_V is None else weight_VD @ h + bias_V
        z = scale * y if soft_cap is None else soft_cap * torch.tanh(scale * y / soft_cap)
        losses.append(torch.logsumexp(z, dim=0) - z[label])
    return torch.stack(losses)
