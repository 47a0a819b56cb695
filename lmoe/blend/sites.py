"""Put experts beside the Linears of a model, group by group of Linears that read one input, and take them off again.

Shapes: D in, O out, R ranks of all experts together, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmoe.backbones.siblings import siblings
from lmoe.blend.linear import Arrow, BlendGroup, BlendLinear, Settings
from lmoe.errors import BackboneError, BlendError
from lmoe.injection.record import BLEND, RECORD
from lmoe.ops.linear_sizes import sizes
from lmoe.ops.low_rank import top_direction
from lmoe.ops.rank_layout import Ranks, Run
from lmoe.peft.expert_file import Branch


def refuse_unblendable(model: nn.Module) -> None:
    """Refuse a model into which no blend can be put.

    Raises:
        BlendError: the model carries adapters or a blend already.
    """
    if getattr(model, BLEND, None) is not None:
        raise BlendError("this model blends already: use its blend's add, remove and weights, or close() it first")
    if getattr(model, RECORD, None) is not None:
        raise BlendError("this model carries injected experts; load the backbone anew to blend over it")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise BlendError(
            "this model carries PEFT adapters: give the backbone itself (unload() returns it), and their places"
        )


def experts_dtype(model: nn.Module) -> torch.dtype:
    """The type of the base's weights; of a quantised base that in which it computes."""
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@dataclass(slots=True, frozen=True)
class Stacking:
    """How the tensors of experts are kept.

    Args:
        dtype: of them all.
        room: ranks that are kept free at each site, for experts that come later.
    """

    dtype: torch.dtype
    room: int = 0


SLICES_KEPT = 64
"""Sets of experts whose views of the stacked tensors are kept at a group."""
Branches = dict[str, Branch]
"""Of one expert at the sites of a group, by module path."""


@dataclass(slots=True, frozen=True)
class Built:
    """The experts of a group, stacked; without any, no group.

    Args:
        group: their lora_A.
        linears: by module path, around the model's own.
        ranks: of the experts in it.
    """

    group: BlendGroup | None
    linears: dict[str, BlendLinear]
    ranks: Ranks | None = None


