"""Between lmoe's tensors and those of a PEFT adapter: single LoRA by Linear, native experts by `target_parameters`.

PEFT 0.19.1 and later keep the branches of a fused parameter as lora_A (E * R, D), expert by expert, and lora_B
(O, R * E), rank by rank, in both orientations of the parameter; of two parameters of one module the one that was
registered first lies under `base_layer`.

Shapes: D in, O out, R rank, E experts.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lmoe.errors import CheckpointError
from lmoe.injection.plan import SiteKind, SitePlan
from lmoe.injection.record import injected
from lmoe.injection.reward_head import refuse_reward_head
from lmoe.layers.lora_linear import LoRALinear
from lmoe.layers.native_experts import NativeExpertsLoRA
from lmoe.layers.native_router import NativeRouter
from lmoe.layers.stacked_lora import StackedLoRA
from lmoe.ops.lora import faded
from lmoe.rules.strategies import STRATEGIES, with_peft_adapter

PREFIX = "base_model.model."


@dataclass(slots=True, frozen=True, kw_only=True)
class PeftPart:
    """One target of a PEFT adapter.

    Args:
        target: module path, or path of a fused parameter.
        key: where its tensors are in the file, without `.lora_A.weight`.
        owner: what holds lora_A and lora_B here.
        lora_r, lora_alpha: of this target.
    """

    target: str
    key: str
    owner: LoRALinear | StackedLoRA
    lora_r: int
    lora_alpha: float


def peft_parts(model: nn.Module) -> list[PeftPart]:
    """The targets of the PEFT adapter that does what an injected model does.

    Raises:
        CheckpointError: PEFT has no layout for this strategy, or for DoRA on some targets only.
    """
    record = injected(model)
    strategy = record.injection.strategy
    if not STRATEGIES[strategy].peft_adapter:
        raise CheckpointError(
            f"injection={strategy} chooses experts for each token or prompt, which a PEFT adapter cannot do (it can "
            f"hold {with_peft_adapter()}); {STRATEGIES[strategy].instead_of_merging}"
        )
    if record.trained_base:
        raise CheckpointError(
            f"{', '.join(sorted(record.trained_base))} of the backbone was trained too; a PEFT adapter cannot hold it"
        )
    refuse_reward_head(model, "a PEFT adapter")
    parts: list[PeftPart] = []
    for site in record.plan.sites:
        parts += _single(model, site) if site.kind is SiteKind.single else _native(model, site)
    dora = {part.owner.use_dora for part in parts if isinstance(part.owner, LoRALinear)}
    if len(dora) > 1 or (True in dora and any(isinstance(part.owner, StackedLoRA) for part in parts)):
        raise CheckpointError(
            "injection.attn_lora.use_dora=true is on attention only, and a PEFT adapter has DoRA on all targets or none"
        )
    return parts


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapter file under PEFT's names; native routers whole, as modules_to_save."""
    tensors: dict[str, Tensor] = {}
    for part in peft_parts(model):
        lora_A, lora_B = part.owner.lora_A.data, faded(part.owner.lora_B.data, part.owner.fade)
        if isinstance(part.owner, StackedLoRA):
            lora_A, lora_B = lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)
        tensors[f"{PREFIX}{part.key}.lora_A.weight"], tensors[f"{PREFIX}{part.key}.lora_B.weight"] = lora_A, lora_B
        if isinstance(part.owner, LoRALinear) and part.owner.use_dora:
            tensors[f"{PREFIX}{part.key}.lora_magnitude_vector.weight"] = part.owner.lora_magnitude.data
    return tensors | _router_tensors(model)


def _router_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the backbone's routers under PEFT's names, which keeps modules to save whole."""
    return {
        f"{PREFIX}{path}.{name}": value
        for path, router in native_routers(model).items()
        for name, value in router.router.state_dict().items()
    }


def native_routers(model: nn.Module) -> dict[str, NativeRouter]:
    """Trainable routers of the backbone by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, NativeRouter)}


def read_peft_tensors(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Copy the tensors of a PEFT adapter file into an injected model.

    Raises:
        CheckpointError: missing, unknown or misshapen keys; the first one is named.
    """
    own = peft_tensors(model)
    routers = _router_tensors(model)
    if missing := sorted(own.keys() - stored.keys() - routers.keys()):
        raise CheckpointError(f"the PEFT adapter lacks {len(missing)} tensors of this injection, first {missing[0]}")
    if unknown := sorted(stored.keys() - own.keys()):
        raise CheckpointError(f"the PEFT adapter holds {len(unknown)} tensors without a place here, first {unknown[0]}")
    for key, value in stored.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"{key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}"
                + (" (PEFT before 0.19.1 had experts the other way round)" if ".experts." in key else "")
            )
    for part in peft_parts(model):
        lora_A, lora_B = (stored[f"{PREFIX}{part.key}.lora_{half}.weight"] for half in "AB")
        if isinstance(part.owner, StackedLoRA):
            experts, rank = part.owner.lora_A.shape[:2]
            lora_A = lora_A.unflatten(0, (experts, rank))
            lora_B = lora_B.unflatten(1, (rank, experts)).permute(2, 0, 1)
        part.owner.lora_A.data.copy_(lora_A)
        part.owner.lora_B.data.copy_(lora_B)
        if isinstance(part.owner, LoRALinear) and part.owner.use_dora:
            part.owner.lora_magnitude.data.copy_(stored[f"{PREFIX}{part.key}.lora_magnitude_vector.weight"])
    for key, value in routers.items():
        if key in stored:
            value.copy_(stored[key])


def _single(model: nn.Module, site: SitePlan) -> list[PeftPart]:
    owner = model.get_submodule(site.path)
    assert isinstance(owner, LoRALinear)
    return [PeftPart(target=site.path, key=site.path, owner=owner, lora_r=site.lora_r, lora_alpha=site.lora_alpha)]


def _native(model: nn.Module, site: SitePlan) -> list[PeftPart]:
    experts = model.get_submodule(site.path)
    assert isinstance(experts, NativeExpertsLoRA)
    registered = [
        name for name, _ in experts.base_layer.named_parameters(recurse=False) if name in (site.branches or {})
    ]
    parts = []
    for depth, name in enumerate(registered):
        owner = getattr(experts, name)
        inner = ".base_layer" * (len(registered) - 1 - depth)
        parts.append(
            PeftPart(
                target=f"{site.path}.{name}",
                key=site.path + inner,
                owner=owner,
                lora_r=site.lora_r,
                lora_alpha=site.lora_alpha,
            )
        )
    return parts
