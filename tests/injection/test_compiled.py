"""Compiled decoder layers: the losses, gradients and traces of layers that are not, in one graph without a break."""

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import lmoe
from lmoe.errors import BackboneError
from lmoe.injection.compiled import compile_layers
from lmoe.injection.record import Injected, injected
from lmoe.layers import compiled_forward
from lmoe.training.handoff import set_fades
from lmoe.vocabulary import Role
from tests.tiny_models import randomise, tiny_model, tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore::FutureWarning:torch",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # read by the compiler itself
)

DOMAINS = ["code", "math", "chat"]
"""Of the three rows of each batch."""
LENGTHS = (9, 12, 7)


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch) -> Iterator[None]:
    """Graphs are looked at, and run operator by operator: making code of each would take minutes."""
    monkeypatch.setattr(compiled_forward, "BACKEND", "eager")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@dataclass(frozen=True, kw_only=True)
class Case:
    """An injected model, and what each step changes before its forward.

    Args:
        injection, moe: sections; one site in each of two layers, and three experts.
        family: of the base.
        told: facts about the batch that its routers read: domains, prompts.
        turn: dials, by the number of the step.
    """

    injection: dict = field(default_factory=dict)
    moe: dict = field(default_factory=dict)
    family: str = "qwen3"
    told: tuple[str, ...] = ()
    turn: Callable[[Injected, PreTrainedModel, int], None] = lambda record, model, step: None

    def model(self) -> PreTrainedModel:
        settings = {"lora_r": 4} if self.family == "qwen3_moe" else {"lora_r": 4, "target_keywords": ["down_proj"]}
        strategy = self.injection.get("strategy", "mixture_lora")
        if strategy in ("mixture_lora", "moe_expert_lora"):
            settings["num_experts"] = 3
        model = tiny_model(self.family)
        lmoe.inject(model, injection=settings | self.injection, moe=self.moe)
        randomise(model)
        return model.train()


