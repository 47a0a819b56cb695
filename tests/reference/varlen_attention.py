"""Flash attention's interface on a CPU: each row alone, by softmax written out. Stands in for flash-attn in tests."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import flash_attention


@dataclass
class RowByRow:
    """Computes attention as flash-attn's functions do, and keeps the bounds of rows that it was told.

    Args:
        told: of each call, None where it was told of none.
    """

    told: list[list[int] | None] = field(default_factory=list)

    def install(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let Transformers find these functions, and a model use them, which may compute in float32 then."""
        functions = (self.whole, self.of_rows, None, None, None), (_arguments, None)
        monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
        monkeypatch.setattr(flash_attention, "get_target_dtype", lambda *_: None)
        assert model._supports_flash_attn
        configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        for config in configs.values():
            config._attn_implementation = "flash_attention_2"

    def whole(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """(B, T, H, D) of sequences of one row each, (B, T, H or fewer, D)."""
        self.told.append(None)
        rows = [_attention(*row, **options) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def of_rows(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any):
        """(N, H, D) of rows one behind the other."""
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        bounds = cu_seqlens_q.tolist()
        assert bounds[0] == 0 and bounds[-1] == len(q)
        self.told.append(bounds)
        assert all(end - start <= options["longest"] for start, end in pairwise(bounds))
        pieces = pairwise(bounds)
        return torch.cat([_attention(q[a:b], k[a:b], v[a:b], **options) for a, b in pieces])


def _arguments(
    *,
    query_length: int,
    key_length: int,
    is_causal: bool,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    max_seqlen_q: int = 0,
    **_: Any,
) -> dict[str, Any]:
    assert is_causal
    window = sliding_window if sliding_window is not None and key_length > sliding_window else None
    return {"scale": softmax_scale, "window": window, "softcap": softcap, "longest": max_seqlen_q}


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, window: int | None, softcap: float | None, longest: int
) -> Tensor:
    """(T, H, D) of one row; k and v may have fewer heads."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
