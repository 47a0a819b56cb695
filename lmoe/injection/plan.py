"""What will become of which Linear, before anything is changed."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from lmoe.layers.model_route import MODEL
from lmoe.vocabulary import Role


class SiteKind(StrEnum):
    """What a module becomes."""

    single = "single"
    mixture = "mixture"
    beside = "beside"
    expert_ffn = "expert_ffn"
    native_experts = "native_experts"


@dataclass(slots=True, frozen=True, kw_only=True)
class SitePlan:
    """One module and what it becomes.

    Args:
        path: module path in the backbone.
        layer: index of its decoder layer.
        role: lora, or attn_lora for a single LoRA on attention.
        kind: single: a Linear with one LoRA; mixture: a Linear with E; beside: a block with E beside it;
            expert_ffn: an FFN that becomes E; native_experts: experts of the backbone, each with LoRA.
        in_features, out_features: D and O of the module as a whole.
        lora_r: rank of each branch.
        lora_alpha: numerator of the scaling.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.
        branches: (D, O) of each weight that carries branches, by its name inside the module; None: the module itself.
        num_experts: E; 0 for a single LoRA without router.
        active_experts: experts that work on one token.
        router: name of the router that decides here: the site's own path, its block's path, that of the backbone's
            router, or "" for a single LoRA.
        router_in_features: width of what that router looks at.
        router_parameters: parameters of that router, 0 at all but the first Linear that it decides for.
        shared_lora_r: rank of an expert that is always on; 0: none.
        shared_scaling: scaling of that expert.
        shared_lora_A: one lora_A for all experts.
        use_dora: a single LoRA with a magnitude.
        copied_parameters: parameters of an FFN that each expert gets a copy of; 0: all share one.
    """

    path: str
    layer: int
    role: Role
    kind: SiteKind
    in_features: int
    out_features: int
    lora_r: int
    lora_alpha: float
    scaling: float
    branches: dict[str, tuple[int, int]] | None = None
    num_experts: int = 0
    active_experts: int = 0
    router: str = ""
    router_in_features: int = 0
    router_parameters: int = 0
    shared_lora_r: int = 0
    shared_scaling: float = 0.0
    shared_lora_A: bool = False
    use_dora: bool = False
    copied_parameters: int = 0

    @property
    def total_parameters(self) -> int:
        """Parameters added: all branches and the router."""
        return self._branches(max(self.num_experts, 1)) + self.router_parameters

    @property
    def active_parameters(self) -> int:
        """Added parameters that work on one token."""
        return self._branches(self.active_experts if self.num_experts else 1) + self.router_parameters

    def _branches(self, count: int) -> int:
        sizes = [(self.in_features, self.out_features)] if self.branches is None else self.branches.values()
        halves_A = 1 if self.shared_lora_A else count
        routed = sum(self.lora_r * (halves_A * width + count * out) for width, out in sizes)
        shared = self.shared_lora_r * (self.in_features + self.out_features)
        return routed + shared + self.out_features * self.use_dora + count * self.copied_parameters

    def becomes(self) -> str:
        """What the site becomes, in words for the table."""
        if not self.num_experts:
            return f"{'DoRA' if self.use_dora else 'LoRA'} r={self.lora_r}"
        shared = f", one shared r={self.shared_lora_r}" if self.shared_lora_r else ""
        one_A = ", one A" if self.shared_lora_A else ""
        what = {
            SiteKind.mixture: "experts",
            SiteKind.beside: "experts beside it",
            SiteKind.expert_ffn: "FFN experts",
            SiteKind.native_experts: "native experts",
        }[self.kind]
        on = "" if self.branches is None else f" on {', '.join(self.branches) or 'nothing'}"
        copies = ", base copied" if self.copied_parameters else ""
        return f"{self.num_experts} {what} r={self.lora_r}{on}{one_A}{copies}, {self.active_experts} active{shared}"


@dataclass(slots=True, frozen=True, kw_only=True)
class InjectionPlan:
    """Every site, in the order of the backbone, and what the user should know about the choice.

    Args:
        sites: one entry a module that is replaced.
        base_ffn: paths of the feed-forward blocks in the backbone, whose parameters have the role base_ffn.
        native_routers: paths of the routers that the backbone brings along, whoever trains them.
        layers: paths of all decoder layers.
        warnings: half-matched keywords and the like.
    """

    sites: tuple[SitePlan, ...]
    base_ffn: tuple[str, ...] = ()
    native_routers: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def routers(self) -> dict[str, int]:
        """Number of experts that each router chooses from, by the router's name, in the order of the backbone."""
        return {site.router: site.num_experts for site in self.sites if site.num_experts}

    @property
    def sites_of_one_router(self) -> int | None:
        """Number of sites whose experts one router of the whole model chooses; None: there is none."""
        return sum(site.num_experts > 0 for site in self.sites) if MODEL in self.routers else None

    @property
    def total_parameters(self) -> int:
        """Parameters that the plan adds."""
        return sum(site.total_parameters for site in self.sites)

    @property
    def stored_parameters(self) -> int:
        """Parameters of the plan that an adapter's file holds: all but copies of the backbone."""
        return self.total_parameters - sum(site.num_experts * site.copied_parameters for site in self.sites)

    @property
    def active_parameters(self) -> int:
        """Added parameters that work on one token."""
        return sum(site.active_parameters for site in self.sites)

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """(sites, shape, becomes, role, total, active) with equal sites of several layers in one row."""

        groups: dict[tuple[str, str, str, str], list[SitePlan]] = {}
        for site in self.sites:
            name = re.sub(r"\.\d+\.", ".*.", site.path, count=1)
            shape = f"{site.in_features} -> {site.out_features}"
            groups.setdefault((name, shape, site.becomes(), site.role.value), []).append(site)
        rows = []
        for (name, shape, becomes, role), members in groups.items():
            layers = spans([site.layer for site in members])
            total = sum(site.total_parameters for site in members)
            active = sum(site.active_parameters for site in members)
            rows.append((name.replace("*", layers), shape, becomes, role, f"{total:,}", f"{active:,}"))
        return rows

    def __str__(self) -> str:
        head = ("site", "in -> out", "becomes", "role", "parameters", "active")
        rows = [head, *self.rows(), ("total", "", "", "", f"{self.total_parameters:,}", f"{self.active_parameters:,}")]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "{0-2,5}"; a single number stands alone."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
