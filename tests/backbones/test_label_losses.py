"""Losses at the labels of whole models: every family against the logits of all tokens, then what stands in the way."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, Qwen3ForCausalLM

import lmoe
from lmoe.backbones.checkpointing import recompute_activations
from lmoe.backbones.head import is_plain_linear, logit_maps
from lmoe.backbones.label_losses import LabelLosses
from lmoe.injection.tracing import adapters_off
from lmoe.ops import log_probabilities
from lmoe.ops.log_probabilities import token_losses
from tests.injection.tiny_injected import randomly, tiny_injected, traced
from tests.peft_experts import three
from tests.reference import dumb_losses
from tests.reference.large_tensors import NothingLarger
from tests.tiny_models import DENSE_FAMILIES, NATIVE_FAMILIES, VOCAB, tiny_model, tokens

VARIANTS: dict[str, dict] = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 0.25},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gemma4_text": {"final_logit_softcapping": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 2.0},
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
}
CASES = [
    *((family, {}) for family in (*DENSE_FAMILIES, *NATIVE_FAMILIES)),
    *((family, changes) for family, changes in VARIANTS.items()),
]
ROUNDING = {"gemma4_text": 1e-5, "gemma4_moe": 1e-5, "qwen3_5_moe_text": 1e-5}
"""Of the largest entry of a gradient, where float32 itself is as far from float64, with all logits too."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of a vocabulary of 64, the last one not full."""
    monkeypatch.setattr(log_probabilities, "LOGITS_AT_ONCE", 300)


def batch() -> tuple[Tensor, Tensor]:
    """Tokens (2, 9), and what follows each of the first 8; one row has few labels, and they end early."""
    ids = tokens(2, 9)
    labels = ids[:, 1:].clone()
    labels[0, :3], labels[1, 0], labels[1, -1] = -100, -100, -100
    return ids, labels


