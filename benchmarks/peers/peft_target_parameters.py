"""PEFT's LoRA on the fused tensors of native experts: the whole adapted weight is made in every forward."""

from functools import partial

from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from benchmarks.agreement import Factors, Read
from benchmarks.experts import Experts
from benchmarks.peers.trainee import Trainee, language_model_loss, train_in_float32

FUSED = ("gate_up_proj", "down_proj")


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """LoRA on both fused tensors; nothing else is trained."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=experts.rank,
        lora_alpha=int(experts.alpha),
        target_modules=[],
        target_parameters=[f"mlp.experts.{name}" for name in FUSED],
    )
    adapted = get_peft_model(model, config).train()
    train_in_float32(adapted)
    wrappers = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == len(FUSED) * model.config.num_hidden_layers
    assert {wrapper.num_experts for wrapper in wrappers} == {experts.num_experts}
    return Trainee(adapted, partial(language_model_loss, adapted))


def factors(module: nn.Module, read: Read) -> Factors:
    """Factors of every branch: A_e is rows e*R to (e+1)*R of one factor, B_e columns e, e+E, e+2E, ... of the other."""
    found: Factors = {}
    for path, wrapper in module.named_modules():
        if isinstance(wrapper, ParamWrapper):
            experts = path.removeprefix("base_model.model.").partition(".experts")[0] + ".experts"
            A, B = (read(factor["default"].weight) for factor in (wrapper.lora_A, wrapper.lora_B))  # type: ignore[arg-type]
            found[f"{experts}.{wrapper.parameter_name}.A"] = list(A.view(wrapper.num_experts, -1, A.shape[1]))
            found[f"{experts}.{wrapper.parameter_name}.B"] = list(B.view(len(B), -1, wrapper.num_experts).unbind(-1))
    return found
