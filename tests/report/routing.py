"""A history of routing that never happened."""

from collections.abc import Sequence

import numpy as np

from lmoe.report.routing_file import RoutingHistory, SampleRow, in_255

GATES = {"dominant": 0.8, "in_use": 0.05, "in_use_of_uniform": 0.4, "fewest": 3, "lost_entropy": 0.75}


def made_up(
    experts: Sequence[int] = (4, 4, 3),
    *,
    steps: int = 5,
    every: int = 2,
    validations: int = 2,
    domains: Sequence[str] = ("code", "math"),
    texts: Sequence[Sequence[str]] = (("a ", "b", " c"), ("d", "e")),
    phases: dict[str, int] | None = None,
    seed: int = 0,
) -> RoutingHistory:
    """Random loads, entropies and tokens of sites with so many experts; rows of texts go round the domains."""
    random = np.random.default_rng(seed)
    S, A, T, widest = len(experts), sum(experts), sum(map(len, texts)), max(experts)
    ends = np.cumsum(experts)

    def shares(*leading: int) -> np.ndarray:
        parts = [random.dirichlet(np.ones(count), leading) for count in experts]
        return in_255(np.concatenate(parts, -1)).reshape(*leading, A)

    phases = {"router_warmup": 0, "experts": every} if phases is None else phases
    done = np.arange(1, steps + 1, dtype=np.int64) * every
    return RoutingHistory(
        sites=[f"model.layers.{site // 3}.mlp.{('gate_proj', 'up_proj', 'down_proj')[site % 3]}" for site in range(S)],
        experts=list(experts),
        domains=list(domains),
        phases=phases,
        judged=list(phases),
        max_steps=int(done[-1]) if steps else 0,
        gates=GATES,
        rows=[
            SampleRow(domain=domains[n % len(domains)], name=f"row {n + 1}", texts=list(row))
            for n, row in enumerate(texts)
        ],
        rows_step=int(done[-1]) if steps else 0,
        steps=done,
        load=shares(steps),
        largest=in_255(random.uniform(0.3, 1, (steps, S))),
        entropy=in_255(random.uniform(0, 1, (steps, S))),
        load_entropy=in_255(random.uniform(0, 1, (steps, S))),
        phase_steps=np.array([start + 1 for start in phases.values()], np.int64),
        phase_entropy=in_255(random.uniform(0.5, 1, (len(phases), S))),
        validation_steps=done[:validations],
        domain_load=shares(validations, len(domains)),
        expert=np.stack([random.integers(0, count, T) for count in experts], -1).astype(np.uint16)
        if T
        else np.zeros((0, len(ends)), np.uint16),
        weight=in_255(random.uniform(0.2, 1, (T, S))),
        mean=in_255(random.dirichlet(np.ones(widest), T)),
    )