def gradients(model: nn.Module, losses: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Of the mean over the label tokens."""
    model.zero_grad()
    (losses.sum() / (labels != -100).sum().clamp(min=1)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_like_all_logits(
    model: PreTrainedModel, *, losses_of: LabelLosses | None = None, atol: float = 1e-6, rtol: float = 1e-6
) -> LabelLosses:
    """Losses and all gradients; of a gradient rtol is of its largest entry."""
    (ids, labels), losses_of = batch(), losses_of or LabelLosses(model)
    torch.manual_seed(7)
    theirs = token_losses(model(input_ids=ids, use_cache=False).logits[:, :-1], labels)
    expected = gradients(model, theirs, labels)
    torch.manual_seed(7)
    ours = losses_of({"input_ids": ids}, labels)
    found = gradients(model, ours, labels)
    assert ours.shape == labels.shape and ours.dtype == torch.float32 and not ours[labels == -100].any()
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol)
    assert found.keys() == expected.keys() and expected
    for name, gradient in found.items():
        limit = max(atol, rtol * float(expected[name].abs().max()))
        assert (gradient - expected[name]).abs().max() <= limit, name
    return losses_of


def test_the_reference_with_a_loop_over_tokens_is_what_the_others_are_compared_with():
    model, (ids, labels) = tiny_model("gemma2"), batch()
    dumb = dumb_losses.label_losses(model, ids, labels)
    torch.testing.assert_close(dumb, token_losses(model(input_ids=ids).logits[:, :-1], labels), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(LabelLosses(model)({"input_ids": ids}, labels), dumb, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("family", "changes"), CASES, ids=[f"{f}{'+' if c else ''}" for f, c in CASES])
def test_losses_and_every_gradient_of_a_family_equal_those_of_all_logits(family, changes):
    model, rtol = tiny_model(family, **changes), ROUNDING.get(family, 1e-6)
    losses_of = assert_like_all_logits(model, rtol=rtol)
    head = model.get_output_embeddings()
    assert losses_of.all_logits_because is None and head.weight.grad.any()
    if head.weight is model.get_input_embeddings().weight:  # its gradient comes from both ends
        return
    head.requires_grad_(False)
    assert_like_all_logits(model, losses_of=losses_of, rtol=rtol)
    assert losses_of.all_logits_because is None


def test_the_families_above_have_caps_scales_biases_and_tied_heads():
    seen = {"cap": 0, "scale": 0, "bias": 0, "tied": 0}
    for family, changes in CASES:
        if family in ("gemma2", "granite", "phi", "llama", "gpt2"):
            model = tiny_model(family, **changes)
            (likeliest, *_), head = logit_maps(model.config), model.get_output_embeddings()
            seen["cap"] += likeliest.soft_cap is not None
            seen["scale"] += likeliest.scale != 1
            seen["bias"] += head.bias is not None
            seen["tied"] += head.weight is model.get_input_embeddings().weight
    assert all(seen.values()), seen


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi"])
def test_in_bfloat16_and_under_autocast_losses_stay_near_and_gradients_in_their_types(family):
    assert_like_all_logits(tiny_model(family).bfloat16(), atol=0.02, rtol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_like_all_logits(tiny_model(family), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("keep", [[], [(1, 5)], "all"])
def test_no_label_one_label_and_all_labels(keep):
    model, (ids, labels) = tiny_model(), batch()
    if keep == "all":
        labels = ids.clone()  # also of the last token
    else:
        kept = torch.full_like(labels, -100)
        for place in keep:
            kept[place] = labels[place]
        labels = kept
    ours = LabelLosses(model)({"input_ids": ids}, labels)
    theirs = token_losses(model(input_ids=ids).logits[:, : labels.shape[1]], labels)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    found, expected = gradients(model, ours, labels), gradients(model, theirs, labels)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def test_padding_and_positions_reach_the_model():
    model, (ids, labels) = tiny_model(), batch()
    mask, positions = torch.ones_like(ids), torch.arange(9).expand(2, 9) * 2
    mask[0, 7:], labels[0, 6:] = 0, -100
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    theirs = token_losses(model(**inputs).logits[:, :-1], labels)
    torch.testing.assert_close(LabelLosses(model)(inputs, labels), theirs, atol=1e-6, rtol=1e-6)
    by_embeddings = {"inputs_embeds": model.get_input_embeddings()(ids)} | {"attention_mask": mask}
    LabelLosses(model)(by_embeddings | {"position_ids": positions}, labels).sum().backward()


@pytest.mark.parametrize("router", ["top_k", "sequence", "oracle"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_training_step_of_a_mixture_gets_the_same_losses_routing_and_gradients(router, recomputed):
    model, (ids, labels) = randomly(tiny_injected(router)), batch()
    if recomputed:
        recompute_activations(model)
    losses_of, sides = LabelLosses(model), []
    for ours in (False, True):
        torch.manual_seed(5)
        with traced(model, torch.ones_like(ids)) as trace:
            if ours:
                losses = losses_of({"input_ids": ids}, labels)
            else:
                losses = token_losses(model(input_ids=ids, use_cache=False).logits[:, :-1], labels)
            found = gradients(model, losses + trace.auxiliary_loss() / labels.numel(), labels)
            sides.append((losses.detach(), found, trace.loads()))
    assert losses_of.all_logits_because is None
    (theirs, expected, their_loads), (mine, found, my_loads) = sides
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    assert found.keys() == expected.keys() and my_loads.keys() == their_loads.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
    for site, load in my_loads.items():
        torch.testing.assert_close(load, their_loads[site], atol=0, rtol=0)


def test_the_hooks_of_a_blend_run(tmp_path):
    model, (ids, labels) = tiny_model(), batch()
    blend = lmoe.Blend(model, three(copy.deepcopy(model), tmp_path))
    for name in blend.names:
        with torch.no_grad(), blend.using({name: 2.0}):
            theirs = token_losses(model(input_ids=ids).logits[:, :-1], labels)
            torch.testing.assert_close(LabelLosses(model)({"input_ids": ids}, labels), theirs, atol=1e-6, rtol=1e-6)
    blend.close()


def test_no_tensor_holds_the_logits_of_all_tokens(monkeypatch):
    monkeypatch.setattr(log_probabilities, "LOGITS_AT_ONCE", 8192)
    model = tiny_model(vocab_size=2048)
    lmoe.inject(model, {"lora_r": 4})
    ids, losses_of, known = tokens(2, 33), LabelLosses(model.train()), list(model.parameters())
    logits = 2 * 32 * 2048
    with NothingLarger(logits // 8, known) as watch:
        losses_of({"input_ids": ids}, ids[:, 1:]).sum().backward()
    assert watch.largest == 8192 < logits // 8
    with pytest.raises(AssertionError, match="makes a tensor"), NothingLarger(logits, known):
        token_losses(model(input_ids=ids).logits[:, :-1], ids[:, 1:])


class Adapted(nn.Module):
    """A Linear with a low-rank branch, as PEFT puts one around an output layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Linear(32, 2, bias=False), nn.Linear(2, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.B(self.A(x))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def hooked(model: PreTrainedModel) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.lm_head.register_forward_hook(lambda module, args, output: output + args[0].sum(-1, keepdim=True))


def offloaded(model: PreTrainedModel) -> None:
    original = model.lm_head.forward
    model.lm_head.forward = lambda x: original(x * 2)


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        offloaded,
        lambda model: model.set_output_embeddings(Adapted(model.lm_head)),
        lambda model: parametrize.register_parametrization(model.lm_head, "weight", Halved()),
    ],
    ids=["hooked", "forward of its own", "adapted", "parametrised"],
)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_an_output_layer_that_is_more_than_a_matrix_is_called_itself_in_chunks(family, change):
    model = tiny_model(family, tie_word_embeddings=False)
    assert is_plain_linear(model.lm_head)
    change(model)
    assert not is_plain_linear(model.get_output_embeddings())
    assert assert_like_all_logits(model).all_logits_because is None


