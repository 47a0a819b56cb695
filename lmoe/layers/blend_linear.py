"""A Linear with many LoRA experts beside it whose weights can change at any time; for inference.

Shapes: N tokens, D in, O out, R ranks of all experts together, E experts, S sites that read one input.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lmoe.errors import BlendError
from lmoe.ops.arrow import arrow_weights
from lmoe.ops.rank_layout import Ranks, Run

BLEND = "lmoe_blend"
"""Attribute of a model whose Linears blend."""


@dataclass(slots=True, frozen=True, eq=False)
class Arrow:
    """Weights of each token at each site, in place of given ones; see ops/arrow.py.

    Args:
        directions: (S, E, D).
        present: (S, E) bool.
        top_k, temperature: of the softmax.
    """

    directions: Tensor
    present: Tensor
    top_k: int
    temperature: float


@dataclass(slots=True, frozen=True, eq=False)
class Live:
    """A run of experts that takes part.

    Args:
        run: where it lies.
        gates: weight times scaling of each rank, (R,) or (B, 1, R); with Arrow (R,) the scaling alone.
        order: as in the run, on the device.
        pair: (R,) site * E + expert of each rank, for Arrow.
    """

    run: Run
    gates: Tensor
    order: Tensor | None
    pair: Tensor | None = None


class BlendGroup(nn.Module):
    """The lora_A of all experts at the sites that read one input: one matmul for all of them.

    Args:
        lora_A: (R, D), see ops/rank_layout.py.
        ranks: of every expert at every site.
    """

    lora_A: Tensor

    def __init__(self, lora_A: Tensor, ranks: Ranks) -> None:
        super().__init__()
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.ranks, self.silent, self.arrow = ranks, False, None
        self.live: list[tuple[Tensor, Live]] = []
        self._shared: tuple[Tensor, list[list[Tensor]], int] | None = None

    def show(self, live: list[Live], arrow: Arrow | None = None) -> None:
        """Which runs take part from now on, with what gates."""
        self.live, self.arrow, self._shared = [(self.lora_A[part.run.rows], part) for part in live], arrow, None

    def parts(self, x: Tensor, place: int) -> list[Tensor]:
        """Gated h = x A^T of one site, (N, R) for each run that takes part.

        What the first site computes serves the others, in their order, as long as they get the very same tensor; it is
        let go with the last one. Sites that are called otherwise compute it anew.

        Args:
            x: (..., D).
            place: of the site in the group.

        Raises:
            BlendError: weights for another number of rows than x has.
        """
        sites = len(self.ranks.ranks[0])
        if self.silent or not self.live:
            return []
        if sites == 1:
            return [hidden for part in self._hidden(x) for hidden in part]
        shared = self._shared
        if shared is None or shared[0] is not x or shared[2] != place:
            computed = self._hidden(x)
        else:
            computed = shared[1]
        self._shared = None if place == sites - 1 else (x, computed, place + 1)
        return [part[place] for part in computed]

    def _hidden(self, x: Tensor) -> list[list[Tensor]]:
        """[run][site] (N, R)."""
        x = x if x.dtype == self.lora_A.dtype else x.to(self.lora_A.dtype)
        found = []
        shares = None
        if self.arrow is not None:
            arrow = self.arrow
            shares = arrow_weights(
                x, arrow.directions, arrow.present, top_k=arrow.top_k, temperature=arrow.temperature
            ).flatten(-2)
        for lora_A, live in self.live:
            hidden = linear(x, lora_A)
            if live.order is not None:
                hidden = hidden.index_select(-1, live.order)
            gates = live.gates
            if shares is not None:
                assert live.pair is not None
                gates = (shares.index_select(-1, live.pair) * gates).to(hidden.dtype)
            elif gates.dim() == 3:
                gates = _of_rows(gates, hidden)
            hidden = hidden.mul_(gates).flatten(0, -2)
            places = live.run.places
            found.append([hidden] if len(places) == 1 else [hidden[:, place] for place in places])
        return found

    def _apply(self, fn, recurse: bool = True) -> "BlendGroup":
        """What moves the model moves the views and gates too."""
        super()._apply(fn, recurse)
        live = [part for _, part in self.live]
        arrow = self.arrow
        if arrow is not None:
            arrow = replace(arrow, directions=fn(arrow.directions), present=fn(arrow.present))
        self.show([_moved(part, fn) for part in live], arrow)
        return self


class BlendLinear(nn.Module):
    """y = base_layer(x) + sum_e w_e s_e x A_e^T B_e^T, as ((x A^T) * w) B^T over all ranks at once.

    An expert with |w_e| below a threshold in all rows is not computed; where that holds for all, y is the base's.

    Args:
        base_layer: the Linear, a quantised one or a Conv1D.
        lora_B: (O, R) of all experts at this site.
        group: holds lora_A.
        place: of this site in the group.
    """

    lora_B: Tensor

    def __init__(self, base_layer: nn.Module, lora_B: Tensor, group: BlendGroup, place: int) -> None:
        super().__init__()
        self.base_layer, self.group, self.place = base_layer, group, place
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.fresh = type(base_layer) in (nn.Linear, Conv1D)  # what another layer returns may be kept by it
        self.live: list[Tensor] = []

    def show(self, live: list[Live]) -> None:
        """Which runs take part from now on."""
        self.columns = [part.run.columns[self.place] for part in live]
        self.live = [self.lora_B[:, columns].t() for columns in self.columns]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O), in the type of the base layer's output."""
        y = self.base_layer(x)
        for hidden, B_RO in zip(self.group.parts(x, self.place), self.live, strict=False):
            if self.fresh and y.dtype == hidden.dtype == B_RO.dtype and not torch.is_grad_enabled():
                y.view(-1, y.shape[-1]).addmm_(hidden, B_RO)
            else:
                y = y + (hidden @ B_RO).view(y.shape).to(y.dtype)
        return y

    def _apply(self, fn, recurse: bool = True) -> "BlendLinear":
        super()._apply(fn, recurse)
        self.live = [self.lora_B[:, columns].t() for columns in self.columns] if self.live else []
        return self


def _moved(live: Live, fn) -> Live:
    pair = None if live.pair is None else fn(live.pair)
    return Live(live.run, fn(live.gates), None if live.order is None else fn(live.order), pair)


def _of_rows(gates: Tensor, hidden: Tensor) -> Tensor:
    """(B, 1, R) as it fits h (B, T, R), or (B * T, R) where the backbone has flattened its rows.

    Raises:
        BlendError: h has another number of rows.
    """
    rows, found = len(gates), hidden.shape[0]
    if hidden.dim() == 3 and rows == found:
        return gates
    if hidden.dim() == 2 and found % rows == 0:
        return gates[:, 0].repeat_interleave(found // rows, 0)
    raise BlendError(
        f"the batch has {found} rows, and blend.weights were set for {rows}: "
        "set one dict for each row, or one dict for all"
    )
