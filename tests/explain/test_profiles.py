"""What experts do on validation rows, beside sums by hand."""

from dataclasses import replace

import pytest
import torch

from lmoe.backbones.label_losses import LabelLosses
from lmoe.explain.numbers import log_probabilities
from lmoe.explain.profiles import profiles_of
from lmoe.explain.subjects import explained_model
from tests.explain.explained import numbers_of, text
from tests.injection.tiny_injected import tiny_injected


def test_weights_losses_and_tokens_are_those_of_the_texts() -> None:
    model = tiny_injected()
    texts = [text(7, domain="a"), text(9, 5, domain="b"), replace(text(6, 2, domain="b"), special=(True,) * 6)]
    subject, losses = explained_model(model), LabelLosses(model)
    found = profiles_of(subject, texts, losses, rows="three texts")
    explained = [numbers_of(model, one) for one in texts]
    means = [one.mean_weights(4) for one in explained]
    for expert, profile in enumerate(found.experts):
        assert profile.weight == pytest.approx(float(torch.cat(means)[:, expert].mean()))
        assert profile.by_domain["b"] == pytest.approx(float(torch.cat(means[1:])[:, expert].mean()))
        change = torch.cat([-one.text[one.tokens.answer, expert] for one in explained[1:]]).mean()
        assert profile.loss_without["b"] == pytest.approx(float(change), abs=1e-5)
        weights = [token.weight for token in profile.tokens]
        assert weights == sorted(weights, reverse=True) and {token.row for token in profile.tokens} <= {0, 1}
        assert weights[0] == pytest.approx(float(torch.cat(means[:2])[:, expert].max()))
        first = profile.tokens[0]
        place = int(means[first.row][:, expert].argmax())
        own = texts[first.row].texts
        assert (first.text, first.after) == (own[place], "".join(own[place + 1 : place + 5]))
    assert found.losses == "measured on these rows"
    known = {expert: {"a": 0.25} for expert in range(4)}
    assert profiles_of(subject, texts, losses, rows="", known=known).experts[2].loss_without == {"a": 0.25}
    before = log_probabilities(subject, texts[0], losses)
    torch.testing.assert_close(before, explained[0].mixture, equal_nan=True)
