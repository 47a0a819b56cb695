"""This project's native_moe_expert_lora on both fused tensors, its routers frozen."""

from functools import partial

from torch import nn
from transformers import PreTrainedModel

from benchmarks.agreement import Factors, Read
from benchmarks.experts import Experts
from benchmarks.peers.trainee import Trainee, language_model_loss
from lmoe.injection.apply import inject
from lmoe.injection.record import mixtures
from lmoe.layers.stacked_lora import StackedLoRA


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """LoRA on every native expert; nothing else is trained."""
    plan = inject(
        model,
        injection={
            "strategy": "native_moe_expert_lora",
            "lora_r": experts.rank,
            "lora_alpha": experts.alpha,
            "lora_dropout": 0.0,
            "attn_lora": {"enabled": False},
        },
        moe={"router": "top_k", "router_z_loss_coef": 0.0, "load_balance": {"type": "none"}},
    )
    assert {site.num_experts for site in plan.sites} == {experts.num_experts}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return Trainee(model, partial(language_model_loss, model))


def factors(module: nn.Module, read: Read) -> Factors:
    """Factors of every branch, by path."""
    found: Factors = {}
    for path, branch in mixtures(module):
        assert isinstance(branch, StackedLoRA)
        found |= {f"{path}.A": list(read(branch.lora_A)), f"{path}.B": list(read(branch.lora_B))}
    return found
