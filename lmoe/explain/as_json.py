"""An explanation as JSON: the file beside the page, and what the page itself reads (docs/EXPLAIN.md)."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lmoe import __version__
from lmoe.explain.explanation import ExpertProfile, ExplainedText, Explanation, Profiles

SCHEMA = "lmoe.explain"
VERSION = 1
"""Raised where a key is renamed, removed or means something else; new keys leave it as it is."""
DIGITS = 6
"""Digits behind the point of every number."""
Text = Callable[[str], str]


def as_json(explanation: Explanation, text: Text = str) -> dict[str, Any]:
    """Everything in an explanation, as lists, dicts, texts and finite numbers.

    Args:
        text: what is made of texts that are not lmoe's own: tokens, names, domains.
    """
    return {"schema": SCHEMA, "version": VERSION, "lmoe": __version__, **_explanation(explanation, text)}


def _explanation(found: Explanation, text: Text) -> dict[str, Any]:
    return {
        "model": text(found.model),
        "name": text(found.name),
        "kind": text(found.kind),
        "experts": [text(name) for name in found.experts],
        "sites": [
            {
                "name": text(site.name),
                "layer": site.layer,
                "part": text(site.part),
                "modules": [text(path) for path in site.modules],
                "experts": site.experts,
            }
            for site in found.sites
        ],
        "notes": [text(note) for note in found.notes],
        "texts": [_text(one, found, text) for one in found.texts],
        "profiles": None if found.profiles is None else _profiles(found.profiles, text),
        "other": None if found.other is None else _explanation(found.other, text),
    }


def _text(found: ExplainedText, explanation: Explanation, text: Text) -> dict[str, Any]:
    tokens = found.tokens
    return {
        "name": text(tokens.name),
        "domain": None if tokens.domain is None else text(tokens.domain),
        "generated": tokens.generated,
        "cut": tokens.cut,
        "ids": tokens.ids.tolist(),
        "tokens": [text(one) for one in tokens.texts],
        "special": list(tokens.special),
        "answer": tokens.answer.tolist(),
        "mixture": numbers(found.mixture),
        "base": numbers(found.base),
        "none": numbers(found.none),
        "text": numbers(found.text),
        "token": numbers(found.token),
        "mean": numbers(found.mean_weights(len(explanation.experts))),
        "weights": [numbers(found.weights[site.name]) for site in explanation.sites],
    }


def _profiles(found: Profiles, text: Text) -> dict[str, Any]:
    return {
        "rows": text(found.rows),
        "losses": found.losses,
        "experts": [_profile(one, text) for one in found.experts],
    }


def _profile(found: ExpertProfile, text: Text) -> dict[str, Any]:
    return {
        "weight": number(found.weight),
        "by_domain": [[text(name), number(value)] for name, value in found.by_domain.items()],
        "loss_without": [[text(name), number(value)] for name, value in found.loss_without.items()],
        "tokens": [
            {
                "before": text(one.before),
                "text": text(one.text),
                "after": text(one.after),
                "domain": text(one.domain),
                "row": one.row,
                "weight": number(one.weight),
            }
            for one in found.tokens
        ],
    }


def number(value: float) -> float | None:
    """A number with DIGITS digits; None for what is no finite one."""
    return round(value, DIGITS) if math.isfinite(value) else None


def numbers(values: Tensor) -> list[Any]:
    """A tensor as nested lists; None for what is no finite number."""
    return _nested(values.tolist())


def _nested(values: Any) -> Any:
    return [_nested(value) for value in values] if isinstance(values, list) else number(values)
