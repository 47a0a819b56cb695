"""Routers that are told of their tokens: sequence, one decision a prompt; oracle, the expert of a domain."""

import copy

import pytest
import torch
from torch import Tensor

import lmoe
from lmoe.errors import ConfigError, RoutingError
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import domain
from lmoe.layers.context import PromptRows
from tests.injection.tiny_injected import DOMAINS, tiny_injected
from tests.tiny_models import tiny_model, tokens

SCOPES = pytest.mark.parametrize("scope", ["linear", "block"])


def routing_of(model, ids: Tensor, *, mask: Tensor | None = None, prompt: Tensor | None = None, **inputs):
    """Logits, and routing weights and expert indices of every router."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad(), lmoe.trace(model, attention_mask=mask, prompt_mask=prompt) as trace:
        logits = model(input_ids=ids, attention_mask=mask, **inputs).logits
    return logits, {name: (r.routing_weights, r.expert_indices) for name, r in trace.routing.items()}


def first(ids: Tensor, count: int) -> Tensor:
    """(B, T) bool: the first tokens."""
    return (torch.arange(ids.shape[1]) < count).expand(ids.shape)


# --- sequence


@SCOPES
def test_all_tokens_of_a_row_share_one_decision_and_rows_have_their_own(scope):
    model, ids = tiny_injected("sequence", moe={"router_scope": scope}), tokens(4, 7)
    _, routing = routing_of(model, ids)
    assert len(routing) == (6 if scope == "linear" else 2)
    for weights, indices in routing.values():
        assert torch.equal(weights, weights[:, :1].expand_as(weights))
        assert torch.equal(indices, indices[:, :1].expand_as(indices))
    weights = next(iter(routing.values()))[0]
    assert len({tuple(row.tolist()) for row in weights[:, 0]}) == 4


def test_the_decision_is_made_from_the_mean_of_the_prompt_and_nothing_after_it():
    model, ids, seen = tiny_injected("sequence"), tokens(2, 7), []
    model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    _, routing = routing_of(model, ids, prompt=first(ids, 3))
    router = model.model.layers[0].mlp.gate_proj.router
    for b in range(2):
        mean = (seen[0][b, 0] + seen[0][b, 1] + seen[0][b, 2]) / 3
        probs = torch.softmax(torch.stack([row @ mean for row in router.weight]), 0)
        best = probs.argsort(descending=True)[:2]
        weights = routing["model.layers.0.mlp.gate_proj"][0][b, 0]
        torch.testing.assert_close(weights[best], probs[best] / probs[best].sum())
    other = ids.clone()
    other[:, 3:] = tokens(2, 7, seed=9)[:, 3:]
    changed = routing_of(model, other, prompt=first(ids, 3))[1]
    torch.testing.assert_close({k: v[0] for k, v in changed.items()}, {k: v[0] for k, v in routing.items()})


def test_labels_mark_the_prompt_like_a_prompt_mask():
    model, ids = tiny_injected("sequence"), tokens(2, 7)
    labels = ids.masked_fill(first(ids, 3), -100)
    by_mask, by_labels = routing_of(model, ids, prompt=first(ids, 3)), routing_of(model, ids, labels=labels)
    torch.testing.assert_close(by_labels, by_mask)
    assert not torch.allclose(by_mask[0], routing_of(model, ids)[0])


@SCOPES
def test_packed_rows_route_and_answer_like_separate_rows(scope):
    """Two rows of 4 and 5 tokens in one sequence; attention is kept apart by a mask."""
    model, lengths, prompts = tiny_injected("sequence", moe={"router_scope": scope}), (4, 5), (2, 3)
    parts = [tokens(1, length, seed=length) for length in lengths]
    packed = torch.cat(parts, 1)
    row_ids = torch.tensor([[0] * 4 + [1] * 5])
    prompt = torch.stack([(row_ids[0] == row) & (place_in_row(row_ids) < prompts[row]) for row in (0, 1)])[None]
    apart = (row_ids[0][:, None] == row_ids[0][None]) & torch.ones(9, 9).tril().bool()
    with (
        torch.no_grad(),
        lmoe.trace(model, attention_mask=torch.ones_like(packed)) as trace,
        injected(model).context.with_batch_info(rows=PromptRows(prompt, row_ids)),
    ):
        together = model(
            input_ids=packed, attention_mask=apart[None, None], position_ids=place_in_row(row_ids)[None]
        ).logits
    kept, at = {name: routing.routing_weights for name, routing in trace.routing.items()}, 0
    for part, length, count in zip(parts, lengths, prompts, strict=True):
        logits, routing = routing_of(model, part, prompt=first(part, count))
        torch.testing.assert_close(together[:, at : at + length], logits, atol=1e-4, rtol=1e-4)
        for name, (weights, _) in routing.items():
            torch.testing.assert_close(kept[name][:, at : at + length], weights)
        at += length


def place_in_row(row_ids: Tensor) -> Tensor:
    """(T,) position of each token in its row."""
    return torch.cat([torch.arange(int((row_ids == row).sum())) for row in row_ids.unique().tolist()])


@SCOPES
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_gives_the_tokens_and_the_routing_of_full_forwards(scope, use_cache):
    """Greedy: each next token is that of a forward without cache, whose prompt mask marks the prompt."""
    model, ids = tiny_injected("sequence", moe={"router_scope": scope}), tokens(3, 5)
    steps: list[dict[str, Tensor]] = []
    record = injected(model)
    mask = torch.ones_like(ids)
    if use_cache:
        with record.trace.recording(mask):
            hook = model.register_forward_hook(
                lambda *_: steps.append({n: r.routing_weights[:, -1] for n, r in record.trace.routing.items()})
            )
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
            )
            hook.remove()
    else:  # nothing but the mask tells prompt from answer
        out = ids
        for _ in range(6):
            logits, _ = routing_of(model, out, prompt=first(out, 5))
            out = torch.cat([out, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert out.shape == (3, 11)
    logits, routing = routing_of(model, out, prompt=first(out, 5))
    assert torch.equal(logits[:, 4:-1].argmax(-1), out[:, 5:])
    for step in steps:
        torch.testing.assert_close(step, {name: weights[:, -1] for name, (weights, _) in routing.items()})
    assert len(steps) == (6 if use_cache else 0)


def test_a_second_generation_forgets_the_decision_of_the_first():
    model, one, two = tiny_injected("sequence"), tokens(2, 5), tokens(2, 5, seed=8)
    alone = generated(model, two)
    generated(model, one)
    assert torch.equal(generated(model, two), alone)


def generated(model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, 6) greedy answer."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    return out[:, ids.shape[1] :]


@SCOPES
def test_left_padding_changes_neither_routing_nor_answer(scope):
    model, ids = tiny_injected("sequence", moe={"router_scope": scope}), tokens(2, 5)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain, kept = routing_of(model, ids), routing_of(model, padded, mask=mask, position_ids=positions)
    torch.testing.assert_close(kept[0][:, 3:], plain[0], atol=1e-4, rtol=1e-4)
    for name, (weights, _) in plain[1].items():
        torch.testing.assert_close(kept[1][name][0][:, 3:], weights, atol=1e-4, rtol=1e-4)
    assert torch.equal(generated(model, padded, mask), generated(model, ids))


def test_a_decode_without_its_prefill_says_so():
    """The cache was filled on another model, by other sequences, or is cut inside the prompt."""
    model, ids = tiny_injected("sequence"), tokens(3, 5)
    with torch.no_grad():
        foreign = tiny_model()(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(RoutingError, match="has no decision for these 3 sequences at .*been filled by a forward"):
            model(input_ids=ids[:, :1], past_key_values=foreign)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        two, short = copy.deepcopy(cache), copy.deepcopy(cache)
        two.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(RoutingError, match="has no decision for these 2 sequences"):
            model(input_ids=ids[:2, :1], past_key_values=two)
        with lmoe.masked_experts(model, [0]), pytest.raises(RoutingError, match="with the same experts"):
            model(input_ids=ids[:, :1], past_key_values=cache)
        short.crop(-2)
        with pytest.raises(RoutingError, match="cut to 3 tokens.*from the first 5"):
            model(input_ids=ids[:, :1], past_key_values=short)


def test_a_part_of_the_model_called_alone_says_what_is_missing():
    model = tiny_injected("sequence")
    with pytest.raises(RoutingError, match="does not know the prompts of the .*call the whole model"):
        model.model.layers[0].mlp(torch.randn(1, 3, 32))
    with pytest.raises(RoutingError, match=r"needs \(B, T, D\) hidden states"):
        model.model.layers[0].mlp(torch.randn(3, 32))


@SCOPES
def test_the_first_token_of_a_text_is_its_prompt_though_it_carries_a_label(scope):
    model, ids = tiny_injected("sequence", moe={"router_scope": scope}), tokens(2, 5)
    _, labelled = routing_of(model, ids, labels=ids)
    _, told = routing_of(model, ids, prompt=first(ids, 1))
    assert labelled.keys() == told.keys()
    for name, (weights, _) in labelled.items():
        torch.testing.assert_close(weights, told[name][0], rtol=0, atol=0)


# --- oracle


def test_the_oracle_takes_the_expert_of_each_rows_domain():
    model, ids = tiny_injected("oracle"), tokens(3, 5)
    names = ["prose", "maths", "prose"]
    with torch.no_grad(), lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=names) as trace:
        logits = model(input_ids=ids).logits
    for routing in trace.routing.values():
        assert routing.expert_indices is not None
        assert routing.expert_indices[..., 0].tolist() == [[DOMAINS.index(name)] * 5 for name in names]
    for row, name in enumerate(names):
        with torch.no_grad(), domain(model, name):
            torch.testing.assert_close(model(input_ids=ids[row : row + 1]).logits, logits[row : row + 1])
    assert len(trace.routing) == 6


def test_a_domain_holds_for_a_whole_generation_and_changes_it():
    model, ids = tiny_injected("oracle"), tokens(2, 5)
    answers = {}
    for name in DOMAINS:
        with domain(model, name):
            answers[name] = generated(model, ids)
            full = torch.cat([ids, answers[name]], 1)
            with torch.no_grad():
                assert torch.equal(model(input_ids=full).logits[:, 4:-1].argmax(-1), answers[name])
    assert not torch.equal(answers["maths"], answers["prose"])


def test_a_missing_domain_says_how_to_name_it():
    model, ids = tiny_injected("oracle"), tokens()
    with pytest.raises(RoutingError, match=r"does not know the domain of these tokens.*`lmoe.trace\(.*domains="):
        model(input_ids=ids)
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)), pytest.raises(RoutingError, match="does not know"):
        model(input_ids=ids)
    with domain(model, "maths"):
        model(input_ids=ids)
    with pytest.raises(RoutingError, match="does not know"):
        model(input_ids=ids)


def test_an_unknown_domain_is_refused_with_the_known_ones():
    model, ids = tiny_injected("oracle"), tokens()
    known = r"no expert for the domain 'law'; it has \['maths', 'prose'\]"
    with pytest.raises(RoutingError, match=known), domain(model, "law"):
        pass
    with (
        pytest.raises(RoutingError, match=known),
        lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=["maths", "law"]),
    ):
        pass


def test_the_oracle_takes_one_domain_a_row():
    model, ids = tiny_injected("oracle"), tokens(3, 5)
    with (
        pytest.raises(RoutingError, match="domains"),
        lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=["maths", "prose"]),
    ):
        model(input_ids=ids)


def test_domains_for_another_router_are_refused():
    model, ids = tiny_injected("top_k"), tokens()
    with (
        pytest.raises(RoutingError, match="domains are for moe.router=oracle; this model has moe.router=top_k"),
        lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=["maths", "maths"]),
    ):
        pass


def test_a_prompt_mask_for_another_router_is_refused():
    """A setting that changes nothing is an error."""
    model, ids = tiny_injected("top_k"), tokens()
    with (
        pytest.raises(RoutingError, match="prompt_mask"),
        lmoe.trace(model, attention_mask=torch.ones_like(ids), prompt_mask=first(ids, 2)),
    ):
        pass


def test_the_oracle_needs_an_expert_for_each_domain():
    with pytest.raises(ConfigError, match="domains"):
        lmoe.inject(tiny_model(), {"num_experts": 2}, {"router": "oracle", "domains": ["a", "b", "c"]})


def test_domain_ids_of_a_batch_go_by_their_names_whatever_the_order_of_the_experts():
    model = tiny_injected("oracle")
    record = injected(model)
    valid = torch.tensor([[True, True], [True, False]])
    batch = {"domain_ids": torch.tensor([[0, 0], [1, 0]]), "valid_mask": valid}
    for names, experts in ((DOMAINS, [0, 1]), (DOMAINS[::-1], [1, 0])):
        with batch_info(record, batch, names):
            assert record.context.batch_info.expert_of_token[valid].tolist() == [experts[0], *experts]
    with pytest.raises(RoutingError, match="no expert for the domain 'law'"):
        batch_info(record, batch, ["maths", "law"])


@pytest.mark.parametrize("scope", ["linear", "model"])
def test_a_prompt_mask_of_other_tokens_is_refused_with_both_sizes(scope):
    model, ids = tiny_injected("sequence", moe={"router_scope": scope}), tokens(2, 5)
    mask = torch.ones(2, 7)
    with (
        pytest.raises(RoutingError, match=r"the prompts of \(2, 7\) rows and tokens, and it has \(2, 5\): give lmoe"),
        lmoe.trace(model, attention_mask=mask, prompt_mask=mask),
    ):
        model(ids)
