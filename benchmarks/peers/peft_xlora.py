"""PEFT's X-LoRA (2402.07148): a classifier on the last hidden state weighs E LoRA adapters of the whole model.

Every step has two forwards: one with the adapters off, for the classifier, and one with them. All E adapters run.
"""

from functools import partial
from tempfile import TemporaryDirectory

from peft import LoraConfig, XLoraConfig, get_peft_model
from transformers import PreTrainedModel

from benchmarks.experts import Experts
from benchmarks.models import FFN_LINEARS
from benchmarks.peers.trainee import Trainee, language_model_loss, train_in_float32


def attach(model: PreTrainedModel, experts: Experts) -> Trainee:
    """E adapters and a classifier, all of them trained.

    X-LoRA reads its adapters from a folder. They may be one and the same, as only their shape matters here.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM", r=experts.rank, lora_alpha=int(experts.alpha), target_modules=list(FFN_LINEARS)
    )
    with TemporaryDirectory() as folder:
        single = get_peft_model(model, config)
        single.save_pretrained(folder)
        plain = single.unload()
        mixture = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            # NOTE the names must be "0", "1", …: X-LoRA loads under these whatever the keys, then activates the keys,
            # and an adapter that it does not find is left out without a word.
            adapters={str(index): folder for index in range(experts.num_experts)},
            use_trainable_adapters=True,
        )
        adapted = get_peft_model(plain, mixture).train()
    train_in_float32(adapted)
    _assert_all_take_part(adapted, experts)
    return Trainee(adapted, partial(language_model_loss, adapted))


def _assert_all_take_part(adapted, experts: Experts) -> None:
    from peft.tuners.lora import LoraLayer

    for layer in (module for module in adapted.modules() if isinstance(module, LoraLayer)):
        assert set(layer.active_adapters) == set(layer.lora_A), "an adapter of X-LoRA is idle"
        assert len(layer.lora_A) == experts.num_experts
        assert all(parameter.requires_grad for parameter in layer.lora_A.parameters())