class SiteGroup:
    """Sites that read one input; those where some expert has a branch carry a BlendLinear.

    Args:
        model: the backbone.
        paths: module paths of all Linears that may become sites, in the order in which they are called.
        stacking: how the experts' tensors are kept.
        settings: of the blend.
        number: by which a setting knows the group.
    """

    def __init__(
        self, model: nn.Module, paths: tuple[str, ...], stacking: "Stacking", settings: Settings, number: int
    ) -> None:
        self.model, self.paths, self.stacking = model, paths, stacking
        self.settings, self.number = settings, number
        self.bases = {path: model.get_submodule(path) for path in paths}
        self.group: BlendGroup | None = None
        self.linears: dict[str, BlendLinear] = {}
        self._slices: dict[Any, tuple[list[Tensor], list[list[Tensor]]]] = {}

    def branches(self, expert: int) -> Branches:
        """What an expert has here; views of the stacked tensors."""
        if self.group is None:
            return {}
        ranks = self.group.ranks
        scalings = dict(zip(self.linears, ranks.scalings[expert], strict=True))
        return {path: Branch(*views, scalings[path]) for path, views in self._views(expert, ranks).items()}

    @property
    def built(self) -> Built:
        """What is in use."""
        return Built(self.group, self.linears, None if self.group is None else self.group.ranks)

    def ranks_with(self, place: int, branches: Branches) -> Ranks | None:
        """The ranks of all experts with another one at a place that is free; None: there is no room for it here.

        Args:
            place: the first one after the last expert, or that of an expert which is gone.
        """
        if self.group is None or not set(branches) <= set(self.linears):
            return None
        known = self.group.ranks
        own = tuple(branches[path].lora_A.shape[0] if path in branches else 0 for path in self.linears)
        scalings = tuple(branches[path].scaling if path in branches else 0.0 for path in self.linears)
        if place < len(known.ranks):
            if own != known.ranks[place]:
                return None
            return Ranks(known.ranks, (*known.scalings[:place], scalings, *known.scalings[place + 1 :]))
        ranks = Ranks((*known.ranks, own), (*known.scalings, scalings))
        fits = ranks.rows(place)[1] <= len(self.group.lora_A) and all(
            ranks.columns(place, site)[1] <= linear.lora_B.shape[1] for site, linear in enumerate(self.linears.values())
        )
        return ranks if fits else None

    def write(self, place: int, ranks: Ranks, branches: Branches) -> Built:
        """Copy an expert's numbers to a place where nobody reads yet; returns what takes them into use."""
        assert self.group is not None
        for path, branch in branches.items():
            lora_A, lora_B = self._views(place, ranks)[path]
            lora_A.copy_(branch.lora_A)
            lora_B.copy_(branch.lora_B)
        return Built(self.group, self.linears, ranks)

    def _views(self, place: int, ranks: Ranks) -> dict[str, tuple[Tensor, Tensor]]:
        """Where an expert's lora_A and lora_B lie, by path."""
        assert self.group is not None
        found, row = {}, ranks.rows(place)[0]
        for site, (path, linear) in enumerate(self.linears.items()):
            width = ranks.ranks[place][site]
            if width:
                found[path] = (
                    self.group.lora_A[row : row + width],
                    linear.lora_B[:, slice(*ranks.columns(place, site))],
                )
            row += width
        return found

    def build(self, experts: Sequence[Branches]) -> Built:
        """Stack the branches of all experts, in BlendLinears where there are any; the model stays as it is."""
        there = [path for path in self.paths if any(path in own for own in experts)]
        if not there:
            return Built(None, {})
        shape = [[own[path].lora_A.shape[0] if path in own else 0 for path in there] for own in experts]
        scalings = [[own[path].scaling if path in own else 0.0 for path in there] for own in experts]
        ranks = Ranks(tuple(map(tuple, shape)), tuple(map(tuple, scalings)))
        device = next(self.bases[there[0]].parameters()).device
        used, dtype = sum(map(sum, shape)), self.stacking.dtype
        room = self.stacking.room * len(there)
        lora_A = torch.empty(used + room, sizes(self.bases[there[0]])[0], dtype=dtype, device=device)
        rows = iter(lora_A[:used].split([width for own in shape for width in own if width]))
        for own in experts:
            for path in there:
                if path in own:
                    next(rows).copy_(own[path].lora_A)
        stacked_B = {path: self._stacked_B([own.get(path) for own in experts], path) for path in there}
        group = BlendGroup(lora_A, ranks, self.settings, self.number)
        linears = {
            path: BlendLinear(self.bases[path], stacked_B[path], group, place) for place, path in enumerate(there)
        }
        return Built(group, linears, ranks)

    def use(self, built: Built) -> None:
        """Put what was built into the model."""
        if built.group is not None and built.ranks is not None:
            built.group.use(built.ranks)
        if built.linears is not self.linears:
            self.group, self.linears = built.group, built.linears
            self.attach()

    def attach(self) -> None:
        """Put the BlendLinears into the model, where its Linears are, and these themselves where there is none."""
        for path, base in self.bases.items():
            linear = self.linears.get(path)
            if linear is not None and linear.lora_B.device != (device := next(base.parameters()).device):
                linear.to(device)  # the model has moved while they were off
            self.model.set_submodule(path, base if linear is None else linear.train(base.training))

    def detach(self) -> None:
        """Put the Linears themselves back; the experts stay here."""
        for path, base in self.bases.items():
            self.model.set_submodule(path, base)

    def remove(self) -> None:
        """Put the Linears back and drop the experts."""
        self.use(Built(None, {}))
        self._slices = {}

    def slices(self, live: Sequence[Run]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Views of what is stacked, for runs of experts: [run] rows of lora_A, and [site][run] (R, O) of lora_B."""
        assert self.group is not None
        key = (self.group.version, tuple((run.rows.start, run.rows.stop) for run in live))
        found = self._slices.get(key)
        if found is None:
            lora_A, stacked_B = self.group.lora_A, [linear.lora_B for linear in self.linears.values()]
            found = (
                [lora_A[run.rows] for run in live],
                [[lora_B[:, run.columns[site]].t() for run in live] for site, lora_B in enumerate(stacked_B)],
            )
            still = {other: kept for other, kept in self._slices.items() if other[0] == key[0]}
            self._slices = {key: found} if len(still) > SLICES_KEPT else {**still, key: found}
        return found

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_slices": {}}  # views, which a pickle would hold as tensors of their own

    def arrow(self, places: Sequence[int], count: int, top_k: int, temperature: float) -> Arrow:
        """Directions of all experts here, see ops/arrow.py.

        Args:
            places: where there is an expert.
            count: of all places.
        """
        assert self.group is not None
        group, found = self.group, {place: self.branches(place) for place in places}
        directions = torch.zeros(len(self.linears), count, group.lora_A.shape[1], device=group.lora_A.device)
        present = torch.zeros(len(self.linears), count, dtype=torch.bool, device=group.lora_A.device)
        for expert, own in found.items():
            for site, path in enumerate(self.linears):
                if path in own:
                    directions[site, expert] = top_direction(own[path].lora_A, own[path].lora_B)
                    present[site, expert] = True
        return Arrow(directions, present, top_k, temperature)

    def _stacked_B(self, branches: list[Branch | None], path: str) -> Tensor:
        """The lora_B of all branches side by side, (O, R). NOTE for one token on a CPU, float32 is faster where memory
        holds it as (R, O)."""
        base, there = self.bases[path], [branch.lora_B for branch in branches if branch is not None]
        out, used, device = sizes(base)[1], sum(B.shape[1] for B in there), next(base.parameters()).device
        total, dtype = used + self.stacking.room, self.stacking.dtype
        if dtype == torch.float32:
            stacked = torch.empty(total, out, dtype=dtype, device=device).t()
        else:
            stacked = torch.empty(out, total, dtype=dtype, device=device)
        for part, B in zip(stacked[:, :used].split([B.shape[1] for B in there], 1), there, strict=True):
            part.copy_(B)
        return stacked


class SiteGroups:
    """The groups of a model, each made when one of its paths is first asked for.

    Args:
        model: the backbone.
        stacking: how the experts' tensors are kept.
        settings: of the blend.
    """

    def __init__(self, model: nn.Module, stacking: Stacking, settings: Settings) -> None:
        self.model, self.stacking, self.settings = model, stacking, settings
        try:
            self._together = {path: group for group in siblings(model) for path in group}
        except BackboneError:  # sharing a matmul is all that the layout is for
            self._together = {}
        self._of_path: dict[str, SiteGroup] = {}
        self._numbered: list[SiteGroup] = []

    def of(self, path: str) -> SiteGroup:
        """The group of a module path."""
        if path not in self._of_path:
            paths = self._together.get(path, (path,))
            group = SiteGroup(self.model, paths, self.stacking, self.settings, len(self._numbered))
            self._numbered.append(group)
            self._of_path.update(dict.fromkeys(paths, group))
        return self._of_path[path]

    @property
    def in_use(self) -> list[SiteGroup]:
        """Groups that keep tensors of experts."""
        return [group for group in self._numbered if group.group is not None]

    def numbered(self, number: int) -> SiteGroup:
        """The group that a setting knows by this number."""
        return self._numbered[number]
