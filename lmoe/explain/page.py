"""The page of an explanation, and the file of JSON beside it (docs/EXPLAIN.md)."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from lmoe.errors import ConfigError
from lmoe.explain.as_json import SCHEMA, as_json
from lmoe.explain.explanation import ExpertProfile, ExplainedText, Explanation, TextTokens
from lmoe.files.places import exists
from lmoe.report.html import render, says_early
from lmoe.report.tokens import visible

SCRIPTS = ("page.js", "experts.js", "explain.js")
DIFFERENCES = 20
"""Tokens of a text that are listed where two models differ."""
CONTINUED = "·"
"""Shown for a token that goes on with the character of the one before it."""


def json_place(page: Path) -> Path:
    """Where the JSON of a page may be written.

    Raises:
        ConfigError: something else is there.
    """
    path = page.with_suffix(".json")
    if exists(path) and not says_early(path, f'"schema": "{SCHEMA}"'):
        raise ConfigError(
            f"`output={page}`: {path} would be written beside it, and exists and is no explanation; name another file"
        )
    return path


def explanation_page(found: Explanation, file: str = "the JSON file beside it") -> tuple[str, str]:
    """The page, and the same as JSON, in which texts are as they are.

    Args:
        file: what the page calls the JSON.
    """
    shown = replace(found, profiles=None)  # which stand in the page itself
    page = render(
        "explain.html.jinja",
        scripts=SCRIPTS,
        data=as_json(shown, visible),
        title="What each expert does",
        found=_shown(found, file),
    )
    return page, json.dumps(as_json(found), ensure_ascii=True, allow_nan=False) + "\n"


def _shown(found: Explanation, file: str) -> dict[str, Any]:
    settings = {"model": found.model, "explained": found.name, "made of": found.kind}
    if found.other is not None:
        settings |= {"compared with": found.other.name, "made of ": found.other.kind}
    notes = [*found.notes, *(() if found.other is None else (f"{found.other.name}: {n}" for n in found.other.notes))]
    profiles = found.profiles
    return {
        "settings": {name: visible(value) for name, value in settings.items() if value},
        "notes": [visible(note) for note in dict.fromkeys(notes)],
        "name": visible(found.name or "first"),
        "other": None if found.other is None else visible(found.other.name),
        "compared": found.other is not None,
        "file": visible(file),
        "experts": [
            {
                "number": number,
                "name": visible(name),
                "profile": None if profiles is None else _profile(profiles.experts[number]),
            }
            for number, name in enumerate(found.experts)
        ],
        "profiles": None
        if profiles is None or not profiles.experts
        else {"rows": _sentence(visible(profiles.rows)), "losses": profiles.losses},
        "texts": [_text(found, number) for number in range(len(found.texts))],
    }


def _text(found: Explanation, number: int) -> dict[str, Any]:
    text = found.texts[number]
    tokens, mean = text.tokens, text.mean_weights(len(found.experts))
    top = [largest(row) for row in mean]
    answers = int(tokens.answer.sum())
    counts = f"{len(tokens):,} tokens, {answers:,} of them {'generated' if tokens.generated else 'of answers'}"
    return {
        "number": number,
        "name": visible(tokens.name),
        "domain": visible(tokens.domain or ""),
        "counts": counts + (f"; {tokens.cut:,} more were cut" if tokens.cut else ""),
        "parts": list(_parts(tokens, top, number)),
        "rows": [_row(found, text, i, top[i], mean[i]) for i in range(len(tokens))],
        "differences": [] if found.other is None else _differences(found, found.other, number),
    }


def _parts(tokens: TextTokens, top: Sequence[int | None], number: int) -> Iterator[dict[str, Any]]:
    """Prompts and answers, in their order."""
    before = None
    last = max((i for i in range(len(tokens)) if tokens.answer[i]), default=len(tokens))
    for answer, places in groupby(range(len(tokens)), key=lambda i: bool(tokens.answer[i])):
        items: list[dict[str, Any]] = []
        for i in places:
            expert = top[i]
            items.append(
                {
                    "index": i,
                    "text": shown_token(tokens, i),
                    "title": f"token {i}, id {int(tokens.ids[i])}" + ("" if expert is None else f", expert {expert}"),
                    "special": tokens.special[i],
                    "expert": expert,
                    "who": None if expert is None or expert == before else expert,
                }
            )
            before = expert
        if answer:
            name = "Generated" if tokens.generated else "Answer"
        else:
            name = "After the answer" if items[0]["index"] > last else "Prompt"
        yield {"name": name, "answer": answer, "tokens": items}


def _row(found: Explanation, text: ExplainedText, i: int, expert: int | None, mean: Tensor) -> dict[str, str]:
    return {
        "index": f"{i}",
        "text": shown_token(text.tokens, i),
        "expert": _expert(found, expert),
        "weight": "-" if expert is None else f"{float(mean[expert]):.3f}",
        "mixture": _plain(text.mixture[i]),
        "base": _plain(text.base[i]),
        "by_text": _most(found, text.text[i]),
        "by_token": _most(found, text.token[i]),
    }


def _differences(found: Explanation, other: Explanation, number: int) -> list[dict[str, str]]:
    """The tokens whose log-probabilities differ most."""
    one, two = found.texts[number], other.texts[number]
    change = (two.mixture - one.mixture).nan_to_num(0.0, 0.0, 0.0)
    places = change.abs().argsort(descending=True, stable=True)[:DIFFERENCES].tolist()
    means = one.mean_weights(len(found.experts)), two.mean_weights(len(other.experts))
    return [
        {
            "index": f"{i}",
            "text": shown_token(one.tokens, i),
            "first": _plain(one.mixture[i]),
            "other": _plain(two.mixture[i]),
            "change": signed(float(change[i])),
            "expert": _expert(found, largest(means[0][i])),
            "other_expert": _expert(other, largest(means[1][i])),
        }
        for i in places
        if change[i] != 0
    ]


def _profile(profile: ExpertProfile) -> dict[str, Any]:
    names = dict.fromkeys([*profile.by_domain, *profile.loss_without])
    return {
        "weight": f"{profile.weight:.3f}",
        "domains": [
            {
                "name": visible(name) or "(no name)",
                "weight": _number(profile.by_domain.get(name), "{:.3f}"),
                "loss": signed(profile.loss_without.get(name, math.nan)),
            }
            for name in names
        ],
        "tokens": [
            {
                "before": visible(token.before),
                "text": visible(token.text),
                "after": visible(token.after),
                "weight": f"{token.weight:.3f}",
                "domain": visible(token.domain),
            }
            for token in profile.tokens
        ],
    }


def largest(weights: Tensor) -> int | None:
    """The expert with the largest weight, the first of equal ones; None where no expert acts."""
    if not len(weights) or not bool((weights != 0).any()):
        return None
    return int(weights.abs().argmax())


def shown_token(tokens: TextTokens, i: int) -> str:
    """A token as a reader sees it."""
    return visible(tokens.texts[i]) or CONTINUED


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign; - for what is no finite one."""
    if not math.isfinite(value):
        return "-"
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("−" if value < 0 else "+") + text


def _most(found: Explanation, changes: Tensor) -> str:
    """The expert that changes a token most, and by how much."""
    known = changes.nan_to_num(0.0, 0.0, 0.0)
    if not len(known) or not bool((known != 0).any()):
        return "-"
    expert = int(known.abs().argmax())
    return f"{_expert(found, expert)}: {signed(float(known[expert]))}"


def _expert(found: Explanation, expert: int | None) -> str:
    """An expert by its number, and its name where it has one."""
    if expert is None:
        return "-"
    name = visible(found.experts[expert])
    return f"{expert}" if name == f"{expert}" else f"{expert} {name}"


def _plain(value: Tensor) -> str:
    return _number(float(value), "{:.3f}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value).replace("-", "−")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
