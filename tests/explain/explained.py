"""Texts and explanations for the tests of this folder."""

import torch

from lmoe.backbones.label_losses import LabelLosses
from lmoe.explain.explanation import ExplainedSite, ExplainedText, Explanation, TextTokens
from lmoe.explain.numbers import explained
from lmoe.explain.subjects import explained_model
from tests.tiny_models import tokens

EVIL = "<script>alert('x')</script></style>]]>--><!--\"&lt;&amp;{{ 7*7 }}{% raw %}\u202e\u2028\x1b[31m\x00\ud800"
"""What would act in HTML, in a script, in a template, or on a terminal, or is no character at all."""


def text(length: int = 7, answer_from: int = 3, *, domain: str | None = None) -> TextTokens:
    """Random tokens, the first of them a prompt."""
    ids = tokens(1, length)[0]
    return TextTokens(
        name="a text",
        ids=ids,
        texts=tuple(f"{number} " for number in ids.tolist()),
        special=(False,) * length,
        answer=torch.arange(length) >= answer_from,
        domain=domain,
    )


def numbers_of(model, of: TextTokens) -> ExplainedText:
    """All numbers of one text."""
    return explained(explained_model(model), of, LabelLosses(model))


def made_up(
    texts: tuple[str, ...], *, experts: tuple[str, ...] = ("0", "1"), name: str = "a run", domain: str | None = None
) -> Explanation:
    """An explanation of any texts with random numbers, of two layers with two sites each."""
    count, length = len(experts), len(texts)
    generator = torch.Generator().manual_seed(len(name))
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731 - short, and used here alone
    sites = tuple(
        ExplainedSite(name=f"layers.{i}.{part}", layer=i, part=part, modules=(f"layers.{i}.{part}",), experts=count)
        for i in range(2)
        for part in ("mlp.up_proj", "mlp.down_proj")
    )
    of = TextTokens(
        name=f"{name}: text",
        ids=torch.arange(length) + 10,
        texts=texts,
        special=tuple(i == 0 for i in range(length)),
        answer=torch.arange(length) >= (length + 1) // 2,
        generated=True,
        domain=domain,
    )
    mixture, base, none = -random(3, length).abs()
    mixture[0] = base[0] = none[0] = torch.nan
    changes = random(2, length, count)
    changes[:, 0] = torch.nan
    found = ExplainedText(
        tokens=of,
        mixture=mixture,
        base=base,
        none=none,
        text=changes[0],
        token=changes[1],
        weights={site.name: random(length, count).softmax(-1) for site in sites},
    )
    return Explanation(model="tiny", name=name, kind="two experts", experts=experts, sites=sites, texts=(found,))