def steps(case: Case, model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS) -> list[tuple[Tensor, dict, dict]]:
    """Loss, loads of the experts and gradients of a step for each length."""
    record, found = injected(model), []
    for step, length in enumerate(lengths):
        case.turn(record, model, step)
        torch.manual_seed(step)
        ids = tokens(3, length, seed=step)
        prompt = torch.arange(length).expand(3, -1) < 4
        told = {"domains": DOMAINS, "prompt_mask": prompt}
        with lmoe.trace(model, attention_mask=torch.ones_like(ids), **{name: told[name] for name in case.told}) as seen:
            logits = model(input_ids=ids, use_cache=False).logits
            loss = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).mean()
            if record.plan.routers:
                loss = loss + seen.auxiliary_loss()
        loads = seen.loads() if record.plan.routers else {}
        seen.clear()
        loss.backward()
        found.append((loss.detach(), loads, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    return found


def graphs() -> int:
    """Graphs that were compiled so far."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def annealed(record: Injected, model: PreTrainedModel, step: int) -> None:
    context = record.context
    context.temperature, context.router_noise = 2 - 0.5 * step, 0.3 - 0.1 * step
    context.moving_temperature = torch.tensor(context.temperature)
    context.moving_router_noise = torch.tensor(context.router_noise)


def handed_over(record: Injected, model: PreTrainedModel, step: int) -> None:
    set_fades(model, {Role.lora: {None: 0.8 - 0.3 * step}}, as_tensors=True)


def by_target(record: Injected, model: PreTrainedModel, step: int) -> None:
    record.context.by_target = True


TAUGHT = {"router_target": "domain", "domains": DOMAINS}
BY_PROMPT = {"router": "sequence", "router_scope": "model"}
OF_FFN = {"strategy": "moe_expert_lora"}
CASES = {
    "one LoRA": Case(injection={"strategy": "dense_lora"}),
    "one LoRA that fades": Case(injection={"strategy": "dense_lora"}, turn=handed_over),
    "top_k": Case(),
    "top_k that fades": Case(turn=handed_over),
    "top_k that is annealed": Case(turn=annealed),
    "top_k of a block": Case(moe={"router_scope": "block"}),
    "top_k with a selection bias": Case(moe={"load_balance": {"type": "aux_loss_free", "bias_update_rate": 0.01}}),
    "all dropouts": Case(injection={"lora_dropout": 0.2}, moe={"expert_dropout": 0.3, "router_noise": 0.1}),
    "noisy_top_k": Case(moe={"router": "noisy_top_k"}),
    "sigmoid": Case(moe={"router": "sigmoid"}),
    "soft": Case(moe={"router": "soft"}),
    "top_p": Case(moe={"router": "top_p"}),
    "relu": Case(moe={"router": "relu"}),
    "uniform": Case(moe={"router": "uniform"}),
    "random": Case(moe={"router": "random"}),
    "oracle": Case(moe={"router": "oracle", "domains": DOMAINS}, told=("domains",)),
    "prompt_hash": Case(moe={"router": "prompt_hash"}, told=("prompt_mask",)),
    "sequence": Case(moe={"router": "sequence"}, told=("prompt_mask",)),
    "sequence of the model": Case(moe=BY_PROMPT, told=("prompt_mask",)),
    "sequence of the model, each turn": Case(moe=BY_PROMPT | {"decide": "turn"}, told=("prompt_mask",)),
    "oracle of the model": Case(
        moe={"router": "oracle", "router_scope": "model", "domains": DOMAINS}, told=("domains", "prompt_mask")
    ),
    "top_k that is taught": Case(moe=TAUGHT, told=("domains",), turn=by_target),
    "sequence that is taught": Case(
        moe={"router": "sequence"} | TAUGHT, told=("domains", "prompt_mask"), turn=by_target
    ),
    "grouped": Case(moe={"backend": "grouped"}),
    "mixed factors": Case(moe={"mixing": "factors"}),
    "svd and a shared expert": Case(injection={"init_lora": "svd", "shared_lora_r": 2}),
    "experts of an FFN": Case(injection=OF_FFN),
    "experts of an FFN, soft": Case(injection=OF_FFN, moe={"router": "soft"}),
    "experts of an FFN, copies": Case(injection=OF_FFN | {"share_base": False}),
    "experts of an FFN, model": Case(injection=OF_FFN, moe=BY_PROMPT, told=("prompt_mask",)),
    "native experts": Case(injection={"strategy": "native_moe_expert_lora"}, family="qwen3_moe"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_loads_and_gradients_are_the_same_from_one_graph_for_all_layers_and_lengths(case):
    """With activations that are computed again, so that the input of the first layer has a gradient, as those of the
    others."""
    plain, compiled = case.model(), case.model()
    compile_layers(compiled, recompute=True)
    expected, found = steps(case, plain), steps(case, compiled)
    for (loss, loads, gradients), (wanted, wanted_loads, wanted_gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        assert list(loads) == list(wanted_loads)
        torch.testing.assert_close(loads, wanted_loads)
        assert gradients.keys() == wanted_gradients.keys()
        for name, gradient in wanted_gradients.items():
            torch.testing.assert_close(
                gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert graphs() == 1


@pytest.mark.parametrize("recompute", [False, True])
def test_a_backward_that_is_compiled_gives_the_same_gradients(monkeypatch, recompute):
    monkeypatch.setattr(compiled_forward, "BACKEND", "aot_eager")
    case = CASES["top_k"]
    plain, compiled = case.model(), case.model()
    compile_layers(compiled, recompute=recompute)
    expected, found = steps(case, plain), steps(case, compiled)
    for (_, _, gradients), (_, _, wanted) in zip(found, expected, strict=True):
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert graphs() == (1 if recompute else 2)  # the first layer's input has no gradient


@pytest.mark.slow
@pytest.mark.parametrize("case", ["all dropouts", "grouped", "native experts"])
def test_code_of_inductor_gives_the_same_losses_and_gradients_and_draws_the_same_noise(monkeypatch, case):
    monkeypatch.setattr(compiled_forward, "BACKEND", "inductor")
    chosen = CASES[case]
    plain, compiled = chosen.model(), chosen.model()
    compile_layers(compiled, recompute=True)
    expected, found = steps(chosen, plain), steps(chosen, compiled)
    for (loss, _, gradients), (wanted, _, wanted_gradients) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
        for name, gradient in wanted_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
    assert graphs() == 1


def test_two_forwards_before_one_backward_each_compute_again_with_their_own_prompts():
    case = CASES["sequence"]
    plain, compiled = case.model(), case.model()
    compile_layers(compiled, recompute=True)
    found = []
    for model in (plain, compiled):
        losses = []
        for last in (3, 6):
            ids = tokens(3, 9, seed=last)
            with lmoe.trace(
                model, attention_mask=torch.ones_like(ids), prompt_mask=torch.arange(9).expand(3, -1) < last
            ):
                losses.append(model(input_ids=ids, use_cache=False).logits.square().mean())
        torch.stack(losses).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_what_does_not_train_is_not_compiled_and_is_the_same_to_the_last_bit():
    case, ids = CASES["top_k"], tokens(3, 9)
    plain, compiled = case.model(), case.model()
    compile_layers(compiled, recompute=False)
    with torch.no_grad():
        assert torch.equal(compiled(ids).logits, plain(ids).logits)
    compiled.eval()
    plain.eval()
    assert torch.equal(compiled(ids).logits, plain(ids).logits)
    answers = [speak(ids, max_new_tokens=4, do_sample=False) for speak in (compiled.generate, plain.generate)]  # type: ignore[operator]
    assert torch.equal(*answers)
    assert graphs() == 0


def test_a_new_phase_compiles_once_more_and_the_old_one_is_forgotten():
    case = CASES["top_k"]
    model = case.model()
    compiler = compile_layers(model, recompute=True)
    steps(case, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("router" in name)
    compiler.begin_phase()
    found = steps(case, model)
    assert graphs() == 2
    assert all(gradients and all("router" in name for name in gradients) for _, _, gradients in found)


def test_names_of_tensors_are_those_of_a_model_that_is_not_compiled_and_a_copy_is_not_compiled():
    case, ids = CASES["top_k"], tokens(3, 9)
    model = case.model()
    names = list(model.state_dict())
    compile_layers(model, recompute=False)
    steps(case, model)
    assert list(model.state_dict()) == names
    before = graphs()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.train()(ids).logits.sum().backward()
        assert twin.get_parameter("model.layers.0.mlp.down_proj.lora_B").grad is not None
    assert graphs() == before
    assert model.get_parameter("model.layers.0.mlp.down_proj.lora_B").grad is None


def test_a_layer_with_code_that_no_compiler_takes_is_refused_in_words():
    model = CASES["top_k"].model()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    compile_layers(model, recompute=True)
    with pytest.raises(BackboneError, match=r"Qwen3DecoderLayer cannot be compiled: .*trainer\.compile=false"):
        model(tokens(3, 9))
