"""What attention needs of a batch, and which attention keeps packed rows apart without a large mask."""

from torch import nn
from transformers import PreTrainedModel

from lmoe.backbones.layout import decoder_layers, family_of

DENSE = ("eager", "sdpa")
"""Implementations that get a mask of all queries and keys, (B, 1, T, T), where rows are packed."""
FLEX, FLASH = "flex_attention", "flash_attention_2"


def needs_mask_of_padding(model: nn.Module) -> bool:
    """Whether padding behind a text must be masked, so that it changes nothing before it.

    It need not where every layer is known to have causal softmax attention and nothing else: no token looks at what
    follows it. A mask would then only take time and memory, and keep PyTorch from its fastest kernels. Linear
    attention, families that are not listed, and code that is not Transformers' own are given the mask.

    Args:
        model: bare, or with experts.
    """
    family = family_of(model)
    if family is None or not type(model).__module__.startswith("transformers."):
        return True
    for layer in decoder_layers(model)[1]:
        blocks = [module for name, module in layer.named_children() if name in family.attention]
        if not blocks or not all(getattr(block, "is_causal", None) is True for block in blocks):
            return True
    return False


def attention_of(model: PreTrainedModel) -> str:
    """The name of a model's attention, as backbone.attn_implementation has it."""
    return str(model.config.get_text_config()._attn_implementation)


def takes_row_bounds(attention: str) -> bool:
    """Whether an attention is told where packed rows begin, in place of a mask."""
    return "flash" in attention


def attention_for_packed_rows(attention: str, device: str, *, flash: bool, flex: bool) -> str | None:
    """The attention with which packed rows need no mask of all queries and keys; None: there is none, or it is used.

    FlexAttention has no backward on a CPU, and flash attention no kernel for it.

    Args:
        attention: that of the model.
        device: type of the one that it runs on, such as cuda.
        flash: whether flash attention is installed and the model's code supports it.
        flex: whether the model's code supports FlexAttention.
    """
    if device != "cuda" or attention not in DENSE:
        return None
    if flash:
        return FLASH
    return FLEX if flex else None
