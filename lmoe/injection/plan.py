"""What will become of which Linear, before anything is changed."""

import re
from dataclasses import dataclass, field

from lmoe.schema.phase import Role


@dataclass(slots=True, frozen=True, kw_only=True)
class SitePlan:
    """One Linear and what it becomes.

    Args:
        path: module path in the backbone.
        layer: index of its decoder layer.
        role: lora (a mixture of experts) or attn_lora (a single LoRA).
        in_features, out_features: D and O of the Linear.
        lora_r: rank of each branch.
        lora_alpha: numerator of the scaling.
        num_experts: E; 0 for a single LoRA without router.
        active_experts: experts that work on one token.
    """

    path: str
    layer: int
    role: Role
    in_features: int
    out_features: int
    lora_r: int
    lora_alpha: float
    num_experts: int = 0
    active_experts: int = 0

    @property
    def scaling(self) -> float:
        """lora_alpha / lora_r."""
        return self.lora_alpha / self.lora_r

    @property
    def branch_parameters(self) -> int:
        """Parameters of one low-rank branch."""
        return self.lora_r * (self.in_features + self.out_features)

    @property
    def router_parameters(self) -> int:
        """Parameters of the router."""
        return self.num_experts * self.in_features

    @property
    def total_parameters(self) -> int:
        """Parameters added: all branches and the router."""
        return max(self.num_experts, 1) * self.branch_parameters + self.router_parameters

    @property
    def active_parameters(self) -> int:
        """Added parameters that work on one token."""
        return (self.active_experts if self.num_experts else 1) * self.branch_parameters + self.router_parameters

    def becomes(self) -> str:
        """In words, for the table."""
        if not self.num_experts:
            return f"LoRA r={self.lora_r}"
        return f"{self.num_experts} experts r={self.lora_r}, {self.active_experts} active"


@dataclass(slots=True, frozen=True, kw_only=True)
class InjectionPlan:
    """Every site, in the order of the backbone, and what the user should know about the choice.

    Args:
        sites: one entry a Linear.
        warnings: half-matched keywords and the like.
    """

    sites: tuple[SitePlan, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def total_parameters(self) -> int:
        """Parameters that the plan adds."""
        return sum(site.total_parameters for site in self.sites)

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
