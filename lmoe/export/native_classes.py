"""Which mixture of Transformers' own holds the experts of which family, and its config: a table, one entry a class.

A class is here where it computes, layer by layer, what the family does, with experts in place of the FFN: attention,
norms, rope and windows are the same, the gate is the K largest of a softmax with weights that sum to 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

SHARED_SIZE = 32
"""Inner width of a shared expert of zeros: as narrow as the blocks of 8-bit formats allow."""
FULL, SLIDING = "full_attention", "sliding_attention"
OWN = ("model_type", "architectures", "dtype", "quantization_config", "auto_map", "transformers_version")
"""Keys of a config that are of the model that it was saved with."""
Settings = dict[str, Any]


def as_it_is(config: Settings) -> tuple[Settings, list[str]]:
    """No windows, or the same words for them in both configs."""
    return {}, []


def one_window(config: Settings) -> tuple[Settings, list[str]]:
    """A class with one window for all layers, or none: settings, and the problem of a base where only some have one."""
    kinds = set(config.get("layer_types") or ())
    if len(kinds) > 1:
        return {}, [
            f"attention of this base is {' in some layers and '.join(sorted(kinds))} in others (layer_types), and the "
            "class has one window for all layers; use the adapter as it is: `lmoe.load` runs it"
        ]
    slides = kinds == {SLIDING}
    return {"use_sliding_window": slides, "sliding_window": config.get("sliding_window") if slides else None}, []


@dataclass(slots=True, frozen=True, kw_only=True)
class NativeClass:
    """One class of mixtures; paths are inside a decoder layer.

    Args:
        model_type: of its config.
        families: model types of the bases whose experts it holds.
        block: the mixture, with `experts` inside.
        gate: the router inside the block.
        num_experts, inner_size: keys of its config for E and for the inner width of an expert.
        norm_topk_prob: it has that switch; else its weights always sum to 1.
        dense_layers: single layers may keep their FFN (mlp_only_layers); else they get E equal experts.
        shared_expert: it has an FFN that is always on, which becomes zeros.
        settings: further keys of its config.
        windows: what its config says of sliding windows, and what it cannot.
    """

    model_type: str
    families: tuple[str, ...]
    block: str = "mlp"
    gate: str = "gate"
    num_experts: str = "num_experts"
    inner_size: str = "intermediate_size"
    norm_topk_prob: bool = False
    dense_layers: bool = False
    shared_expert: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    windows: Callable[[Settings], tuple[Settings, list[str]]] = as_it_is


CLASSES: tuple[NativeClass, ...] = (
    NativeClass(
        model_type="mixtral",
        families=("llama", "mistral", "ministral"),
        num_experts="num_local_experts",
        settings=(("router_jitter_noise", 0.0),),
        windows=lambda config: ({}, []) if config["model_type"] != "ministral" else one_window(config),
    ),
    NativeClass(
        model_type="qwen2_moe",
        families=("qwen2",),
        inner_size="moe_intermediate_size",
        norm_topk_prob=True,
        dense_layers=True,
        shared_expert=True,
        settings=(("qkv_bias", True), ("decoder_sparse_step", 1)),
    ),
    NativeClass(
        model_type="qwen3_moe",
        families=("qwen3",),
        inner_size="moe_intermediate_size",
        norm_topk_prob=True,
        dense_layers=True,
        settings=(("decoder_sparse_step", 1),),
        windows=one_window,
    ),
    # Three layers of linear attention to one of full attention, and no layer without a mixture.
    NativeClass(
        model_type="qwen3_5_moe_text",
        families=("qwen3_5_text",),
        inner_size="moe_intermediate_size",
        shared_expert=True,
    ),
    # OLMo 2 with experts: norms behind attention and FFN.
    NativeClass(model_type="flex_olmo", families=("olmo2",), norm_topk_prob=True),
    # The softmax over the K largest logits is that over all, renormalised.
    NativeClass(
        model_type="granitemoe",
        families=("granite",),
        block="block_sparse_moe",
        gate="router",
        num_experts="num_local_experts",
    ),
)
BY_FAMILY: dict[str, NativeClass] = {family: native for native in CLASSES for family in native.families}


def native_class_of(config: PreTrainedConfig) -> tuple[NativeClass | None, list[str]]:
    """The class for a base's config; or None, and why there is none."""
    native = BY_FAMILY.get(config.model_type)
    if native is not None and type(config) is CONFIG_MAPPING[config.model_type]:
        return native, []
    if native is not None:
        return None, [
            f"the code of this base comes with it ({type(config).__name__}), so that {native.model_type} of "
            "Transformers may be another model; use the adapter as it is: `lmoe.load` runs it"
        ]
    return None, [
        f"model_type={config.model_type}: no mixture of Transformers' own is such a model with experts; there is one "
        f"for {', '.join(sorted(BY_FAMILY))}. Use the adapter as it is: `lmoe.load` runs it"
    ]


def native_config(
    native: NativeClass, base: PreTrainedConfig, *, num_experts: int, top_k: int, dense: Sequence[int]
) -> tuple[PreTrainedConfig, list[str]]:
    """The config of the exported model, and what it cannot say.

    Args:
        native: its class.
        base: config of the base, all of whose keys are carried over.
        num_experts, top_k: E and K of every mixture.
        dense: numbers of the layers that keep their FFN; where the class has none such, it is not asked.
    """
    old = base.to_dict()
    windows, problems = native.windows(old)
    made = {
        native.num_experts: num_experts,
        "num_experts_per_tok": top_k,
        native.inner_size: base.intermediate_size,
        "output_router_logits": False,
        **dict(native.settings),
        **windows,
    }
    if native.norm_topk_prob:
        made["norm_topk_prob"] = True
    if native.dense_layers:
        made["mlp_only_layers"] = list(dense)
    if native.shared_expert:
        made["shared_expert_intermediate_size"] = SHARED_SIZE
    kind = CONFIG_MAPPING[native.model_type]
    # A key that the base's class does not know is not read there, and may be one that acts in the other class.
    left = {*OWN, *(kind().to_dict().keys() - type(base)().to_dict().keys())}
    left |= {"layer_types", "max_window_layers"} if windows else set()
    return kind(**{key: value for key, value in old.items() if key not in left} | made), problems
