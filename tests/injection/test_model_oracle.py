"""moe=oracle with one decision for all sites: the expert of the domain, on prompts too or only on what follows them."""

import pytest
import torch

import lmoe
from lmoe.errors import ConfigError, RoutingError
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off, domain
from tests.injection.tiny_injected import DOMAINS, tiny_injected
from tests.tiny_models import tiny_model, tokens

PROMPT = 3


def model_oracle(*, prompt_experts: bool):
    return tiny_injected("oracle", moe={"router_scope": "model", "prompt_experts": prompt_experts})


def labelled(ids):
    return ids.masked_fill(torch.arange(ids.shape[1]) < PROMPT, -100)


@torch.no_grad()
def test_on_prompts_too_it_is_the_oracle_of_each_linear():
    ids, names = tokens(3, 6), [DOMAINS[0], DOMAINS[1], DOMAINS[0]]
    everywhere, each = model_oracle(prompt_experts=True), tiny_injected("oracle")
    with domain(everywhere, names), domain(each, names):
        found = everywhere(input_ids=ids, labels=labelled(ids)).logits
        torch.testing.assert_close(found, each(input_ids=ids).logits, rtol=0, atol=0)


@torch.no_grad()
def test_off_the_prompt_stays_that_of_the_base_with_attention_lora_and_answers_do_not():
    ids, name = tokens(2, 6), DOMAINS[1]
    model = tiny_injected(
        "oracle", injection={"attn_lora": {"enabled": False}}, moe={"router_scope": "model", "prompt_experts": False}
    )
    with adapters_off(model):
        base = model(input_ids=ids).logits
    with domain(model, name):
        found = model(input_ids=ids, labels=labelled(ids)).logits
    torch.testing.assert_close(found[:, :PROMPT], base[:, :PROMPT], rtol=0, atol=1e-6)
    assert (found[:, PROMPT:] - base[:, PROMPT:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("prompt_experts", [False, True])
def test_a_kv_cache_keeps_the_decision(prompt_experts):
    model, ids = model_oracle(prompt_experts=prompt_experts), tokens(2, 6)
    with domain(model, DOMAINS[1]):
        whole = model(input_ids=ids, labels=labelled(ids)).logits
        prompt = model(input_ids=ids[:, :PROMPT], use_cache=True)
        rest = model(input_ids=ids[:, PROMPT:], past_key_values=prompt.past_key_values).logits
    torch.testing.assert_close(torch.cat([prompt.logits, rest], 1), whole, rtol=1e-4, atol=1e-5)


def test_it_trains_the_experts_of_the_domain_alone():
    model, ids = model_oracle(prompt_experts=False).train(), tokens(2, 6)
    mask = torch.ones_like(ids)
    with lmoe.trace(model, attention_mask=mask, domains=[DOMAINS[1], DOMAINS[1]]):
        model(input_ids=ids, labels=labelled(ids)).loss.backward()
    stacked = {n: p.grad for n, p in model.named_parameters() if n.endswith("lora_B") and p.dim() == 3}
    assert stacked and all(grad is not None for grad in stacked.values())
    reached = torch.stack([grad.abs().sum((1, 2)) > 0 for grad in stacked.values()]).any(0).tolist()  # type: ignore[union-attr]
    assert [e for e, on in enumerate(reached) if on] == [1]


def test_it_asks_for_the_domain_and_has_no_use_for_what_a_reading_needs():
    model, ids = model_oracle(prompt_experts=False), tokens(1, 4)
    with pytest.raises(RoutingError, match="does not know the domain"):
        model(input_ids=ids)
    for key, value in (("router_layer", 0), ("decide", "turn")):
        moe = {"router": "oracle", "domains": DOMAINS, "router_scope": "model", key: value}
        with pytest.raises(ConfigError, match=f"moe.{key} has no effect with moe.router=oracle, which reads no prompt"):
            lmoe.inject(tiny_model(), {}, moe)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["linear", "model"])
def test_a_batch_decides_by_the_rows_whatever_the_domain_that_padding_is_given(scope):
    """Padding has the id of the first domain, whose expert is the last one here."""
    model, ids, names = tiny_injected("oracle", moe={"router_scope": scope}), tokens(1, 6), DOMAINS[::-1]
    record, valid = injected(model), torch.tensor([[True] * 4 + [False] * 2])
    row_ids = torch.zeros_like(ids)
    prompt = (torch.arange(6) < PROMPT) & valid
    batch = {"domain_ids": valid.long(), "valid_mask": valid, "row_ids": row_ids, "prompt_mask": prompt.unsqueeze(1)}
    with domain(model, names[1]):
        expected = model(input_ids=ids[:, :4], labels=labelled(ids[:, :4])).logits
    with batch_info(record, batch, names):
        found = model(input_ids=ids, attention_mask=valid.long(), labels=labelled(ids)).logits[:, :4]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["linear", "model"])
@pytest.mark.parametrize("masked_first", [False, True])
def test_masked_experts_leave_each_domain_its_own(scope, masked_first):
    """Expert 0 of `maths` is left out, so that the one of `prose`, 1, becomes 0."""
    model, ids = tiny_injected("oracle", moe={"router_scope": scope}), tokens(2, 6)
    with domain(model, "prose"):
        expected = model(input_ids=ids, labels=labelled(ids)).logits
    blocks = [lambda: lmoe.masked_experts(model, [0]), lambda: domain(model, "prose")]
    first, second = blocks if masked_first else blocks[::-1]
    with first(), second():
        torch.testing.assert_close(model(input_ids=ids, labels=labelled(ids)).logits, expected, rtol=0, atol=0)
        with (
            lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=["prose", "maths"]),
            pytest.raises(RoutingError, match="masked_experts leaves out expert 0; leave the rows of this domain"),
        ):
            model(input_ids=ids, labels=labelled(ids))
