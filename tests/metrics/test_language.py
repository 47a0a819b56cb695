"""Loss by domain: sums over tokens, not means of means."""

import pytest
import torch

from lmoe.metrics.language import DomainLoss

DOMAINS = ["code", "chat", "empty"]


def batch(seed: int, rows: int = 3, length: int = 4):
    """(losses, counted, domain ids); about a third of the tokens carry no label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    return (
        torch.rand(rows, length, generator=generator),
        labels != -100,
        torch.randint(0, 2, (rows, length), generator=generator),
    )


def test_every_label_token_weighs_the_same():
    """Code: one token of 3 nats and three of 1 make 6 / 4; chat: one of 5; all: 11 / 5. A mean of rows would differ."""
    metric = DomainLoss(DOMAINS)
    losses = torch.tensor([[3.0, 9.0, 9.0], [1.0, 1.0, 1.0], [5.0, 9.0, 9.0]])
    labels = torch.tensor([[1, -100, -100], [1, 1, 1], [1, -100, -100]])
    metric.update(losses, labels != -100, torch.tensor([[0], [0], [1]]))
    assert metric.compute() == {"loss": 11 / 5, "code/loss": 6 / 4, "chat/loss": 5.0}


def test_batches_add_up_to_one_batch():
    one, two = batch(0), batch(1)
    apart, together = DomainLoss(DOMAINS), DomainLoss(DOMAINS)
    apart.update(*one)
    apart.update(*two)
    together.update(*(torch.cat(pair) for pair in zip(one, two, strict=True)))
    assert apart.compute() == pytest.approx(together.compute())


def test_domains_without_tokens_are_left_out_and_reset_forgets():
    metric = DomainLoss(DOMAINS)
    metric.update(*batch(0))
    assert "empty/loss" not in metric.compute()
    metric.reset()
    metric.update(*batch(1))
    fresh = DomainLoss(DOMAINS)
    fresh.update(*batch(1))
    assert metric.compute() == fresh.compute()
