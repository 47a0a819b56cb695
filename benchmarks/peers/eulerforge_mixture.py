"""eulerforge's mixture of LoRA experts, with its own balance loss and the statistics that it keeps by default."""

from eulerforge.adapters.backbones.qwen3 import Qwen3Adapter  # pyright: ignore[reportMissingImports]
from eulerforge.modules.mixture_lora import (  # pyright: ignore[reportMissingImports]
    MixtureLoRALinear,
    build_mixture_lora_for_ffn_layers,
)
from eulerforge.utils.moe_loss import combine_main_and_aux_loss  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS, Batch
from benchmarks.peers.trainee import Trainee, language_model_loss, train_in_float32

AUX_LOSS_COEF = 0.01


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """A mixture in place of each FFN Linear, by the function that eulerforge's own injection calls."""
    _, _, replaced = build_mixture_lora_for_ffn_layers(
        model,
        Qwen3Adapter(),
        range(model.config.num_hidden_layers),
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        r=experts.rank,
        alpha=experts.alpha,
        dropout=0.0,
        target_submodule_keywords=FFN_LINEARS,
        aux_loss_coeff=AUX_LOSS_COEF,
    )
    assert replaced == len(FFN_LINEARS) * model.config.num_hidden_layers
    # It makes adapters in the type of the base, bfloat16 too.
    train_in_float32(model)

    def loss(batch: Batch) -> Tensor:
        total, _ = combine_main_and_aux_loss(language_model_loss(model, batch), model, aux_weight=1.0)
        return total

    return Trainee(model, loss)


def wrap(linear: nn.Linear, experts: Experts) -> nn.Module:
    """A mixture on one Linear."""
    wrapped = MixtureLoRALinear(
        linear, experts.num_experts, experts.top_k, r=experts.rank, alpha=experts.alpha, dropout=0.0
    )
    train_in_float32(wrapped)
    return wrapped
