"""This project's mixture of LoRA experts, with both auxiliary losses."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS, Batch
from benchmarks.peers.lmoe_router import top_k_router
from benchmarks.peers.trainee import Trainee, language_model_loss
from lmoe.injection.apply import inject
from lmoe.injection.tracing import trace
from lmoe.layers.mixture_lora_linear import MixtureLoRALinear, MixtureSettings
from lmoe.vocabulary import Backend


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """A mixture in place of each FFN Linear."""
    plan = inject(
        model,
        injection={
            "num_experts": experts.num_experts,
            "top_k": experts.top_k,
            "lora_r": experts.rank,
            "lora_alpha": experts.alpha,
            "lora_dropout": 0.0,
            "attn_lora": {"enabled": False},
        },
        moe={"router": "top_k"},
    )
    assert len(plan.sites) == len(FFN_LINEARS) * model.config.num_hidden_layers

    def loss(batch: Batch) -> Tensor:
        with trace(model, attention_mask=batch.attention_mask) as routing:
            return language_model_loss(model, batch) + routing.auxiliary_loss()

    return Trainee(model, loss)


def wrap(linear: nn.Linear, experts: Experts, backend: Backend = Backend.auto) -> nn.Module:
    """A mixture on one Linear; its trace is off."""
    router = top_k_router(experts, linear.in_features, linear.weight.device)
    mixture = MixtureSettings(
        num_experts=experts.num_experts,
        lora_r=experts.rank,
        scaling=experts.alpha / experts.rank,
        backend=backend,
    )
    return MixtureLoRALinear(linear, router, mixture)
