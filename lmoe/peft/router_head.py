"""The router of a whole model as a file beside its exported experts (docs/CHECKPOINT.md).

Shapes: E experts, D hidden.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from lmoe.adapter.folder import moe_as_used
from lmoe.adapter.stored_base import fingerprints_of, stored_fingerprints
from lmoe.adapter.tensor_file import finite_tensors, stored_metadata, tensor_shapes
from lmoe.backbones.fingerprint import BaseFingerprint
from lmoe.errors import CheckpointError
from lmoe.files.wording import quoted
from lmoe.files.write import write_whole
from lmoe.injection.record import injected, routers
from lmoe.layers.model_route import MODEL
from lmoe.layers.routers import LinearRouter
from lmoe.rules.experts_from import NAME
from lmoe.rules.routers import mixture_scale
from lmoe.vocabulary import Decide, Mixing, MixtureScale, RouterDtype, RouterScope, TrainOn

HEAD_FILE = "router_head.safetensors"
HEAD_VERSION = 1
ABOUT = "router_head"
"""The one entry of the file's metadata: JSON."""
WEIGHT, BIAS, SELECTION_BIAS = "weight", "bias", "selection_bias"
OTHERWISE = {
    "attn_lora": "its attention LoRA worked while the prompt was read, and on every token; here it comes with the "
    "experts (injection.attn_lora.enabled=true)",
    "shared_lora": "its shared expert worked while the prompt was read, and on every token; here it comes with the "
    "experts (injection.shared_lora_r)",
    "mixing_factors": "it mixed the factors of the experts, and a blend mixes their outputs (moe.mixing=factors)",
}
"""What a run may have that a blend of its experts does otherwise, by its name in the file."""


@dataclass(slots=True, frozen=True, kw_only=True)
class RouterHead:
    """A router that decides for all sites by the prompt, and how.

    Args:
        tensors: weight (E, D), and where it has them bias and selection_bias (E,).
        experts: their names, in the order of the rows.
        router_layer, prompt_experts, decide, router_dtype, temperature: of the run's `moe`.
        top_k, scale: of its gate.
        otherwise: names of what a blend of the experts does otherwise than the run, out of OTHERWISE.
        train_on: the turns of conversations that the run has learnt; the others were a part of the prompt.
    """

    tensors: Mapping[str, Tensor]
    experts: tuple[str, ...]
    router_layer: int
    prompt_experts: bool
    decide: Decide
    router_dtype: RouterDtype
    temperature: float
    top_k: int
    scale: MixtureScale
    otherwise: tuple[str, ...] = ()
    train_on: TrainOn = TrainOn.assistant


def write_head(model: nn.Module, folder: Path, names: list[str], train_on: TrainOn = TrainOn.assistant) -> Path | None:
    """Write the head of a model beside its experts; None: each site has a router of its own, and there is no head.

    Args:
        model: injected.
        folder: there already.
        names: of the experts, in their order.
        train_on: the turns of conversations that the model has learnt.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    record = injected(model)
    if record.moe.router_scope is not RouterScope.model:
        return None
    moe, injection, router = moe_as_used(record), record.injection, dict(routers(model))[MODEL]
    assert isinstance(router, LinearRouter)
    own = {WEIGHT: router.weight, BIAS: router.bias, SELECTION_BIAS: router.selection_bias}
    beside = {
        "attn_lora": injection.attn_lora.enabled,
        "shared_lora": bool(injection.shared_lora_r),
        "mixing_factors": moe.mixing is Mixing.factors,
    }
    head = RouterHead(
        tensors={name: tensor.detach() for name, tensor in own.items() if tensor is not None},
        experts=tuple(names),
        router_layer=int(moe.router_layer),
        prompt_experts=moe.prompt_experts,
        decide=moe.decide,
        router_dtype=moe.router_dtype,
        temperature=moe.temperature,
        top_k=injection.top_k,
        scale=mixture_scale(moe, injection),
        otherwise=tuple(name for name, there in beside.items() if there),
        train_on=train_on,
    )
    return write_router_head(head, fingerprints_of(model), folder)


def write_router_head(head: RouterHead, base: Mapping[str, Any], folder: Path) -> Path:
    """Write a head beside its experts.

    Args:
        base: whose hidden states it reads, as `fingerprints_of` says it.
        folder: there already.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    about = {
        "format_version": HEAD_VERSION,
        "experts": list(head.experts),
        "router_layer": head.router_layer,
        "prompt_experts": head.prompt_experts,
        "decide": head.decide.value,
        "router_dtype": head.router_dtype.value,
        "temperature": head.temperature,
        "top_k": head.top_k,
        "scale": head.scale.value,
        "otherwise": list(head.otherwise),
        "train_on": head.train_on.value,
        "base": dict(base),
    }
    tensors = {name: tensor.float().cpu().contiguous() for name, tensor in head.tensors.items()}
    write_whole(folder, {HEAD_FILE: save(tensors, metadata={ABOUT: json.dumps(about)})})
    return folder / HEAD_FILE


