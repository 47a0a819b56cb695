"""Names of mixtures: what a client asks for as a model, and what it weighs."""

import math
import re
from collections.abc import Collection, Mapping

from lmoe.files.wording import LONGEST_REASON, shown
from lmoe.serve.http.problem import Problem

OPEN_EXPONENT = re.compile(r".*\*\s*[\d.]+[eE]$", re.DOTALL)
"""A part that goes on behind its +: 1e+5."""


def mixture_of(
    model: str | None, weights: Mapping[str, float] | None, *, served: str, known: Collection[str]
) -> dict[str, float] | None:
    """Weight by expert of what a request asks for; None: the server's own mixture.

    Args:
        model: of the request: the served name, an expert, or a mixture such as code*0.7+chat*0.3; None: the served one.
        weights: of the request's `experts`.
        served: name of the model.
        known: names of the experts.

    Raises:
        Problem: there is no such model or expert, or both name a mixture.
    """
    own = model is None or model == served
    if weights is not None and not own:
        message = f"experts and model both name a mixture; give experts with model {served!r}, or model alone"
        raise Problem(400, message, "experts", "invalid_value")
    if weights is not None:
        _check(weights, known, "experts", served)
        return dict(weights)
    if own:
        return None
    assert model is not None
    if model in known:
        return {model: 1.0}
    if "*" not in model and "+" not in model:
        raise _unknown(model, known, "model", served)
    found: dict[str, float] = {}
    for part in _parts(model):
        name, times, weight = part.partition("*")
        name = name.strip()
        if not name:
            raise Problem(400, f"model {shown(model)}: {shown(part)} names no expert", "model", "invalid_value")
        if name in found:
            raise Problem(400, f"model {shown(model)} names {shown(name)} twice", "model", "invalid_value")
        found[name] = _number(weight.strip(), name) if times else 1.0
    _check(found, known, "model", served)
    return found


def _parts(model: str) -> list[str]:
    parts: list[str] = []
    for part in model.split("+"):
        if parts and OPEN_EXPONENT.match(parts[-1]):
            parts[-1] += f"+{part}"
        else:
            parts.append(part)
    return parts


def _number(text: str, name: str) -> float:
    try:
        weight = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        message = f"model: the weight of {shown(name)} is {shown(text)}, must be a finite number: code*0.7+chat*0.3"
        raise Problem(400, message, "model", "invalid_value")
    return weight


def _check(weights: Mapping[str, float], known: Collection[str], field: str, served: str) -> None:
    for name in weights:
        if name not in known:
            raise _unknown(name, known, field, served)


def _unknown(name: str, known: Collection[str], field: str, served: str) -> Problem:
    what = "expert" if field == "experts" else "model or expert"
    allowed = "no experts can be weighed here, a router decides alone"
    if known:
        allowed = f"the experts are {shown(', '.join(sorted(known)), longest=LONGEST_REASON)}"
    message = f"no {what} {shown(name)}; {allowed}; the model is {served}"
    return Problem(404, message, field, "model_not_found")
