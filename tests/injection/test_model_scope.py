"""moe.router_scope=model in training: one decision for all sites, as the loop over rows, turns and tokens makes it."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import lmoe
from lmoe.errors import ConfigError, InjectionError, RoutingError
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected, mixtures
from lmoe.injection.tracing import adapters_off
from tests.injection.model_scope import (
    DOMAINS,
    MODEL,
    Reference,
    Rows,
    gradients_of,
    logits_of_rows,
    model_scope,
    padded,
    projected,
)
from tests.reference.host_sync import CountHostReads
from tests.tiny_models import tiny_model

TARGETS = {"router_target": "domain", "domains": DOMAINS}

MIXED = ("pppaa", "pa", "ppppppppa", "paaaaaaa", "pppp", "ppaap")
"""Prompts of very different lengths, a text, a row that is all prompt, and one with something behind its answer."""
TURNS = ("ppaappa", "ppa", "pappappapp", "pppp", "paapapa")


def agree(model, rows: Rows, reference: Reference, *, packed=None) -> None:
    """Logits of every row, and gradients of every parameter, are those of the loop."""
    logits, _ = logits_of_rows(model, rows.batch(packed=packed))
    expected = [row.logits for row in reference.rows(rows)]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    own, wanted = gradients_of(model, projected(logits)), reference.gradients(projected(expected))
    assert wanted["router.weight"].any() and sum(bool(values.any()) for values in wanted.values()) >= 5
    for name, values in wanted.items():
        close = 1e-3 * float(values.abs().max()) + 1e-6  # sums of large parts
        torch.testing.assert_close(own[name], values, atol=close, rtol=1e-3, msg=lambda said, at=name: f"{at} {said}")


@pytest.mark.parametrize("prompt_experts", [False, True])
@pytest.mark.parametrize("packed", [None, [3, 1, 2]])
@pytest.mark.parametrize("decide", ["first", "turn"])
def test_a_training_forward_is_that_of_each_row_alone(prompt_experts, packed, decide):
    model = model_scope(moe={"prompt_experts": prompt_experts, "decide": decide})
    rows = Rows.of(*(MIXED if decide == "first" else (*TURNS, "ppa")))
    agree(model, rows, Reference.of(model), packed=packed)


@pytest.mark.parametrize("packed", [None, [2, 1]])
@pytest.mark.parametrize("prompt_experts", [False, True])
@pytest.mark.parametrize("decide", ["first", "turn"])
def test_a_plain_text_is_routed_by_its_opening_as_by_a_prompt(packed, prompt_experts, decide):
    model = model_scope(moe={"prompt_experts": prompt_experts, "decide": decide})
    texts, prompts = Rows.of("a" * 12, "ppaa", "a" * 7), Rows.of("p" * 6 + "a" * 6, "ppaa", "ppp" + "a" * 4)
    found, _ = logits_of_rows(model, texts.batch(packed=packed))
    expected, _ = logits_of_rows(model, prompts.batch(packed=packed))
    torch.testing.assert_close(found, expected)
    by_one_token, _ = logits_of_rows(model, Rows.of("p" + "a" * 11, "ppaa", "p" + "a" * 6).batch(packed=packed))
    assert not torch.allclose(by_one_token[0], expected[0])


FFN = {"strategy": "moe_expert_lora"}
OFF = {"attn_lora": {"enabled": False}}
CASES = {
    "llama": ({}, {"router_layer": 1}),
    "mistral": ({}, {"router_layer": 0, "prompt_experts": True}),
    "gpt2": ({}, {"router_layer": -3}),
    "gemma2": ({}, {"router_layer": 2}),
    "gemma3": ({}, {"router_layer": -2}),
    "gemma3_text": ({}, {"router_layer": 1, "prompt_experts": True}),
    "gpt_oss": ({"strategy": "mixture_lora", "target_keywords": ["o_proj"], **OFF}, {"prompt_experts": True}),
    "phi3": ({}, {"decide": "turn"}),
    "olmo2": ({}, {"router_layer": -2}),
    "qwen2_moe": ({}, {}),
    "mixtral": ({}, {"decide": "turn"}),
    "qwen3_moe": ({}, {"prompt_experts": True}),
    "qwen3_5_text": ({}, {"router_layer": 2}),
}


@pytest.mark.parametrize("family", CASES)
def test_every_family_is_read_where_router_layer_says(family):
    injection, moe = CASES[family]
    model, rows = model_scope(family, injection=injection, moe=moe), Rows.of(*MIXED, *TURNS[:1])
    agree(model, rows, Reference.of(model, family))


@pytest.mark.parametrize(
    ("injection", "moe"),
    [
        ({"top_k": 1}, {}),
        ({"top_k": 1}, {"scale": "unit"}),
        ({"top_k": 3}, {"scale": "raw", "temperature": 2.0}),
        ({"shared_lora_r": 2}, {}),
        ({"shared_lora_r": 2}, {"prompt_experts": True}),
        ({"shared_lora_A": True}, {}),
        ({"use_rslora": True}, {}),
        ({"strategy": "moe_expert_lora"}, {}),
        ({"strategy": "moe_expert_lora"}, {"prompt_experts": True}),
        ({"strategy": "moe_expert_lora", "top_k": 1}, {"decide": "turn", "scale": "unit"}),
        ({"strategy": "moe_expert_lora", "share_base": False}, {}),
        ({"target_keywords": ["o_proj", "up_proj"], "attn_lora": {"enabled": True, "keywords": ["k_proj"]}}, {}),
        ({"attn_lora": {"enabled": True, "use_dora": True}}, {}),
        ({}, {"backend": "grouped"}),
        ({"layer_indices": [1]}, {"router_layer": 0}),
    ],
)
def test_every_way_of_adding_experts_leaves_the_prompt_alone(injection, moe):
    model, rows = model_scope(injection=injection, moe=moe), Rows.of(*MIXED, TURNS[0])
    agree(model, rows, Reference.of(model))


# --- how a loop of one's own says what the prompt is


def labelled(rows: Rows, *, left: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """What a model gets, labels included, and the mask of the prompts."""
    ids, mask = padded(rows.ids, left=left)
    answers, _ = padded([torch.tensor(answers).long() for answers in rows.answers], left=left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    labels = ids.masked_fill(answers == 0, -100)
    prompt = (answers.cumsum(1) == 0) & mask.bool()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}, prompt


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_5_text"])
@pytest.mark.parametrize("decide", ["first", "turn"])
def test_padding_on_either_side_changes_nothing(left, family, decide):
    model = model_scope(family, moe={"decide": decide})
    rows = Rows.of(*(MIXED[:4] if decide == "first" else TURNS[:4]))
    inputs, _ = labelled(rows, left=left)
    logits = model(**inputs, use_cache=False).logits
    kept = [row[mask.bool()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)]
    reference = Reference.of(model, family)
    expected = [row.logits for row in reference.rows(rows)]
    torch.testing.assert_close(kept, expected, atol=5e-4, rtol=5e-4)
    own, wanted = gradients_of(model, projected(kept)), reference.gradients(projected(expected))
    head = float(wanted["router.weight"].abs().max())
    torch.testing.assert_close(own["router.weight"], wanted["router.weight"], atol=2e-3 * head, rtol=1e-3)


@pytest.mark.parametrize("decide", ["first", "turn"])
def test_labels_and_a_prompt_mask_and_forms_of_the_inputs_say_the_same(decide):
    """With masks of queries and keys, one row of positions for all, and embeddings in place of ids."""
    model, rows = model_scope(moe={"decide": decide}), Rows.of("ppaappa", "ppppaaa", "paapapa")
    if decide == "first":
        rows.answers[0][5:] = rows.answers[2][4:] = [True] * 3  # a mask marks nothing behind an answer
        rows.answers[0], rows.answers[2] = rows.answers[0][:7], rows.answers[2][:7]
    inputs, prompt = labelled(rows)
    ids, mask, positions, labels = inputs.values()
    if decide == "turn":
        prompt = labels == -100
    with torch.no_grad():
        expected = model(**inputs).logits
        causal = torch.ones(7, 7, dtype=torch.bool).tril().expand(3, 1, 7, 7)
        for given in (
            {"input_ids": ids},
            {"input_ids": ids, "position_ids": positions[:1]},
            {"input_ids": ids, "attention_mask": causal},
            {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask},
        ):
            torch.testing.assert_close(model(**given, labels=labels).logits, expected)
            with lmoe.trace(model, attention_mask=mask, prompt_mask=prompt):
                torch.testing.assert_close(model(**given).logits, expected)
        assert not torch.allclose(model(input_ids=ids).logits, expected)


def test_a_mask_of_whole_numbers_over_queries_and_keys_is_refused_as_by_attention():
    """Attention of torch refuses it, and the eager one adds it to the scores, which hides nothing."""
    model, rows = model_scope(), Rows.of("ppaaa", "pppaa")
    inputs, _ = labelled(rows)
    seen = torch.ones(5, 5, dtype=torch.long).tril().expand(2, 1, 5, 5)
    with pytest.raises(RoutingError, match=r"attention_mask \(2, 1, 5, 5\) holds torch.int64, .* give one of bool"):
        model(**{**inputs, "attention_mask": seen})


@pytest.mark.parametrize(("pattern", "first"), [("ppaaa", True), ("paaaa", False)])
def test_the_opening_of_a_text_is_its_prompt_though_its_first_token_has_a_label(pattern, first):
    model, rows = model_scope(), Rows.of(pattern, pattern)
    ids, expected = torch.stack(rows.ids), Reference.of(model).rows(rows)
    labels = ids if first else ids.masked_fill(torch.arange(5) == 0, -100)
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        logits = model(input_ids=ids, labels=labels).logits
    torch.testing.assert_close(logits, torch.stack([row.logits for row in expected]), atol=2e-4, rtol=2e-4)
    head_logits = trace.routing["model"].router_logits[:, 0]
    torch.testing.assert_close(head_logits, torch.stack([row.head_logits[0] for row in expected]))


def test_training_without_a_prompt_that_ends_is_refused_because_no_expert_would_learn():
    model, ids = model_scope(), Rows.of("ppp", "ppp").batch()["input_ids"]
    with pytest.raises(RoutingError, match="no expert acts, so none would learn: give the model labels, or mark"):
        model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids)
    on = model_scope(moe={"prompt_experts": True})
    on(input_ids=ids).logits.sum().backward()
    assert all(site.lora_B.grad.any() for _, site in mixtures(on))


def test_prompts_of_another_batch_are_refused():
    model, ids = model_scope(), torch.ones(2, 4, dtype=torch.long)
    with (
        lmoe.trace(model, attention_mask=torch.ones(2, 5), prompt_mask=torch.ones(2, 5)),
        pytest.raises(RoutingError, match=r"prompts of \(2, 5\) .*\(2, 4\)"),
    ):
        model(input_ids=ids)


def test_a_part_of_the_model_called_alone_says_that_it_cannot_decide():
    model = model_scope().eval()
    with pytest.raises(RoutingError, match="decides in forwards of the whole model: call it, not one of its parts"):
        model.model.layers[0].mlp(torch.randn(1, 3, 32))


@pytest.mark.parametrize("layer", [3, -4, 17])
def test_a_layer_that_the_backbone_does_not_have_is_refused(layer):
    model = tiny_model()
    said = rf"moe.router_layer is {layer}; this backbone has 2 layers: 0 \(the embeddings\) to 2, -3 to -1, or a share"
    with pytest.raises(InjectionError, match=said):
        lmoe.inject(model, {}, {**MODEL, "router_layer": layer})
    assert not hasattr(model, "lmoe_injected") and not hasattr(model, "router")


@pytest.mark.parametrize(
    ("share", "layer"),
    [("0%", "0"), ("1%", "1"), ("20%", "1"), ("25%", "2"), ("50%", "3"), ("100%", "5"), ("4 %", "1")],
)
def test_a_share_of_the_layers_is_the_layer_that_it_reaches(share, layer):
    model, same = (model_scope(moe={"router_layer": each}, num_hidden_layers=5) for each in (share, layer))
    assert injected(model).moe.router_layer == layer, "what is kept with the experts is of this backbone"
    batch = Rows.of(*MIXED).batch()
    pairs = zip(logits_of_rows(model, batch)[0], logits_of_rows(same, batch)[0], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("layer", ["", "x", "%", "1.5", "-25%", "101%", "nan%", "1%%", "null"])
def test_what_is_neither_a_layer_nor_a_share_is_refused(layer):
    with pytest.raises(ConfigError, match="moe.router_layer: got .*; allowed: a whole number .*, or a share"):
        lmoe.inject(tiny_model(), {}, {**MODEL, "router_layer": layer})


# --- the reading


@pytest.mark.parametrize(("layer", "seen"), [(0, [0, 0]), (1, [1, 0]), (-1, [1, 1])])
def test_one_reading_of_the_prompts_alone_which_goes_no_further_than_it_must(layer, seen):
    model, lengths = model_scope(moe={"router_layer": layer}), []
    for number in (0, 1):
        model.model.layers[number].mlp.register_forward_pre_hook(
            lambda _, args, n=number: lengths.append((n, args[0].shape[1], torch.is_grad_enabled()))
        )
    logits_of_rows(model, Rows.of("p" * 3 + "a" * 29, "p" * 13 + "a" * 19).batch())
    reading = [(number, 16, False) for number in (0, 1) if seen[number]]
    assert lengths == [*reading, (0, 32, True), (1, 32, True)]
    lengths.clear()
    logits_of_rows(model, Rows.of("p" * 5 + "a" * 7, "pp" + "a" * 8, "p" * 4 + "a", "pppppa").batch(packed=[3, 1]))
    reading = [(number, 16, False) for number in (0, 1) if seen[number]]  # 5 + 2 + 4 tokens, and 5
    assert lengths == [*reading, (0, 32, True), (1, 32, True)]
    lengths.clear()
    logits_of_rows(model, Rows.of("pppaa", "p" * 6 + "aa").batch())
    reading = [(number, 8, False) for number in (0, 1) if seen[number]]  # there are no more
    assert lengths == [*reading, (0, 8, True), (1, 8, True)]


def test_a_reading_that_fails_leaves_nothing_behind():
    model, batch = model_scope(), Rows.of("ppa", "paa").batch()
    expected, _ = logits_of_rows(model, batch)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of_rows(model, batch)
    hook.remove()
    route = next(site for _, site in mixtures(model)).model_route
    assert injected(model).context.call_state.forward is None and route.states.heard() is None
    torch.testing.assert_close(logits_of_rows(model, batch)[0], expected)


def test_the_answer_of_a_turn_has_the_decision_that_the_next_turn_was_read_with():
    """Also with noise on the logits: what the second reading gets of the first answer is what the answer gets."""
    model = model_scope(moe={"decide": "turn", "router_noise": 3.0})
    rows, inside = Rows.of("ppaappa"), []
    site = next(site for _, site in mixtures(model))
    site.register_forward_hook(lambda *_: inside.append(site.model_route.decision(torch.device("cpu"))))
    torch.manual_seed(3)
    logits_of_rows(model, rows.batch())
    first, second, learning = inside
    assert first is None and second.routing_weights.shape[1] == 8
    torch.testing.assert_close(second.routing_weights[:, :4], learning.routing_weights[:, :4])
    assert second.routing_weights[:, 2:4].any() and not second.routing_weights[:, 4:].any()


# --- around a forward


def test_switched_off_silenced_and_masked_experts_are_left_out_of_the_answer_alone():
    model, batch = model_scope().eval(), Rows.of("pppaa", "paaaa").batch()
    backbone, valid = tiny_model(), batch["valid_mask"]
    with torch.no_grad():
        with adapters_off(model):
            off, _ = logits_of_rows(model, batch)
        plain = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(off, [row[kept] for row, kept in zip(plain, valid, strict=True)])
        expected, trace = logits_of_rows(model, batch)
        weights = trace.routing["model"].routing_weights
        with injected(model).context.silence({"model": 1}):
            silent, trace = logits_of_rows(model, batch)
        assert not trace.routing["model"].routing_weights[..., 1].any()
        kept = torch.tensor([1.0, 0.0, 1.0])
        torch.testing.assert_close(trace.routing["model"].routing_weights, weights * kept)
        with lmoe.masked_experts(model, [1]):
            masked, trace = logits_of_rows(model, batch)
        assert trace.routing["model"].routing_weights.shape[-1] == 2
    for changed in (silent, masked):
        torch.testing.assert_close(changed[0][:3], expected[0][:3])
        assert not torch.allclose(changed[0][3:], expected[0][3:])


def test_evaluation_without_gradients_gives_the_logits_of_training_and_so_does_a_copy():
    model, batch = model_scope(), Rows.of(*MIXED).batch(packed=[3, 1, 2])
    trained, _ = logits_of_rows(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(logits_of_rows(model.eval(), batch)[0], trained)
        for name, parameter in twin.named_parameters():
            if name == "router.weight":
                parameter.mul_(-1)
        changed, _ = logits_of_rows(twin, batch)
        torch.testing.assert_close(logits_of_rows(model, batch)[0], trained)
        expected = [row.logits for row in Reference.of(twin).rows(Rows.of(*MIXED))]
    torch.testing.assert_close(changed, expected, atol=2e-4, rtol=2e-4)


def test_two_threads_decide_each_for_its_own_rows():
    model = model_scope().eval()
    rows = [Rows.of("pppppaa", "paaaaaa", seed=1), Rows.of("ppaaaaa", "ppppppa", seed=2)]
    barrier = threading.Barrier(2)

    def together_with_the_other(*_) -> None:
        barrier.wait(5)

    model.model.layers[0].register_forward_pre_hook(together_with_the_other)

    def logits(number: int) -> Tensor:
        inputs, _ = labelled(rows[number])
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(logits, (0, 1)))
    for given, found in zip(rows, together, strict=True):
        expected = torch.stack([row.logits for row in Reference.of(model).rows(given)])
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_under_bfloat16_autocast_the_head_decides_in_float32_from_what_the_base_computed():
    model, batch = model_scope(), Rows.of(*MIXED).batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits, trace = logits_of_rows(model, batch)
    routing = trace.routing["model"]
    assert routing.router_logits.dtype == routing.routing_weights.dtype == torch.float32
    exact = Reference.of(model).rows(Rows.of(*MIXED))
    found = torch.stack([row[0] for row in routing.router_logits])
    assert (found - torch.stack([row.head_logits[0] for row in exact])).abs().max() < 0.5
    assert all(gradient.isfinite().all() for gradient in gradients_of(model, projected(logits)).values())


@pytest.mark.parametrize(("decide", "packed", "asked"), [("first", None, 1), ("first", [2, 1], 1), ("turn", None, 4)])
def test_a_training_step_asks_the_device_for_the_lengths_of_the_prompts_and_nothing_else(decide, packed, asked):
    """decide=turn: also for the number of turns, of a sequence and of a row, and the length of the other reading."""
    model = model_scope(moe={"decide": decide, **TARGETS})
    batch, record = Rows.of("ppaappaa", "pppaaaaa", "paaaaaaa").batch(packed=packed), injected(model)
    inputs = {"input_ids": batch["input_ids"]} | ({"position_ids": batch["position_ids"]} if packed else {})
    by_transformers = 2 if decide == "first" else 3  # whether rows are packed, in each forward
    with (
        CountHostReads() as counted,
        batch_info(record, batch, DOMAINS),
        record.trace.recording(batch["valid_mask"], record.context.batch_info.targets) as trace,
    ):
        (model(**inputs, use_cache=False).logits.sum() + trace.auxiliary_loss()).backward()
    assert len(counted.reads) == asked + by_transformers
