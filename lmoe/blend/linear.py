"""A Linear with many LoRA experts beside it whose weights can change at any time; for inference.

Shapes: N tokens, D in, O out, R ranks of all experts together, E experts, S sites that read one input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from lmoe.errors import BlendError
from lmoe.layers.per_call import PerCall
from lmoe.ops.arrow import arrow_weights
from lmoe.ops.one_token import directly, is_one_token
from lmoe.ops.rank_layout import Ranks, Run


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


@dataclass(slots=True, frozen=True, eq=False)
class ActiveRun:
    """A run of experts that takes part; shared by all groups that have the same ranks.

    Args:
        run: where it lies.
        gates: weight times scaling of each rank, (R,), (B, 1, R) or (B, T, R); with Arrow (R,) the scaling alone.
        order: as in the run, on the device.
        pair: (R,) site * E + expert of each rank, for Arrow.
    """

    run: Run
    gates: Tensor
    order: Tensor | None
    pair: Tensor | None = None


@dataclass(slots=True, frozen=True, eq=False)
class GroupWeights:
    """What the sites of one group compute under one setting.

    Args:
        version: of the group's tensors that this was made from.
        active: rows of lora_A of each run that takes part, and the run.
        factors: [site][run] (R, O) of lora_B.
        arrow: who decides; None: the gates of the runs.
        seen: gets what Arrow gives each expert: (E,) summed over tokens and sites, or (T, E) of each token of one
            forward, summed over sites; None: nobody looks.
        names: of the experts of what is seen, which may come and go before somebody reads it; None where there is none.
    """

    version: int
    active: Sequence[tuple[Tensor, ActiveRun]]
    factors: Sequence[Sequence[Tensor]]
    arrow: Arrow | None = None
    seen: Tensor | None = None
    names: tuple[str | None, ...] = ()


@dataclass(slots=True, eq=False)
class Setting:
    """The weights of a whole blend. A forward reads one setting, whatever others set meanwhile.

    Copies and pickles make what the groups show anew, from their own tensors.

    Args:
        rows: weight of each expert by name, for the model or for each row; names left out are 0.
        by_row: whether each row of the batch has its own.
        silent: no expert takes part.
        watched: whether to sum up what Arrow gives.
        watched_tokens: tokens of the one forward in which that is summed up for each of them; None: over all.
        experts: number of each expert that was there when the setting was made, by name: another expert may get a name.
        weights: (B, T, E) or (B, 1, E) in place of the rows' numbers, which may differ by token.
        names: of the experts of these weights.
        decided: by a router's head, for the prompts of one forward or KV cache.
        by_token: the weights are those of the tokens of a forward, whatever the blend's router would say.
        groups: what each group shows, by its number; made when first asked for.
        active_runs: the runs that groups with the same ranks share.
    """

    rows: Sequence[Mapping[str, float]]
    by_row: bool = False
    silent: bool = False
    watched: bool = False
    experts: Mapping[str, int] = field(default_factory=dict)
    weights: Tensor | None = None
    names: Sequence[str] = ()
    decided: bool = False
    by_token: bool = False
    watched_tokens: int | None = None
    groups: dict[int, GroupWeights] = field(default_factory=dict)
    active_runs: dict[Any, list[ActiveRun]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.rows, self.by_row, self.silent, self.watched, self.experts)
        return type(self), (*values, self.weights, self.names, self.decided, self.by_token, self.watched_tokens)

    def gone(self, experts: Mapping[str, int]) -> str | None:
        """The first expert with a weight that is not there any more under its name, or None."""
        weighed = {name for row in self.rows for name, weight in row.items() if weight}
        return next((name for name in sorted(weighed) if experts.get(name) != self.experts.get(name)), None)


class Settings:
    """Which setting a forward reads: that of its own thread, or that of the model.

    Args:
        make: what a group shows under a setting.
        of_model: the setting of all who have none of their own.
    """

    def __init__(self, make: Callable[["Setting", "BlendGroup"], GroupWeights], of_model: Setting) -> None:
        self.make, self.of_model = make, of_model
        self.compiled = of_model  # what compiled code reads, which serves one thread
        self._own: PerCall[Setting] = PerCall()
        self._forward: PerCall[Setting] = PerCall()
        self._version = 0

    def new_version(self) -> int:
        """A number for tensors that were not there before."""
        self._version += 1
        return self._version

    @property
    def own(self) -> Setting | None:
        """Setting of the innermost block of this thread, or None."""
        return self._own.get()

    @property
    def current(self) -> Setting:
        """The setting that the next forward of this thread reads."""
        own = self._own.get()
        return self.of_model if own is None else own

    def set(self, setting: Setting) -> None:
        """The setting of the model from now on."""
        self._forward.set(None)  # of a forward that was interrupted
        self.of_model = setting
        self.compiled = self.current

    @contextmanager
    def inside(self, setting: Setting) -> Iterator[None]:
        """Let this thread have a setting of its own inside the block."""
        self.end()  # of a forward that was interrupted
        try:
            with self._own.holding(setting):
                self.compiled = setting
                yield
        finally:
            self.compiled = self.current

    def begin(self, setting: Setting) -> None:
        """A forward of this thread reads this setting, until `end`."""
        self._forward.set(setting)

    def end(self) -> Setting | None:
        """The forward is over; returns what it has read."""
        setting = self._forward.get()
        self._forward.set(None)
        return setting

    def group_weights(self, group: "BlendGroup") -> GroupWeights:
        """What a group computes now."""
        if torch.compiler.is_compiling():
            setting = self.compiled
        else:
            forward = self._forward.get()
            setting = self.current if forward is None else forward
        group_weights = setting.groups.get(group.number)
        if group_weights is None or group_weights.version != group.version:
            group_weights = setting.groups[group.number] = self.make(setting, group)
        return group_weights


class BlendGroup(nn.Module):
    """The lora_A of all experts at the sites that read one input: one matmul for all of them.

    Args:
        lora_A: (R or more, D), see ops/rank_layout.py; what lies behind the ranks is room for more.
        ranks: of every expert at every site.
        settings: of the blend.
        number: by which a setting knows the group.
    """

    lora_A: Tensor

    def __init__(self, lora_A: Tensor, ranks: Ranks, settings: Settings, number: int) -> None:
        super().__init__()
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.ranks, self.sites = ranks, len(ranks.ranks[0])
        self.settings, self.number, self.version = settings, number, settings.new_version()
        # NOTE an attribute of a module is slow to set. Written and read whole, so that threads may meet here.
        self.shared: list[tuple[Tensor, GroupWeights, list[Sequence[Tensor]], int] | None] = [None]

    def use(self, ranks: Ranks) -> None:
        """Other experts in the same tensors."""
        if ranks != self.ranks:
            self.ranks, self.version = ranks, self.settings.new_version()
            self.shared[0] = None

    def parts(self, x: Tensor, place: int, group_weights: GroupWeights) -> list[Tensor]:
        """Gated h = x A^T of one site, (N, R) for each run that takes part.

        What the first site computes serves the others, in their order, as long as they get the very same tensor; it is
        let go with the last one. Sites that are called otherwise compute it anew.

        Args:
            x: (..., D).
            place: of the site in the group.
            group_weights: under the setting of this forward.

        Raises:
            BlendError: weights for another number of rows than x has.
        """
        sites = self.sites
        if not group_weights.active:
            return []
        if sites == 1:
            return [part[0] for part in self._hidden(x, group_weights)]
        shared = self.shared[0]
        if shared is None or shared[0] is not x or shared[1] is not group_weights or shared[3] != place:
            computed = self._hidden(x, group_weights)
        else:
            computed = shared[2]
        self.shared[0] = None if place == sites - 1 else (x, group_weights, computed, place + 1)
        return [part[place] for part in computed]

    def _hidden(self, x: Tensor, group_weights: GroupWeights) -> list[Sequence[Tensor]]:
        """Inner values of each run and each of its sites, each (N, R)."""
        found, shares = [], None
        dtype = group_weights.active[0][0].dtype
        if x.dtype != dtype:
            x = x.to(dtype)
        if group_weights.arrow is not None:
            arrow = group_weights.arrow
            weights = arrow_weights(
                x, arrow.directions, arrow.present, top_k=arrow.top_k, temperature=arrow.temperature
            )
            if group_weights.seen is not None:
                given = weights.flatten(0, -3).sum(1)
                group_weights.seen.add_(given if group_weights.seen.dim() == 2 else given.sum(0))
            shares = weights.flatten(-2)
        alone = is_one_token(x)
        for lora_A, active in group_weights.active:
            hidden = directly(linear, x, lora_A) if alone else linear(x, lora_A)
            if active.order is not None:
                hidden = hidden.index_select(-1, active.order)
            gates = active.gates
            if shares is not None:
                assert active.pair is not None
                gates = (shares.index_select(-1, active.pair) * gates).to(hidden.dtype)
            elif gates.dim() == 3:
                gates = _of_rows(gates, hidden)
            hidden = hidden.mul_(gates).view(-1, hidden.shape[-1])
            found.append([hidden] if self.sites == 1 else hidden.split_with_sizes(active.run.widths, 1))
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlendGroup":
        """What moves the model moves what every setting shows: it is made anew from the tensors that have moved."""
        super()._apply(fn, recurse)
        self.version = self.settings.new_version()
        self.shared[0] = None
        return self


class BlendLinear(nn.Module):
    """y = base_layer(x) + sum_e w_e s_e x A_e^T B_e^T, as ((x A^T) * w) B^T over all ranks at once.

    An expert with |w_e| below a threshold in all rows is not computed; where that holds for all, y is the base's.

    Args:
        base_layer: the Linear, a quantised one or a Conv1D.
        lora_B: (O, R or more) of all experts at this site.
        group: holds lora_A.
        place: of this site in the group.
    """

    lora_B: Tensor

    def __init__(self, base_layer: nn.Module, lora_B: Tensor, group: BlendGroup, place: int) -> None:
        super().__init__()
        self.base_layer, self.group, self.place = base_layer, group, place
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.fresh = type(base_layer) in (nn.Linear, Conv1D)  # what another layer returns may be kept by it

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., O), in the type of the base layer's output."""
        group_weights = self.group.settings.group_weights(self.group)
        y = self.base_layer(x)
        for hidden, B_RO in zip(
            self.group.parts(x, self.place, group_weights), group_weights.factors[self.place], strict=False
        ):
            if self.fresh and y.dtype == hidden.dtype == B_RO.dtype and not torch.is_grad_enabled():
                rows = y.view(-1, y.shape[-1])
                if is_one_token(y):
                    directly(rows.addmm_, hidden, B_RO)
                else:
                    rows.addmm_(hidden, B_RO)
            else:
                y = y + (hidden @ B_RO).view(y.shape).to(y.dtype)
        return y


def _of_rows(gates: Tensor, hidden: Tensor) -> Tensor:
    """(B, 1, R) or (B, T, R) as it fits h (B, T, R), or (B * T, R) where the backbone has flattened its rows.

    Raises:
        BlendError: h has another number of rows.
    """
    rows, found = len(gates), hidden.shape[0]
    if hidden.dim() == 3 and rows == found:
        return gates
    if hidden.dim() == 2 and found % rows == 0:
        return gates.expand(-1, found // rows, -1).reshape(found, -1)
    raise BlendError(wrong_rows(rows, found))


def wrong_rows(weighed: int, found: int) -> str:
    """What is wrong with weights of another number of rows than the batch has."""
    return (
        f"the batch has {found} rows, and blend.weights were set for {weighed}: "
        "set one dict for each row, or one dict for all"
    )
