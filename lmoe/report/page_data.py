"""What the scripts of a run's page draw, small enough to stand in it: arrays as base64, thinned where they must be.

Shapes are those of lmoe/report/routing_file.py.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmoe.report.curve_pieces import Points, finite, measure_breaks, measure_changes, parted
from lmoe.report.curves import Curves, domain_losses
from lmoe.report.loads import short_sites
from lmoe.report.routing_file import RoutingHistory
from lmoe.report.tokens import visible

MOST_POINTS = 400
"""Of one curve of losses."""
MOST_CURVES = 12
"""Domains whose losses are drawn, the first ones."""
LOADS = 240_000
CURVES = 90_000
DOMAINS = 150_000
"""Bytes of the loads by step, of the curves by site, and of the loads by domain, before they become base64."""
TOKENS = 480_000
"""Bytes of the page for the tokens of rows with their routing."""
LONGEST_NAME, LONGEST_TOKEN = 100, 40
"""Characters; of what is longer the end is left out."""
CONTINUED = "·"
"""Shown for a token that goes on with the character of the one before it."""


def page_data(
    metrics: Curves,
    phases: Mapping[str, int],
    max_steps: int,
    measure: str,
    routing: RoutingHistory | None,
    expert_names: Sequence[str] = (),
    phase_measures: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Losses, phases and routing, as JSON takes them; texts are visible ones.

    Args:
        metrics: of the run.
        phases: first optimizer step of each phase by name.
        measure: what losses are measured in.
        routing: None: the run has no routers, or kept nothing of them.
        expert_names: empty where experts have none.
        phase_measures: of each phase, where they differ: lines are broken where the measure changes.
    """
    breaks = measure_breaks(phases, phase_measures)
    if breaks:
        changes = "; ".join(measure_changes(phases, phase_measures))
        measure = f"Lines break where the measure changes ({visible(changes)})"
    return {
        "max_steps": max_steps,
        "phases": [[name_shown(name), start] for name, start in phases.items()],
        "losses": _losses(metrics, breaks),
        "measure": measure,
        "routing": None if routing is None else _routing(routing, expert_names),
    }


def name_shown(text: str) -> str:
    """A name as a reader sees it, cut where it is very long."""
    return visible(text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "…").replace("\n", " ")


def spread(count: int, most: int) -> list[int]:
    """Places of `count`, at most `most`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    if most < 2:
        return [count - 1][:most]
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _losses(metrics: Curves, breaks: Sequence[int]) -> dict[str, Any]:
    """Lines by name: (step, value); where the value is None, a line is broken."""
    domains = domain_losses(metrics)
    drawn = [*domains.items()][:MOST_CURVES]
    return {
        "train": _means(metrics.get("train/loss", []), breaks),
        "val": _points(metrics.get("val/loss", []), breaks),
        "domains": [[name_shown(name), _points(points, breaks)] for name, points in drawn],
        "more_domains": max(0, len(domains) - MOST_CURVES),
    }


def _points(points: Points, breaks: Sequence[int]) -> list[list[float | None]]:
    kept = finite(points)
    pieces = []
    for piece in parted(kept, breaks):
        places = spread(len(piece), max(2, MOST_POINTS * len(piece) // len(kept)))
        pieces.append([piece[place] for place in places])
    return _line(pieces)


def _means(points: Points, breaks: Sequence[int]) -> list[list[float | None]]:
    """Means over neighbours, so many that few enough points remain; each stands at its last step."""
    kept = finite(points)
    each = max(1, math.ceil(len(kept) / MOST_POINTS))
    pieces = []
    for piece in parted(kept, breaks):
        groups = [piece[start : start + each] for start in range(0, len(piece), each)]
        pieces.append([(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups])
    return _line(pieces)


def _line(pieces: Sequence[Points]) -> list[list[float | None]]:
    """One line of several pieces, which a point without a value keeps apart."""
    found: list[list[float | None]] = []
    for piece in pieces:
        if found:
            found.append([piece[0][0] - 0.5, None])
        found += [[step, _rounded(value)] for step, value in piece]
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _routing(history: RoutingHistory, expert_names: Sequence[str]) -> dict[str, Any]:
    S, A = max(1, len(history.sites)), max(1, sum(history.experts))
    widest, names = max(history.experts, default=0), [*expert_names] or history.expert_names
    steps = spread(len(history.steps), min(LOADS // A, CURVES // (3 * S)))
    validations = spread(len(history.validation_steps), DOMAINS // (A * max(1, len(history.domains))))
    last = history.domain_load[-1:] if validations else history.domain_load[:0]
    with_rows = [m for m in range(len(history.domains)) if last[:, m].any()] if len(last) else []
    return {
        "sites": [name_shown(name) for name in short_sites(history.sites)],
        "experts": history.experts,
        "names": [name_shown(names[e]) if e < len(names) else str(e) for e in range(widest)],
        "gates": history.gates,
        "judged": [name in history.judged for name in history.phases],
        "phase_steps": history.phase_steps.tolist(),
        "phase_entropy": encoded(history.phase_entropy),
        "steps": history.steps[steps].tolist(),
        "logged": len(history.steps),
        "load": encoded(history.load[steps]),
        "largest": encoded(history.largest[steps]),
        "entropy": encoded(history.entropy[steps]),
        "load_entropy": encoded(history.load_entropy[steps]),
        "validations": history.validation_steps[validations].tolist(),
        "domains": [name_shown(history.domains[m]) for m in with_rows],
        "domain_load": encoded(history.domain_load[validations][:, with_rows]),
        "tokens": _tokens(history),
    }


def _tokens(history: RoutingHistory) -> dict[str, Any]:
    """The rows that the page has room for, evenly spread over all."""
    wide = max(history.experts, default=0) > 256
    each = len(history.sites) * (3 if wide else 2) + max(history.experts, default=0)
    texts = [[_token(text) for text in row.texts] for row in history.rows]
    costs = [len(json.dumps(found)) + 60 + math.ceil(len(found) * each * 4 / 3) for found in texts]
    kept = spread(len(costs), len(costs))
    while sum(costs[place] for place in kept) > TOKENS:
        kept = spread(len(costs), len(kept) - 1)
    starts = np.cumsum([0, *map(len, texts)])
    places = np.concatenate([np.arange(0), *(np.arange(starts[row], starts[row + 1]) for row in kept)]).astype(np.int64)
    rows = [history.rows[row] for row in kept]
    return {
        "step": history.rows_step,
        "rows": [
            {"name": f"{name_shown(row.domain)}, {name_shown(row.name)}", "texts": texts[place], "cut": row.cut}
            for place, row in zip(kept, rows, strict=True)
        ],
        "left_out": len(texts) - len(rows),
        "wide": wide,
        "expert": encoded(history.expert[places] if wide else history.expert[places].astype(np.uint8)),
        "weight": encoded(history.weight[places]),
        "mean": encoded(history.mean[places]),
    }


def _token(text: str) -> str:
    return visible(text if len(text) <= LONGEST_TOKEN else text[:LONGEST_TOKEN] + "…") or CONTINUED


def encoded(array: NDArray[Any]) -> str:
    """Bytes of an array, numbers of several bytes with the lowest first, as base64."""
    return base64.b64encode(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()).decode()
