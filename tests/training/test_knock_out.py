"""Silencing experts: who is needed for what, found by cause."""

import pytest
import torch

import lmoe
from lmoe.injection.record import injected, mixtures
from lmoe.injection.tracing import adapters_off
from lmoe.metrics.knock_out import ALL_SITES, Silenced, specialisation_of
from lmoe.training.evaluation import knock_out
from lmoe.vocabulary import KnockOut
from tests.tiny_models import randomise, tiny_model, tokens

DOMAINS = ["code", "math"]


def planted():
    """An oracle gives code to expert 0 and math to expert 1; expert 2 is nobody's."""
    model = tiny_model()
    moe = {"router": "oracle", "domains": DOMAINS}
    lmoe.inject(model, injection={"num_experts": 3, "lora_r": 2, "attn_lora": {"enabled": False}}, moe=moe)
    randomise(model)
    ids = tokens(2, 9)

    def losses() -> dict[str, float]:
        with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=DOMAINS):
            logits = model(input_ids=ids).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        return dict(zip(DOMAINS, each.tolist(), strict=True))

    return model, losses


def test_an_expert_that_only_one_domain_needs_changes_the_loss_of_that_domain_alone():
    model, losses = planted()
    table = knock_out(model, losses(), losses, KnockOut.experts)
    assert list(table) == [Silenced(ALL_SITES, e) for e in range(3)]
    assert abs(table[Silenced(ALL_SITES, 0)]["code"]) > 1e-3
    assert table[Silenced(ALL_SITES, 0)]["math"] == 0.0
    assert table[Silenced(ALL_SITES, 1)]["code"] == 0.0
    assert abs(table[Silenced(ALL_SITES, 1)]["math"]) > 1e-3
    assert table[Silenced(ALL_SITES, 2)] == {"code": 0.0, "math": 0.0}
    assert specialisation_of(table)[Silenced(ALL_SITES, 2)] is None


def test_one_pass_is_made_for_each_silenced_expert_and_none_for_the_intact_model():
    model, losses = planted()
    intact, passes = losses(), []

    def counted() -> dict[str, float]:
        passes.append(1)
        return losses()

    knock_out(model, intact, counted, KnockOut.experts)
    assert len(passes) == 3


def test_silencing_everything_a_token_has_is_the_backbone_alone():
    model, losses = planted()
    table = knock_out(model, losses(), losses, KnockOut.experts)
    intact = losses()
    with adapters_off(model):
        bare = losses()
    for e, domain in enumerate(DOMAINS):
        change = table[Silenced(ALL_SITES, e)][domain]
        assert change == pytest.approx(bare[domain] - intact[domain], abs=1e-5)


def test_sites_are_silenced_one_at_a_time_and_nothing_stays_silenced():
    model, losses = planted()
    intact = losses()
    table = knock_out(model, losses(), losses, KnockOut.sites)
    paths = [path for path, _ in mixtures(model)]
    assert list(table) == [Silenced(path, e) for path in paths for e in range(3)]
    with injected(model).context.silence({paths[0]: 0}):
        one = losses()
    assert table[Silenced(paths[0], 0)]["code"] == pytest.approx(one["code"] - intact["code"])
    assert one["math"] == intact["math"]
    assert losses() == intact
    assert knock_out(model, losses(), losses, KnockOut.none) == {}
