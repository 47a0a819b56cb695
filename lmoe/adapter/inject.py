"""Put new experts into a model in memory."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lmoe.adapter.save_pretrained import save_with_adapter
from lmoe.config.injection import InjectionConfig
from lmoe.config.moe import MoeConfig
from lmoe.injection.apply import inject as put_in
from lmoe.injection.plan import InjectionPlan


def inject(
    model: nn.Module,
    injection: InjectionConfig | Mapping[str, Any] | None = None,
    moe: MoeConfig | Mapping[str, Any] | None = None,
    *,
    trained_base: Iterable[str] = (),
    reward_head: bool = False,
) -> InjectionPlan:
    """Put LoRA experts and routers into a causal language model, in place.

    The backbone is frozen; adapters and routers are float32 and trainable. From then on `model.save_pretrained`, and so
    transformers.Trainer, writes the base under its own names with the adapter beside it, which `lmoe.load` reads.

    Args:
        model: a Hugging Face causal language model.
        injection, moe: the sections of a config, as dataclasses or dicts; keys left out take the values of conf/.
        trained_base: roles of the backbone's own parameters that will train, base_ffn or head: they stay frozen here,
            and are saved with the adapters.
        reward_head: give the model a head for rewards as well (`lmoe.reward`), random and trainable.

    Returns:
        The plan that was applied; print it for a table.

    Raises:
        ConfigError: unknown keys or roles, or values that cannot be.
        InjectionError: the model has no place for it, or was injected before.
        BackboneError: no recognisable decoder layers, or weights that accelerate has offloaded.
    """
    done = put_in(model, injection, moe, trained_base=trained_base, reward_head=reward_head)
    save_with_adapter(model)
    return done
