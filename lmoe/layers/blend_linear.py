"""A Linear with many LoRA experts beside it whose weights can change at any time; for inference.

Shapes: N tokens, D in, O out, R ranks of all experts together, E experts, S sites that read one input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lmoe.errors import BlendError
from lmoe.ops.arrow import arrow_weights
from lmoe.ops.one_token import directly, is_one_token
from lmoe.ops.rank_layout import Ranks, Run

BLEND = "lmoe_blend"
"""Attribute of a model whose Linears blend."""


@dataclass(slots=True, frozen=True, eq=False)
class Arrow:
    """Weights of each token at each site, in place of given ones; see ops/arrow.py.

    Args:
        directions: (S, E, D) float32.
        present: (S, E) bool.
        top_k, temperature: of the softmax.
    """

    directions: Tensor
    present: Tensor
    top_k: int
    temperature: float


@dataclass(slots=True, eq=False)
class Live:
    """A run of experts that takes part; shared by all groups that have the same ranks.

    Args:
        run: where it lies.
        gates: weight times scaling of each rank, (R,) or (B, 1, R); with Arrow (R,) the scaling alone. May be set anew.
        order: as in the run, on the device.
        pair: (R,) site * E + expert of each rank, for Arrow.
    """

    run: Run
    gates: Tensor
    order: Tensor | None
    pair: Tensor | None = None

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """To another device or type; moving twice changes nothing more."""
        self.gates = fn(self.gates)
        self.order = None if self.order is None else fn(self.order)
        self.pair = None if self.pair is None else fn(self.pair)


@dataclass(slots=True, eq=False)
class Shown:
    """What changes in a group while it is in use. NOTE an attribute of a module is slow to set.

    Args:
        live: rows of lora_A of each run that takes part, and the run.
        arrow: who decides; None: the gates of the runs.
        shared: an input, what it gave, and the site that comes next.
        silent: no expert takes part for a while.
        seen: (E,) gets what Arrow gives each expert, summed over tokens and sites; None: nobody looks.
    """

    live: list[tuple[Tensor, Live]]
    arrow: Arrow | None = None
    shared: tuple[Tensor, list[Sequence[Tensor]], int] | None = None
    silent: bool = False
    seen: Tensor | None = None


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
        self.ranks, self.sites, self.shown = ranks, len(ranks.ranks[0]), Shown([])

    def show(self, live: list[Live], arrow: Arrow | None = None) -> None:
        """Which runs take part from now on, with what gates."""
        lora_A, shown = self.lora_A, self.shown
        shown.live, shown.arrow, shown.shared = [(lora_A[part.run.rows], part) for part in live], arrow, None

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
        shown, sites = self.shown, self.sites
        if shown.silent or not shown.live:
            return []
        if sites == 1:
            return [part[0] for part in self._hidden(x)]
        shared = shown.shared
        if shared is None or shared[0] is not x or shared[2] != place:
            computed = self._hidden(x)
        else:
            computed = shared[1]
        shown.shared = None if place == sites - 1 else (x, computed, place + 1)
        return [part[place] for part in computed]

    def _hidden(self, x: Tensor) -> list[Sequence[Tensor]]:
        """[run][site] (N, R)."""
        shown, found, shares = self.shown, [], None
        dtype = shown.live[0][0].dtype
        if x.dtype != dtype:
            x = x.to(dtype)
        if shown.arrow is not None:
            arrow = shown.arrow
            weights = arrow_weights(
                x, arrow.directions, arrow.present, top_k=arrow.top_k, temperature=arrow.temperature
            )
            if shown.seen is not None:
                shown.seen += weights.reshape(-1, weights.shape[-1]).sum(0)
            shares = weights.flatten(-2)
        alone = is_one_token(x)
        for lora_A, live in shown.live:
            hidden = directly(linear, x, lora_A) if alone else linear(x, lora_A)
            if live.order is not None:
                hidden = hidden.index_select(-1, live.order)
            gates = live.gates
            if shares is not None:
                assert live.pair is not None
                gates = (shares.index_select(-1, live.pair) * gates).to(hidden.dtype)
            elif gates.dim() == 3:
                gates = _of_rows(gates, hidden)
            hidden = hidden.mul_(gates).view(-1, hidden.shape[-1])
            found.append([hidden] if self.sites == 1 else hidden.split_with_sizes(live.run.widths, 1))
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlendGroup":
        """What moves the model moves the views and gates too."""
        super()._apply(fn, recurse)
        live, arrow = [part for _, part in self.shown.live], self.shown.arrow
        if arrow is not None:
            arrow = replace(arrow, directions=fn(arrow.directions).float(), present=fn(arrow.present))
        for part in live:
            part.move(fn)
        self.show(live, arrow)
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
        self.factors: list[Tensor] = []

    def show(self, live: list[Live]) -> None:
        """Which runs take part from now on."""
        lora_B, place = self.lora_B, self.place
        self.factors[:] = [lora_B[:, part.run.columns[place]].t() for part in live]

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O), in the type of the base layer's output."""
        y = self.base_layer(x)
        for hidden, B_RO in zip(self.group.parts(x, self.place), self.factors, strict=False):
            if self.fresh and y.dtype == hidden.dtype == B_RO.dtype and not torch.is_grad_enabled():
                rows = y.view(-1, y.shape[-1])
                if is_one_token(y):
                    directly(rows.addmm_, hidden, B_RO)
                else:
                    rows.addmm_(hidden, B_RO)
            else:
                y = y + (hidden @ B_RO).view(y.shape).to(y.dtype)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlendLinear":
        super()._apply(fn, recurse)
        self.show([live for _, live in self.group.shown.live])
        return self


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
