"""Load a backbone and its tokenizer from the hub, a local directory, or what ships with lmoe."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lmoe.errors import BackboneError
from lmoe.schema.backbone import BackboneConfig, BackbonePrecision
from lmoe.schema.resources import resource_dir

TINY = "tiny"
REPACKS = "support_avx512bf16_for_cpu"
"""What a 4-bit Linear of bitsandbytes asks before it repacks its weights for inference."""
QUANTISED = (BackbonePrecision.int8, BackbonePrecision.nf4)


def model_source(model_name: str) -> str:
    """What Transformers is asked for: the shipped folder for "tiny", else the name as given.

    Raises:
        BackboneError: a local path that is no model directory.
    """
    if model_name == TINY:
        shipped = resource_dir("data/tiny")
        if not (shipped / "config.json").exists():
            raise BackboneError(f"backbone.model_name=tiny: {shipped} is missing; install lmoe anew, or name a model")
        return str(shipped)
    path = Path(model_name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise BackboneError(f"backbone.model_name={model_name}: this directory holds no config.json, so no model")
        return str(path)
    if path.exists() or model_name.startswith((".", "/", "~")):
        raise BackboneError(f"backbone.model_name={model_name}: no such model directory")
    return model_name


def load_tokenizer(config: BackboneConfig) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, with a padding token.

    Raises:
        BackboneError: no tokenizer there, or no network.
    """
    source = model_source(config.model_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _explain(config, "tokenizer", error) from None
    return _with_padding(tokenizer)


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved in a folder, or None if there is none; code beside it never runs.

    Raises:
        BackboneError: there is one that cannot be loaded.
    """
    if not (folder / "tokenizer_config.json").exists():
        return None
    try:
        # NOTE left at its default, trust_remote_code asks on the terminal whether to run code from the folder.
        return _with_padding(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise BackboneError(f"{folder}: the tokenizer cannot be loaded: {reason}") from None


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(config: BackboneConfig) -> PreTrainedModel:
    """The backbone, frozen, in evaluation mode, on the CPU.

    Raises:
        BackboneError: no model there, no network, torn weights, or weights that are not safetensors.
    """
    source = model_source(config.model_name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=config.revision,
            **storage(config.precision),
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _explain(config, "model", error) from None
    stay_trainable(model)
    return model.requires_grad_(False).eval()


def bare_model(config: BackboneConfig) -> PreTrainedModel:
    """The backbone on the meta device, from its config alone: sizes without numbers, no weights needed. Quantised
    Linears are there in the type that they are computed in.

    Raises:
        BackboneError: no config there, or no network.
    """
    dtype = torch.bfloat16 if config.precision in QUANTISED else getattr(torch, config.precision.value)
    try:
        settings = AutoConfig.from_pretrained(
            model_source(config.model_name), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _explain(config, "config", error) from None
    return model.requires_grad_(False).eval()


def has_weights(config: BackboneConfig) -> bool:
    """False for a local directory that holds a config and no weights; what the hub has is not asked."""
    folder = Path(model_source(config.model_name))
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def stay_trainable(model: nn.Module) -> None:
    """Keep 4-bit Linears of bitsandbytes from repacking their weights for inference.

    NOTE on CPUs with AVX512-BF16 their first forward in evaluation mode does so for good, and every later forward, in
    training too, goes through a kernel without a backward pass: gradients would silently lack the frozen layers.
    """
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)


def storage(precision: BackbonePrecision) -> dict[str, Any]:
    """What from_pretrained is told about the type of the weights.

    Raises:
        BackboneError: bitsandbytes is needed and missing.
    """
    if precision not in QUANTISED:
        return {"dtype": getattr(torch, precision.value)}
    if find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"backbone.precision={precision} needs bitsandbytes, which is not installed: "
            "pip install 'lmoe[quantised]', or choose bfloat16"
        )
    if precision is BackbonePrecision.int8:
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantised = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return {"dtype": torch.bfloat16, "quantization_config": quantised}


def precision_of(model: nn.Module) -> BackbonePrecision:
    """How the weights of a loaded model are stored."""
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(quantised, "load_in_8bit", False):
        return BackbonePrecision.int8
    if getattr(quantised, "load_in_4bit", False):
        return BackbonePrecision.nf4
    dtype = str(getattr(model, "dtype", "float32")).removeprefix("torch.")
    return BackbonePrecision(dtype) if dtype in tuple(BackbonePrecision) else BackbonePrecision.float32


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the backbone's positions reach; None: it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def model_type(config: BackboneConfig) -> str | None:
    """The family in config.json, or None if there is no config."""
    try:
        return AutoConfig.from_pretrained(
            model_source(config.model_name), revision=config.revision, trust_remote_code=config.trust_remote_code
        ).model_type
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _explain(config: BackboneConfig, what: str, error: Exception) -> BackboneError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = (
        "check backbone.model_name"
        if Path(config.model_name).expanduser().exists() or config.model_name == TINY
        else "give a local directory, or check the name and the network (a download needs the hub once; "
        "then HF_HUB_OFFLINE=1 works from the cache)"
    )
    return BackboneError(f"backbone.model_name={config.model_name}: the {what} cannot be loaded: {reason}; {remedy}")