class WithPrior(Qwen3ForCausalLM):
    """Adds to the logits what nobody outside can know of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(VOCAB) / 10
        return output


class Twice(Qwen3ForCausalLM):
    """Calls its output layer for a second prediction."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, output_hidden_states=True, **kwargs)
        output.logits = output.logits + self.lm_head(output.hidden_states[0])
        return output


class Flattened(Qwen3ForCausalLM):
    """Gives its output layer tokens without rows."""

    def forward(self, *args, **kwargs):
        output = self.model(kwargs["input_ids"], use_cache=False)
        output.logits = self.lm_head(output.last_hidden_state.flatten(0, 1)).unflatten(0, (2, -1))
        return output


class Hidden(Qwen3ForCausalLM):
    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (WithPrior, "not what its output layer returns"),
        (Twice, "called 2 times"),
        (Flattened, "not with hidden states alone"),
        (Hidden, "shows no output layer"),
    ],
)
def test_a_model_that_does_something_unknown_gets_all_logits_with_the_same_random_numbers(kind, why):
    model = kind(tiny_model(attention_dropout=0.5, tie_word_embeddings=False).config).train()
    losses_of = assert_like_all_logits(model, atol=0, rtol=0)
    assert why in losses_of.all_logits_because
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_like_all_logits(model, losses_of=losses_of, atol=0, rtol=0)
    assert len(calls) == 2  # the reference and ours: what was found out is kept


def test_a_cap_that_a_config_names_and_the_code_does_not_apply_is_found_out():
    model = tiny_model()
    model.config.final_logit_softcapping, model.config.logit_scale = 1.0, 3.0
    assert assert_like_all_logits(model).all_logits_because is None


def test_zeros_and_nan_decide_nothing_and_the_next_forward_does():
    capped, (ids, labels) = tiny_model("gemma2", final_logit_softcapping=2.0, tie_word_embeddings=False), batch()
    weight = capped.lm_head.weight.detach().clone()
    losses_of = LabelLosses(capped)
    for spoil in (nn.init.zeros_, lambda w: nn.init.constant_(w, float("nan"))):
        spoil(capped.lm_head.weight)
        losses_of({"input_ids": ids}, labels)
        assert losses_of.all_logits_because is None
    capped.lm_head.weight.data.copy_(weight)
    assert_like_all_logits(capped, losses_of=losses_of)


@pytest.mark.parametrize("kind", [None, WithPrior])
def test_how_far_adapters_move_the_logits_needs_the_logits_of_a_few_tokens_at_a_time(kind):
    model, (ids, _) = tiny_injected(), batch()
    if kind is not None:
        model.__class__ = kind
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 5:] = False
    with torch.no_grad():
        with adapters_off(model):
            base = model(input_ids=ids).logits
        expected = float((model(input_ids=ids).logits - base)[mask].square().mean())
    losses_of = LabelLosses(model)
    found = losses_of.mean_square_change({"input_ids": ids}, mask, lambda: adapters_off(model))
    assert expected > 0.01 and found == pytest.approx(expected, rel=1e-5)
    assert (losses_of.all_logits_because is None) == (kind is None)


def test_without_gradients_losses_have_no_graph():
    model, (ids, labels) = tiny_model(), batch()
    with torch.no_grad():
        losses = LabelLosses(model)({"input_ids": ids}, labels)
    assert losses.grad_fn is None and losses.any()
