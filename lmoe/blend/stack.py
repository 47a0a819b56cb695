"""The experts of a blend, stacked beside the Linears of a model, and which of them take part.

Shapes: B rows of a batch, E experts, S sites that read one input, R ranks.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from lmoe.blend.linear import ActiveRun, Arrow, BlendGroup, GroupWeights, Setting, Settings
from lmoe.blend.sites import Built, SiteGroup, SiteGroups, Stacking
from lmoe.blend.weights import SILENT
from lmoe.ops.rank_layout import Ranks, Run, runs
from lmoe.peft.expert_file import Branch, ExpertHeader
from lmoe.peft.reader import read_branches

GROUPS_AT_ONCE = 4
"""Groups of sites whose tensors are in memory twice, as read and as stacked, while a stack is made."""


@dataclass(slots=True, frozen=True)
class ReadExpert:
    """An expert as its file holds it.

    Args:
        header: what it is.
        branches: its tensors by site.
    """

    header: ExpertHeader
    branches: Mapping[str, Branch]

    @classmethod
    def of(cls, header: ExpertHeader) -> "ReadExpert":
        """Read its tensors.

        Raises:
            CheckpointError: they cannot be read.
        """
        return cls(header, read_branches(header))


class BlendStack:
    """Experts in fixed places, the sites that they have branches at, and what those compute under a setting.

    Args:
        model: the backbone; changed in place.
        headers: of the experts by name, which fit the model.
        stacking: how their tensors are kept. Without room, experts that go give their memory back.
        setting: of the model at the start.
        arrow: top_k and temperature where each token decides at each site; None: the setting's weights do.

    Raises:
        CheckpointError: tensors that cannot be read; the model is then left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        headers: Mapping[str, ExpertHeader],
        stacking: Stacking,
        setting: Setting,
        arrow: tuple[int, float] | None,
    ) -> None:
        self.headers, self._arrow, self._stacking = dict(headers), arrow, stacking
        self.places: list[str | None] = list(headers)
        self.numbers = {name: _number() for name in headers}
        self.settings = Settings(self._group_weights, setting)
        self._site_groups = SiteGroups(model, stacking, self.settings)
        self._directions: dict[SiteGroup, Arrow] = {}
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
        self.warm(setting)

    @property
    def groups(self) -> list[SiteGroup]:
        """Groups of sites that keep tensors of experts."""
        return self._site_groups.in_use

    @property
    def sites(self) -> dict[str, SiteGroup]:
        """Every module path at which an expert has a branch, with its group."""
        branching = {path for header in self.headers.values() for path in header.branches}
        return {path: group for group in self.groups for path in group.linears if path in branching}

    def add(self, name: str, expert: ReadExpert) -> None:
        """One more expert, where there is room."""
        self._take(name, expert, self.places)

    def remove(self, name: str) -> None:
        """Take an expert out; the others' numbers stay, or are copied as they are."""
        left = [None if other == name else other for other in self.places]
        headers = {other: header for other, header in self.headers.items() if other != name}
        if self._stacking.room:
            return self._use({}, left, headers)
        kept = [place for place, other in enumerate(left) if other is not None]
        built = {group: group.build([group.branches(place) for place in kept]) for group in self.groups}
        self._use(built, [left[place] for place in kept], headers)

    def replace(self, name: str, expert: ReadExpert) -> None:
        """Another expert under the name of one."""
        self._take(name, expert, [None if other == name else other for other in self.places])

    def rename(self, old: str, new: str) -> None:
        """Another name in the same place."""
        self.places = [new if name == old else name for name in self.places]
        self.headers = {new if name == old else name: header for name, header in self.headers.items()}
        self.numbers = {new if name == old else name: number for name, number in self.numbers.items()}

    def _take(self, name: str, expert: ReadExpert, places: list[str | None]) -> None:
        """Put an expert where there is room at every site, or stack all of them anew.

        Args:
            places: names of the experts that stay; None where none does.
        """
        branches, headers = expert.branches, self.headers | {name: expert.header}
        groups = list(dict.fromkeys([*self.groups, *self._groups_of([expert.header])]))
        ranks = self._room_for(branches, groups) if self._stacking.room else None
        if ranks is not None:
            place, of_group = ranks
            built = {
                group: group.build([*[{}] * place, _inside(group, branches)])
                if known is None
                else group.write(place, known, _inside(group, branches))
                for group, known in of_group.items()
            }
            places = [*places, None] if place == len(places) else list(places)
            places[place] = name
        else:
            kept = [place for place, other in enumerate(places) if other is not None]
            at = sum(place < self.places.index(name) for place in kept) if name in self.places else len(kept)
            order = [*kept[:at], None, *kept[at:]]
            built = {
                group: group.build([_inside(group, branches) if e is None else group.branches(e) for e in order])
                for group in groups
            }
            places = [name if e is None else places[e] for e in order]
        self._use(built, places, headers, name)

    def _room_for(
        self, branches: Mapping[str, Branch], groups: Sequence[SiteGroup]
    ) -> tuple[int, dict[SiteGroup, Ranks | None]] | None:
        """A place that an expert fits into at every site, and the ranks of each group with it; None for a group
        that keeps nothing yet."""
        free = [place for place, name in enumerate(self.places) if name is None]
        for place in [*free, len(self.places)]:
            found: dict[SiteGroup, Ranks | None] = {}
            for group in groups:
                ranks = group.ranks_with(place, _inside(group, branches))
                if ranks is None and (group.group is not None or place < len(self.places)):
                    break
                found[group] = ranks
            else:
                return place, found
        return None

    def _use(
        self,
        built: Mapping[SiteGroup, Built],
        places: list[str | None],
        headers: dict[str, ExpertHeader],
        fresh: str | None = None,
    ) -> None:
        """Take all groups as they were built, or none.

        Args:
            fresh: name of an expert that was not there before.
        """
        before = {group: group.built for group in built}
        try:
            for group, new in built.items():
                group.use(new)
        except BaseException:
            for group, old in before.items():
                group.use(old)
            raise
        self.headers, self.places = headers, places
        self.numbers = {name: _number() if name == fresh else self.numbers[name] for name in headers}
        self._directions.clear()
        self.warm(self.settings.of_model)

    def use(self, setting: Setting) -> None:
        """The setting of the model from now on."""
        self.warm(setting)
        self.settings.set(setting)

    def warm(self, setting: Setting) -> None:
        """Make what every group shows under a setting before the first forward needs it."""
        for group in self.groups:
            assert group.group is not None
            if group.number not in setting.groups or setting.groups[group.number].version != group.group.version:
                setting.groups[group.number] = self._group_weights(setting, group.group)

    def seen(self, setting: Setting) -> dict[str, float]:
        """Each expert's part of all that Arrow gave under a watched setting, over tokens and sites, by the name that it
        had; nothing where there was no forward."""
        total, names, _ = _seen(setting)
        shares = (total / total.sum().clamp(min=1e-30)).tolist()
        return {name: share for name, share in zip(names, shares, strict=True) if name is not None}

    def seen_by_token(self, setting: Setting) -> dict[str, Tensor]:
        """(T,) mean over the sites of what Arrow gave each expert under a setting that is watched by token, by the name
        that it had in the forward; nothing where there was none."""
        total, names, sites = _seen(setting)
        means = (total / max(sites, 1)).unbind(-1)
        return {name: mean for name, mean in zip(names, means, strict=True) if name is not None}

    def _group_weights(self, setting: Setting, group: BlendGroup) -> GroupWeights:
        """What a group computes under a setting; experts silent in all rows are left out."""
        site_group, lora_A, count = self._site_groups.numbered(group.number), group.lora_A, len(self.places)
        there = tuple(name is not None for name in self.places)
        if setting.silent:
            return GroupWeights(group.version, (), ((),) * group.sites)
        arrow = seen = None
        if self._arrow is not None:
            arrow = self._directions.get(site_group)
            if arrow is None or arrow.directions.device != lora_A.device:
                arrow = self._directions[site_group] = site_group.arrow(
                    [place for place, is_there in enumerate(there) if is_there], count, *self._arrow
                )
            shape = (count,) if setting.watched_tokens is None else (setting.watched_tokens, count)
            seen = torch.zeros(shape, device=lora_A.device) if setting.watched else None
            active = [_arrow_run(run, count, lora_A) for run in _runs(group.ranks, there)]
        else:
            active = self._weighted(setting, group)
        lora_A_parts, factors = site_group.slices([part.run for part in active])
        parts = list(zip(lora_A_parts, active, strict=True))
        return GroupWeights(group.version, parts, factors, arrow, seen, tuple(self.places))

    def _weighted(self, setting: Setting, group: BlendGroup) -> list[ActiveRun]:
        """The runs that take part, which most layers share."""
        names, lora_A = tuple(self.places), group.lora_A
        key = (names, group.ranks, lora_A.device, lora_A.dtype)
        if key not in setting.active_runs:
            weights = _weights(setting, names)
            active = tuple((weights != 0).flatten(0, -2).any(0).tolist())
            runs_here = _runs(group.ranks, active)
            setting.active_runs[key] = [_active_run(run, weights, lora_A, by_row=setting.by_row) for run in runs_here]
        return setting.active_runs[key]

    def blended(self, weights: Mapping[str, float]) -> dict[str, list[Branch]]:
        """The branches that take part, by site, each with weight * scaling as its scaling."""
        found: dict[str, list[Branch]] = {}
        for group in self.groups:
            for place, name in enumerate(self.places):
                for path, branch in group.branches(place).items() if name is not None else ():
                    assert name is not None
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
        """The model's own Linears back in their places, and the experts' tensors let go."""
        for group in self.groups:
            group.remove()
        self._directions.clear()
        for setting in (self.settings.of_model, self.settings.compiled):
            setting.groups.clear()
            setting.active_runs.clear()

    def _groups_of(self, headers: Iterable[ExpertHeader]) -> list[SiteGroup]:
        """Groups of the sites of some experts, each once, in the order in which the paths come."""
        return list(dict.fromkeys(self._site_groups.of(path) for header in headers for path in header.branches))