def read_head(place: str | Path, base: BaseFingerprint, width: int) -> RouterHead:
    """What `write_head` wrote.

    Args:
        place: the file, or its folder.
        base: of the model at hand.
        width: D of its hidden states.

    Raises:
        CheckpointError: no head there, one that cannot be read, of another version, or of another base.
    """
    path = head_file(place)
    if not path.exists():
        raise CheckpointError(
            f"{path}: there is no such file; `export_peft_experts` of a run with moe.router_scope=model writes "
            f"{HEAD_FILE} beside its experts"
        )
    shapes, about = tensor_shapes(path), _about(path)
    head = _head(path, about, {})
    experts = len(head.experts)
    allowed = {WEIGHT: (experts, width), BIAS: (experts,), SELECTION_BIAS: (experts,)}
    if WEIGHT not in shapes or any(allowed.get(name) != shape for name, shape in shapes.items()):
        needs = f"{experts} experts over this base need {WEIGHT} {allowed[WEIGHT]}"
        raise CheckpointError(f"{path}: holds {shapes}; {needs}")
    found = stored_fingerprints(about["base"])
    if not any(one.same_base(base) for one in found):
        raise CheckpointError(
            f"{path}: of a run on another base, fingerprint {found[0].digest}; this one has {base.digest}"
        )
    return _head(path, about, finite_tensors(path, list(shapes)))


def head_file(place: str | Path) -> Path:
    """The file of a head that is named by itself or by its folder."""
    path = Path(place).expanduser()
    return path / HEAD_FILE if path.is_dir() else path


def _about(path: Path) -> dict[str, Any]:
    """The JSON of a head's metadata, with its version and its base checked."""
    try:
        about = json.loads(stored_metadata(path).get(ABOUT, ""))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: says nothing of a router (metadata {ABOUT!r}); it is no head of lmoe")
    if about.get("format_version") != HEAD_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {quoted(about.get('format_version'))}; this lmoe reads {HEAD_VERSION}"
        )
    base = about.get("base")
    rounded = base.get("rounded", {}) if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(base.get("fingerprint"), str) or not isinstance(rounded, dict):
        raise CheckpointError(f"{path}: base needs a fingerprint")
    return about | {"base": {"fingerprint": base["fingerprint"], "rounded": rounded}}


def _head(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RouterHead:
    """A head from its metadata, every field checked."""
    names, otherwise = about.get("experts"), about.get("otherwise", [])
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and NAME.fullmatch(n) for n in names):
        raise CheckpointError(f"{path}: experts is {quoted(names)}, must be a list of names of experts")
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: experts names one twice: {quoted(names)}")
    if not isinstance(otherwise, list) or not all(isinstance(n, str) and n in OTHERWISE for n in otherwise):
        raise CheckpointError(f"{path}: otherwise is {quoted(otherwise)}, must be a list of {', '.join(OTHERWISE)}")
    top_k, layer, temperature = (about.get(key) for key in ("top_k", "router_layer", "temperature"))
    if type(top_k) is not int or not 1 <= top_k <= len(names):
        raise CheckpointError(f"{path}: top_k is {quoted(top_k)}, must be from 1 to {len(names)}")
    if type(layer) is not int:
        raise CheckpointError(f"{path}: router_layer is {quoted(layer)}, must be a whole number")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise CheckpointError(f"{path}: temperature is {quoted(temperature)}, must be a number above 0")
    if not isinstance(about.get("prompt_experts"), bool):
        raise CheckpointError(f"{path}: prompt_experts is {quoted(about.get('prompt_experts'))}, must be true or false")
    about = {"train_on": TrainOn.assistant.value, **about}  # which heads of before do not say
    words = {"decide": Decide, "router_dtype": RouterDtype, "scale": MixtureScale, "train_on": TrainOn}
    for key, allowed in words.items():
        if about.get(key) not in tuple(allowed):
            raise CheckpointError(f"{path}: {key} is {quoted(about.get(key))}; allowed: {', '.join(allowed)}")
    return RouterHead(
        tensors=tensors,
        experts=tuple(names),
        router_layer=layer,
        prompt_experts=about["prompt_experts"],
        temperature=float(temperature),
        top_k=top_k,
        otherwise=tuple(otherwise),
        **{key: allowed(about[key]) for key, allowed in words.items()},
    )
