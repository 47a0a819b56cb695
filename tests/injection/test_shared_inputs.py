"""Which sites of a model share their input, and that nothing but its cost changes."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmoe
from lmoe.backbones.checkpointing import recompute_activations
from lmoe.injection.compiled import compile_layers
from lmoe.injection.record import injected, sites
from lmoe.injection.roles import adapter_parameters
from lmoe.layers import compiled_forward, shared_input
from tests.injection.tiny_injected import ROUTERS, WITH_LOGITS, gradients, randomly, tiny_injected
from tests.tiny_models import randomise, tiny_model, tokens

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def shared_in_float32_too(monkeypatch) -> None:
    """So that results can be compared without the rounding of bfloat16."""
    monkeypatch.setattr(shared_input, "joined_by_a_cast", lambda lora_A, dtype: True)


def groups(model: PreTrainedModel) -> set[tuple[str, ...]]:
    """Paths of the sites that share, of the first layer."""
    of_site = {id(site): path for path, site in sites(model)}
    found = {tuple(of_site[id(other)] for other in site.shared_input.sites) for site in sharing(model)}
    return {tuple(path.removeprefix("model.layers.0.") for path in group) for group in found if ".0." in group[0]}


def sharing(model: PreTrainedModel) -> list:
    return [site for _, site in sites(model) if getattr(site, "shared_input", None) is not None]


def apart(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, each of whose sites computes alone."""
    assert sharing(model)
    for site in sharing(model):
        site.shared_input = None
    return model


GATE_UP, QV = ("mlp.gate_proj", "mlp.up_proj"), ("self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize(
    ("injection", "expected"),
    [
        ({}, {GATE_UP, QV}),
        ({"attn_lora": {"enabled": False}}, {GATE_UP}),
        ({"target_keywords": ["up_proj", "down_proj"]}, {QV}),
        (
            {"strategy": "dense_lora", "target_keywords": EVERY, "attn_lora": {"enabled": False}},
            {GATE_UP, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
        ),
        ({"strategy": "moe_expert_lora"}, {QV}),
    ],
)
def test_sites_that_read_one_input_share_it(injection, expected):
    model = tiny_model()
    lmoe.inject(model, injection)
    assert groups(model) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("phi", {QV}),
        ("gemma4_text", {GATE_UP, QV}),
        ("gpt2", set()),
        ("phi3", set()),
    ],
)
def test_families_differ_in_what_reads_one_input(family, expected):
    model = tiny_model(family)
    lmoe.inject(model)
    found = groups(model)
    assert {tuple(path.split("layers.0.")[-1] for path in group) for group in found} == expected


@pytest.mark.parametrize(
    ("router", "scope"),
    [
        *((router, "linear") for router in ROUTERS),
        *((router, "block") for router in WITH_LOGITS),
        ("sequence", "block"),
    ],
)
def test_the_gradients_of_a_step_are_those_of_sites_apart(router, scope):
    """With the noise and the dropped experts of training, which are drawn in the same order."""
    found = []
    for change in (lambda model: model, apart):
        model = change(randomly(tiny_injected(router, moe={"router_scope": scope})))
        found.append(gradients(model))
        found.append({"loads": next(iter(injected(model).trace.loads().values()))})
    torch.testing.assert_close(found[:2], found[2:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("injection", "moe"),
    [
        ({"strategy": "dense_lora", "target_keywords": EVERY, "attn_lora": {"enabled": False}}, {}),
        ({"init_lora": "svd", "num_experts": 2}, {}),
        ({"shared_lora_r": 2, "lora_dropout": 0.3}, {}),
        ({}, {"router": "sequence", "router_scope": "model"}),
        ({}, {"backend": "grouped"}),
        ({"target_keywords": EVERY, "attn_lora": {"enabled": False}}, {"router_dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("recomputed", [False, True])
def test_strategies_scopes_and_recomputation_have_the_gradients_of_sites_apart(injection, moe, recomputed):
    found = []
    for change in (lambda model: model, apart):
        model = tiny_model()
        lmoe.inject(model, {"lora_r": 4, **injection}, moe)
        randomise(change(model))
        if recomputed:
            recompute_activations(model)
        found.append(step(model.train()))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        rounded = "router_dtype" in moe and name.endswith("router.weight")
        rtol = 1e-2 if rounded else 1e-4  # a step of bfloat16, in which the router computes
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=rtol)


def step(model: PreTrainedModel) -> dict[str, Tensor]:
    """Loss and gradients of two rows with a padded token; the auxiliary losses too where there are routers."""
    ids, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    torch.manual_seed(3)
    with lmoe.trace(model, attention_mask=mask) as trace:
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        if injected(model).plan.routers:
            loss = loss + trace.auxiliary_loss()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_are_one_graph_each_and_have_the_gradients_of_layers_that_are_not(monkeypatch):
    monkeypatch.setattr(compiled_forward, "BACKEND", "eager")
    torch.compiler.reset()
    expected = step(tiny_injected().train())
    model = tiny_injected().train()
    compile_layers(model, recompute=False)
    torch.testing.assert_close(step(model), expected, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_are_those_of_sites_apart_but_for_rounding(monkeypatch, base):
    """One site's decision may tip where rounding does, so every expert has a weight."""
    monkeypatch.undo()
    found = []
    for change in (lambda model: model, apart):
        model = change(tiny_injected("soft")).to(base).train()
        for _, parameter in adapter_parameters(model).items():
            parameter.data = parameter.data.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(step(model))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        assert (found[0][name] - expected).norm() <= 0.05 * expected.norm(), name


def test_answers_are_those_of_sites_apart():
    ids, found = tokens(1, 5), []
    for change in (lambda model: model, apart):
        model = change(tiny_injected(injection={"num_experts": 3}))
        found.append(model.generate(ids, max_new_tokens=6, do_sample=False))
    assert torch.equal(*found)


def test_adapters_that_are_off_leave_the_backbone_bitwise():
    model, ids = tiny_injected(), tokens()
    expected = tiny_model()(input_ids=ids).logits
    for _, site in sites(model):
        site.enabled = False
    assert torch.equal(model(input_ids=ids).logits, expected)
