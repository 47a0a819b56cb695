"""No router and no backend makes the host wait for the device, in forward, losses or backward."""

import pytest
import torch
from torch.nn.functional import one_hot

import lmoe
from lmoe.config.defaults import moe_section
from lmoe.injection.record import injected
from lmoe.rules.routers import ROUTERS
from lmoe.vocabulary import LoadBalanceType, RouterKind
from tests.injection.tiny_injected import CAN_GROUP, gradients, randomly, tiny_injected, traced
from tests.injection.tiny_injected import ROUTERS as NAMES
from tests.reference.host_sync import NoHostSync
from tests.reference.no_grouped_kernel import no_grouped_kernel
from tests.tiny_models import tiny_model, tokens


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put((x > 0,), torch.zeros(())),
        lambda x: one_hot(x.long().clamp(min=0)),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.where(x > 0),
        lambda x: x.repeat_interleave(x.long().clamp(min=1)),
    ],
)
def test_the_check_itself_catches_reading_a_value(read):
    with pytest.raises(AssertionError, match="reads a value back to the host"), NoHostSync():
        read(torch.tensor([1.0, -1.0]))


def test_the_check_itself_looks_into_the_backward():
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    x = torch.ones(2, requires_grad=True)
    with pytest.raises(AssertionError, match="_local_scalar_dense reads a value"), NoHostSync():
        Reads.apply(x).sum().backward()


def test_the_bare_backbone_reads_nothing_back_so_that_what_follows_is_ours():
    """transformers reads an attention mask (is it all ones?), so the tests leave it out."""
    model, ids = tiny_model().train(), tokens()
    with NoHostSync():
        model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize(
    ("router", "backend", "scope"),
    [
        *((name, "stacked", "linear") for name in NAMES),
        *((name, "grouped", "linear") for name in CAN_GROUP),
        *((name, backend, "block") for name in ("top_k", "sequence") for backend in ("stacked", "grouped")),
        ("relu", "stacked", "block"),
    ],
)
def test_a_training_step_reads_nothing_back(router, backend, scope):
    """With trace, every auxiliary loss, diversity, expert dropout and noise."""
    balance, balances = moe_section({"router": router}).load_balance.type, ROUTERS[RouterKind(router)].balances
    if balance is not LoadBalanceType.aux_loss_free and LoadBalanceType.aux_loss in balances:
        balance = LoadBalanceType.aux_loss  # in place of what it ships with
    coef = {"aux_loss_coef": 0.1} if balance is LoadBalanceType.aux_loss else {}
    moe = {"backend": backend, "router_scope": scope, "load_balance": {"type": balance.value, **coef}}
    model = randomly(tiny_injected(router, moe=moe, injection={"shared_lora_r": 2}))
    with NoHostSync():
        assert gradients(model, diversity=0.1)


@pytest.mark.parametrize(
    ("family", "injection", "moe"),
    [
        ("llama", {"strategy": "moe_expert_lora"}, {}),
        ("llama", {"strategy": "moe_expert_lora", "share_base": False}, {}),
        ("qwen3_moe", {"strategy": "native_moe_expert_lora"}, {}),
        ("gpt_oss", {"strategy": "native_moe_expert_lora"}, {}),
        ("llama", {"strategy": "mixture_lora"}, {"backend": "auto"}),
        ("llama", {"strategy": "mixture_lora"}, {"backend": "grouped"}),
    ],
    ids=str,
)
def test_where_torch_has_no_grouped_kernel_every_strategy_steps_without_waiting_and_alike(
    family, injection, moe, monkeypatch
):
    """As on Ampere and Ada: gradients are those of torch's own loop."""
    model, ids = tiny_model(family), tokens()
    lmoe.inject(model, {"lora_r": 4, "lora_B_std": 0.3, "lora_dropout": 0.0, **injection}, moe)

    def gradients_of_a_step():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients_of_a_step()
    no_grouped_kernel(monkeypatch)
    with NoHostSync():
        ours = gradients_of_a_step()
    assert ours.keys() == expected.keys() and len(ours) >= 6
    for name, grad in ours.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("router", NAMES)
def test_loads_and_activity_of_the_trace_read_nothing_back(router):
    model, ids = tiny_injected(router), tokens()
    with NoHostSync(), torch.no_grad(), traced(model, torch.ones_like(ids)) as trace:
        model(input_ids=ids)
        assert len(trace.loads()) == len(trace.activity()) == 6


def test_a_packed_row_of_the_sequence_router_reads_nothing_back():
    from lmoe.layers.context import PromptRows

    model, ids = tiny_injected("sequence").train(), tokens(1, 8)
    prompt = torch.zeros(1, 2, 8, dtype=torch.bool)
    prompt[0, 0, :2], prompt[0, 1, 4:6] = True, True
    rows = PromptRows(prompt, torch.tensor([[0] * 4 + [1] * 4]))
    with (
        NoHostSync(),
        lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace,
        injected(model).context.with_batch_info(rows=rows),
    ):
        (model(input_ids=ids, labels=ids).loss + trace.auxiliary_loss()).backward()
