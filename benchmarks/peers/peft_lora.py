"""PEFT's LoRA."""

from functools import partial

from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS
from benchmarks.peers.trainee import Trainee, language_model_loss, train_in_float32


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """One LoRA on each FFN Linear."""
    assert experts.num_experts == 1
    config = LoraConfig(
        task_type="CAUSAL_LM", r=experts.rank, lora_alpha=int(experts.alpha), target_modules=list(FFN_LINEARS)
    )
    adapted = get_peft_model(model, config).train()
    return Trainee(adapted, partial(language_model_loss, adapted))


def wrap(linear: nn.Linear, experts: Experts) -> nn.Module:
    """One LoRA on one Linear."""
    assert experts.num_experts == 1
    config = LoraConfig(r=experts.rank, lora_alpha=int(experts.alpha), target_modules=["0"])
    wrapped = inject_adapter_in_model(config, nn.Sequential(linear))
    train_in_float32(wrapped)
    return wrapped