def _seen(setting: Setting) -> tuple[Tensor, tuple[str | None, ...], int]:
    """What Arrow gave under a watched setting, (E,) or (T, E) summed over sites; the experts' names; the sites' number.

    NOTE of what the forwards read alone: the experts may be others by now.
    """
    groups = [group for group in setting.groups.values() if group.seen is not None]
    if not groups:
        return torch.zeros(0), (), 0
    total = torch.stack([group.seen.cpu() for group in groups if group.seen is not None]).sum(0)
    return total, groups[0].names, sum(len(group.factors) for group in groups)


def _number() -> int:
    """A number that no other expert has, here or on another model."""
    return secrets.randbits(62)


def _inside(group: SiteGroup, branches: Mapping[str, Branch]) -> dict[str, Branch]:
    return {path: branches[path] for path in group.paths if path in branches}


def _weights(setting: Setting, names: Sequence[str | None]) -> Tensor:
    """(B, T, E), (B, 1, E), or (1, 1, E) of all rows; what is nearly 0 is 0, unless a router's head has said so.

    Args:
        names: of the experts at each place; None where there is none.
    """
    if setting.weights is not None:
        known = {name: column for column, name in enumerate(setting.names)}
        padded = torch.nn.functional.pad(setting.weights, (0, 1))  # a column of zeros for those that it does not know
        return padded[..., [known.get(name, len(known)) if name is not None else len(known) for name in names]]
    weights_BE = torch.tensor([[0.0 if name is None else row.get(name, 0.0) for name in names] for row in setting.rows])
    weights_BE = weights_BE.view(len(setting.rows), -1)
    return weights_BE.masked_fill(weights_BE.abs() < SILENT, 0.0).unsqueeze(1)


@lru_cache(maxsize=256)
def _runs(ranks: Ranks, active: tuple[bool, ...]) -> list[Run]:
    return runs(ranks, active)


def _active_run(run: Run, weights_BTE: Tensor, lora_A: Tensor, *, by_row: bool) -> ActiveRun:
    return ActiveRun(run, _gates(run, weights_BTE, lora_A, by_row=by_row), _on(run.order, lora_A))


def _gates(run: Run, weights_BTE: Tensor, like: Tensor, *, by_row: bool) -> Tensor:
    """(R,), (B, 1, R) or (B, T, R) weight times scaling."""
    expert_of, scaling = run.expert_of.to(weights_BTE.device), run.scaling.to(weights_BTE.device)
    gates = weights_BTE[..., expert_of] * scaling
    return (gates if by_row else gates[0, 0]).to(like.device, like.dtype)


def _arrow_run(run: Run, count: int, lora_A: Tensor) -> ActiveRun:
    pair = _on(run.site_of * count + run.expert_of, lora_A)
    return ActiveRun(run, run.scaling.to(lora_A.device), _on(run.order, lora_A), pair)


def _on(values: Tensor | None, lora_A: Tensor) -> Tensor | None:
    return None if values is None else values.to(lora_A.device)
