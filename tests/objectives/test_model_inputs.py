"""What a model gets of a batch: no mask where right padding needs none, and the bounds of packed rows."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lmoe
from lmoe.backbones.attention import needs_mask_of_padding
from lmoe.data.pack import KEEPS_BOUNDS_FROM_FLASH, PACKS_EXACTLY
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.objectives.model_inputs import ModelInputs
from lmoe.objectives.sft import SupervisedFineTuning
from tests.injection.model_scope import DOMAINS, Rows
from tests.injection.tiny_injected import BY_PROMPT, ROUTERS, tiny_injected
from tests.reference.varlen_attention import RowByRow
from tests.tiny_models import DENSE_FAMILIES, NATIVE_FAMILIES, tiny_model

FAMILIES = DENSE_FAMILIES + NATIVE_FAMILIES
LINEAR = ("qwen3_5_text", "qwen3_5_moe_text")
ROWS = ("ppppaaa", "ppapappaaaaa", "ppppppppppaaaaaaaaaaa", "pa")
PACKED = [2, 1, 1]


def test_only_linear_attention_needs_a_mask_of_padding_on_the_right() -> None:
    assert {family for family in FAMILIES if needs_mask_of_padding(tiny_model(family))} == set(LINEAR)


def test_code_of_others_and_attention_that_looks_ahead_get_the_mask() -> None:
    model = tiny_model("llama")
    model.__class__ = type("Theirs", (type(model),), {"__module__": "transformers_modules.theirs"})
    assert needs_mask_of_padding(model)
    assert needs_mask_of_padding(tiny_model("gemma3_text", use_bidirectional_attention=True))
    model = tiny_model("qwen3")
    model.config.__dict__["model_type"] = "of_tomorrow"
    assert needs_mask_of_padding(model)


class Masked(SupervisedFineTuning):
    """Hands the mask of padding to every model."""

    def inputs(self, model: PreTrainedModel, batch: dict) -> dict:
        return super().inputs(model, batch) | {"attention_mask": batch["attention_mask"]}


def step(objective: SupervisedFineTuning, model: PreTrainedModel, batch: dict) -> tuple[Tensor, dict, dict, Tensor]:
    """Losses, gradients, the routing of valid tokens and the auxiliary loss of one step."""
    record, valid = injected(model), batch["valid_mask"]
    model.train().zero_grad()
    torch.manual_seed(3)
    with batch_info(record, batch, DOMAINS), record.trace.recording(valid) as trace:
        losses = objective.losses(model, batch)
        auxiliary = trace.auxiliary_loss()
        routing = {site: r.routing_weights.detach()[valid] for site, r in trace.routing.items()}
        loads = trace.loads() if trace.routing else {}
    (losses.values.sum() / losses.counted.sum() + auxiliary).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert torch.isfinite(losses.values).all() and gradients
    return losses.values.detach(), gradients, routing | {f"load of {s}": load for s, load in loads.items()}, auxiliary


def alike(model: PreTrainedModel, batch: dict) -> None:
    """A step without the mask beside one with it."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append("attention_mask" in inputs), with_kwargs=True
    )
    with_mask, without = (step(objective, model, batch) for objective in (Masked(), SupervisedFineTuning()))
    hook.remove()
    assert seen[-1] is False and seen[0] is True
    torch.testing.assert_close(without[0], with_mask[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(without[1:3], with_mask[1:3], strict=True):
        assert one.keys() == other.keys()
        largest = max((float(values.abs().max()) for values in other.values()), default=1.0)
        for name, values in one.items():
            torch.testing.assert_close(values, other[name], rtol=1e-5, atol=2e-6 * largest, msg=name)
    torch.testing.assert_close(without[3], with_mask[3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LINEAR])
def test_a_step_without_the_mask_is_the_step_with_it(family: str) -> None:
    """Losses, gradients, routing and auxiliary losses; windows are shorter than the rows where there are any."""
    model = tiny_model(family, **({"sliding_window": 4} if family not in ("gpt2", "gemma3") else {}))
    lmoe.inject(model, {"lora_r": 4, "lora_dropout": 0.1}, {})
    from tests.tiny_models import randomise

    randomise(model)
    alike(model, Rows.of(*ROWS).batch())


OF_MODEL = {"router_scope": "model"}
SCOPES = [
    *((router, {}) for router in ROUTERS),
    ("sequence", OF_MODEL),
    ("sequence", OF_MODEL | {"decide": "turn"}),
    ("sequence", OF_MODEL | {"prompt_experts": True}),
    ("oracle", OF_MODEL),
]


@pytest.mark.parametrize(("router", "moe"), SCOPES)
def test_routers_need_no_mask_beside_what_they_are_told(router: str, moe: dict) -> None:
    assert set(BY_PROMPT) <= set(ROUTERS)
    alike(tiny_injected(router, moe=moe), Rows.of(*ROWS).batch(domains=[0, 1, 0, 1]))


def test_the_kernel_gets_no_mask_and_says_itself_what_is_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, masks = torch.nn.functional.scaled_dot_product_attention, []

    def kernel(*args, attn_mask=None, is_causal=False, **options):
        masks.append((attn_mask is None, is_causal))
        return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    model, batch = tiny_injected(), Rows.of(*ROWS).batch()
    step(SupervisedFineTuning(), model, batch)
    assert masks == [(True, True)] * 2
    masks.clear()
    step(Masked(), model, batch)
    assert masks == [(False, False)] * 2


def rows_alone(model: PreTrainedModel, rows: Rows) -> list[Tensor]:
    """(T, V) logits of each row by itself."""
    return [model(input_ids=ids[None], use_cache=False).logits[0] for ids in rows.ids]


def rows_packed(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """The same of rows in packed sequences."""
    logits = model(**ModelInputs(model)(batch), use_cache=False).logits
    return [
        sequence[valid & (rows == number)]
        for sequence, rows, valid in zip(logits, batch["row_ids"], batch["valid_mask"], strict=True)
        for number in range(int(rows[valid].max()) + 1)
    ]


def flash_model(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, RowByRow]:
    model, kernel = tiny_model(family, **({"sliding_window": 4} if family != "gpt2" else {})), RowByRow()
    kernel.install(model, monkeypatch)
    return model, kernel


TELL_BOUNDS = sorted(
    {*(PACKS_EXACTLY & {*DENSE_FAMILIES, *NATIVE_FAMILIES}), "cohere", "phimoe", "persimmon", "gpt_bigcode"}
)


@pytest.mark.parametrize("family", TELL_BOUNDS)
def test_flash_attention_keeps_packed_rows_of_several_sequences_apart(family: str, monkeypatch) -> None:
    """Every layer gets the bounds that the batch brings, and each row has the logits that it has alone."""
    model, kernel = flash_model(family, monkeypatch)
    rows = Rows.of(*ROWS)
    batch = rows.batch(packed=PACKED)
    with torch.no_grad():
        alone = rows_alone(model, rows)
        kernel.told.clear()
        packed = rows_packed(model, batch)
    assert kernel.told and all(told == batch["row_bounds"].tolist() for told in kernel.told)
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", sorted(KEEPS_BOUNDS_FROM_FLASH))
def test_rows_leak_where_the_code_of_a_model_keeps_bounds_from_flash_attention(family: str, monkeypatch) -> None:
    """So packing is refused there, but for batches of one sequence, of which positions tell enough."""
    model, _ = flash_model(family, monkeypatch)
    rows = Rows.of(*ROWS)
    with torch.no_grad():
        leaks = []
        for packed in ([4], PACKED):
            pairs = zip(rows_packed(model, rows.batch(packed=packed)), rows_alone(model, rows), strict=True)
            leaks.append(max(float((one - other).abs().max()) for one, other in pairs) > 0.01)
    assert leaks == [False, True]


@pytest.mark.parametrize("scope", ["linear", "model"])
def test_a_step_of_packed_rows_is_the_same_by_flash_attention(scope: str, monkeypatch) -> None:
    """Losses, gradients and routing, of prompts that are read alone too."""
    moe = {"router_scope": scope}
    batch = Rows.of(*ROWS).batch(packed=PACKED)
    dense = step(SupervisedFineTuning(), tiny_injected("sequence", moe=moe), batch)
    model, kernel = tiny_injected("sequence", moe=moe), RowByRow()
    kernel.install(model, monkeypatch)
    flash = step(SupervisedFineTuning(), model, batch)
    assert None not in kernel.told
    torch.testing.assert_close(flash[0], dense[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(flash[1:3], dense[1:3], strict=True):
        assert one.keys() == other.keys()
        for name, values in one.items():
            torch.testing.assert_close(values, other[name], rtol=1e-3, atol=1e-5, msg=name)


def test_other_attention_is_told_nothing_of_bounds() -> None:
    model, batch = tiny_model(), Rows.of(*ROWS).batch(packed=PACKED)
    assert ModelInputs(model)(batch).keys() == {"input_ids", "position_ids"}
