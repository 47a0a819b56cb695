"""The experts of a blend, stacked beside the Linears of a model, and which of them take part.

Shapes: B rows of a batch, E experts, S sites that read one input, R ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

from lmoe.checkpoint.expert_file import Branch, ExpertHeader
from lmoe.checkpoint.peft_reader import read_branches
from lmoe.inference.blend_sites import Built, SiteGroup, site_groups
from lmoe.inference.blend_weights import SILENT
from lmoe.layers.blend_linear import Arrow, Live
from lmoe.ops.rank_layout import Ranks, Run, runs

GROUPS_AT_ONCE = 4
"""Groups of sites whose tensors are in memory twice, as read and as stacked, while a stack is made."""


class BlendStack:
    """Experts in a fixed order, and the sites that they have branches at.

    Args:
        model: the backbone; changed in place.
        headers: of the experts by name, which fit the model.
        dtype: of the experts' tensors.

    Raises:
        CheckpointError: tensors that cannot be read; the model is then left as it was.
    """

    def __init__(self, model: nn.Module, headers: Mapping[str, ExpertHeader], dtype: torch.dtype) -> None:
        self.headers = dict(headers)
        self._group_of = site_groups(model, dtype)
        self._directions: dict[SiteGroup, Arrow] = {}
        self.is_silent = False
        self._active: tuple[bool, ...] | None = None
        self._shown: dict[tuple[Ranks, torch.device], list[Live]] = {}
        groups = self._groups_of(self.headers.values())
        try:
            for first in range(0, len(groups), GROUPS_AT_ONCE):
                some = groups[first : first + GROUPS_AT_ONCE]
                paths = [path for group in some for path in group.paths]
                read = [read_branches(header, paths) for header in self.headers.values()]
                for group in some:
                    group.use(group.build([_inside(group, branches) for branches in read]))
        except BaseException:
            self.close()
            raise

    @property
    def groups(self) -> list[SiteGroup]:
        """Those with at least one expert."""
        return [group for group in self._groups_of(self.headers.values()) if group.group is not None]

    @property
    def sites(self) -> dict[str, SiteGroup]:
        """Every module path that carries experts, with its group."""
        return {path: group for group in self.groups for path in group.linears}

    def add(self, name: str, header: ExpertHeader) -> None:
        """One more expert, at the end."""
        branches, last = read_branches(header), range(len(self.headers))
        groups = self._groups_of([*self.headers.values(), header])
        built = {g: g.build([*(g.branches(e) for e in last), _inside(g, branches)]) for g in groups}
        self._use(built, self.headers | {name: header})

    def remove(self, name: str) -> None:
        """Take an expert out; the others' numbers are copied as they are."""
        kept = [e for e, other in enumerate(self.headers) if other != name]
        built = {g: g.build([g.branches(e) for e in kept]) for g in self.groups}
        self._use(built, {other: header for other, header in self.headers.items() if other != name})

    def replace(self, name: str, header: ExpertHeader) -> None:
        """Another expert in the place of one."""
        branches, names = read_branches(header), list(self.headers)
        groups = self._groups_of([*self.headers.values(), header])
        built = {
            g: g.build([_inside(g, branches) if other == name else g.branches(e) for e, other in enumerate(names)])
            for g in groups
        }
        self._use(built, self.headers | {name: header})

    def rename(self, old: str, new: str) -> None:
        """Another name in the same place."""
        self.headers = {new if name == old else name: header for name, header in self.headers.items()}

    def _use(self, built: Mapping[SiteGroup, Built], headers: dict[str, ExpertHeader]) -> None:
        """Take all groups as they were built, or none."""
        before = {group: group.built for group in built}
        try:
            for group, new in built.items():
                group.use(new)
        except BaseException:
            for group, old in before.items():
                group.use(old)
            raise
        self.headers, self._active = headers, None  # nothing that was made of the experts before holds any longer
        self._directions.clear()
        self.silence(self.is_silent)

    def show(self, weights_BE: Tensor, *, by_row: bool) -> None:
        """From now on weights of the model (1, E), or of the rows (B, E); experts silent everywhere are left out."""
        weights_BE = weights_BE.masked_fill(weights_BE.abs() < SILENT, 0.0)
        active = tuple((weights_BE != 0).any(0).tolist())
        if active == self._active:  # the same slices with other gates, which most layers share
            for lives in self._shown.values():
                for live in lives:
                    live.gates = _gates(live.run, weights_BE, live.gates, by_row=by_row)
            return
        made: dict[tuple[Ranks, torch.device], list[Live]] = {}
        for group in self.groups:
            assert group.group is not None
            lora_A = group.group.lora_A
            key = (group.group.ranks, lora_A.device)
            if key not in made:
                made[key] = [_live(run, weights_BE, lora_A, by_row=by_row) for run in _runs(key[0], active)]
            group.show(made[key])
        self._active, self._shown = active, made

    def show_arrow(self, top_k: int, temperature: float) -> None:
        """Each token decides at each site from now on."""
        count = len(self.headers)
        for group in self.groups:
            assert group.group is not None
            lora_A, known = group.group.lora_A, self._directions.get(group)
            if known is None or known.directions.device != lora_A.device:
                self._directions[group] = group.arrow(count, top_k, temperature)
            live = [_arrow_live(run, count, lora_A) for run in _runs(group.group.ranks, (True,) * count)]
            group.show(live, self._directions[group])

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """(E,) of each group: what Arrow gives the experts inside the block, summed over tokens and sites."""
        inside = [group.group for group in self.groups if group.group is not None]
        for group in inside:
            group.shown.seen = torch.zeros(len(self.headers), device=group.lora_A.device)
        try:
            yield [group.shown.seen for group in inside if group.shown.seen is not None]
        finally:
            for group in inside:
                group.shown.seen = None

    def silence(self, silent: bool) -> None:
        """Leave all experts out for a while."""
        self.is_silent = silent
        for group in self.groups:
            assert group.group is not None
            group.group.shown.silent = silent

    def blended(self, weights: Mapping[str, float]) -> dict[str, list[Branch]]:
        """By site the branches that take part, each with weight * scaling as its scaling."""
        names, found = list(self.headers), {}
        for group in self.groups:
            for expert, name in enumerate(names):
                for path, branch in group.branches(expert).items():
                    parts = found.setdefault(path, [])
                    if abs(weights[name]) >= SILENT:
                        parts.append(Branch(branch.lora_A, branch.lora_B, weights[name] * branch.scaling))
        return found

    def detach(self) -> None:
        """The model's own Linears in their places; the experts stay here."""
        for group in self.groups:
            group.detach()

    def attach(self) -> None:
        """The experts beside the Linears again."""
        for group in self.groups:
            group.attach()

    def close(self) -> None:
        """The model's own Linears back in their places."""
        for group in self._groups_of(self.headers.values()):
            group.remove()

    def _groups_of(self, headers: Sequence[ExpertHeader] | object) -> list[SiteGroup]:
        """In the order in which the paths come, each once."""
        return list(dict.fromkeys(self._group_of(path) for header in headers for path in header.branches))  # type: ignore[attr-defined]


def _inside(group: SiteGroup, branches: Mapping[str, Branch]) -> dict[str, Branch]:
    return {path: branches[path] for path in group.paths if path in branches}


@lru_cache(maxsize=256)
def _runs(ranks: Ranks, active: tuple[bool, ...]) -> list[Run]:
    return runs(ranks, active)


def _live(run: Run, weights_BE: Tensor, lora_A: Tensor, *, by_row: bool) -> Live:
    return Live(run, _gates(run, weights_BE, lora_A, by_row=by_row), _on(run.order, lora_A))


def _gates(run: Run, weights_BE: Tensor, like: Tensor, *, by_row: bool) -> Tensor:
    """(R,) or (B, 1, R) weight times scaling."""
    gates = weights_BE[:, run.expert_of] * run.scaling
    return (gates.unsqueeze(1) if by_row else gates[0]).to(like.device, like.dtype)


def _arrow_live(run: Run, count: int, lora_A: Tensor) -> Live:
    pair = _on(run.site_of * count + run.expert_of, lora_A)
    return Live(run, run.scaling.to(lora_A.device), _on(run.order, lora_A), pair)


def _on(values: Tensor | None, lora_A: Tensor) -> Tensor | None:
    return None if values is None else values.to(lora_A.device)
