"""Load a backbone and its tokenizer from the hub, a local directory, a GGUF file, or what ships with lmoe."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, find_adapter_config_file

from lmoe.backbones.gguf_header import check_whole
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError, LmoeError
from lmoe.files.adapter_files import TOKENIZER_FILES
from lmoe.files.export_record import changes, read_export_record
from lmoe.files.gguf import gguf_files
from lmoe.files.resources import missing_base, named_base
from lmoe.files.small_file import NO_FILE, Reader, link_outside
from lmoe.files.wording import first_line, quoted, shown
from lmoe.rules.backbone import gguf_problems
from lmoe.rules.trust import kernels
from lmoe.vocabulary import QUANTISED, BackbonePrecision

REPACKS = "support_avx512bf16_for_cpu"
"""What a 4-bit Linear of bitsandbytes asks before it repacks its weights for inference."""
NEEDED_FOR_GGUF = ("gguf", "accelerate")
TO_TRUST = "where you trust its code, say so: `trust_remote_code=True`"


class Source(NamedTuple):
    """What Transformers is asked for, and what every one of its loaders is told beside it."""

    place: str
    settings: dict[str, Any]


def model_source(model_name: str, gguf_file: str | None = None) -> str:
    """Where a model lies: the folder of a base that has a name of ours, else the name as given.

    Args:
        gguf_file: the file there that is the model; None: the whole folder is.

    Raises:
        BackboneError: a local path that is no model directory, or holds a PEFT adapter too.
    """
    if (own := named_base(model_name)) is not None:
        if (reason := missing_base(model_name)) is not None:
            raise BackboneError(f"backbone.model_name={model_name}: {reason}")
        return str(own)
    path = Path(model_name).expanduser()
    if path.is_dir():
        if (reason := adapter_beside(str(path))) is not None:
            raise BackboneError(f"backbone.model_name={model_name}: {reason}")
        if gguf_file is None and not (path / "config.json").exists():
            raise BackboneError(
                f"backbone.model_name={model_name}: this directory holds no config.json, so no model"
                + _advise_gguf(model_name, gguf_files(path))
            )
        return str(path)
    if path.exists() or model_name.startswith((".", "/", "~")):
        raise BackboneError(f"backbone.model_name={model_name}: no such model directory")
    return model_name


def _advise_gguf(folder: str, files: list[str]) -> str:
    """How to name one of the GGUF files of a folder that holds no other model."""
    if not files:
        return ""
    one = f"backbone.model_name={folder.rstrip('/')}/{files[0]}"
    return f" but {files[0]}: name it, {one}" if len(files) == 1 else f"; name one of {', '.join(files)}, such as {one}"


@contextmanager
def reading(config: BackboneConfig, what: str) -> Iterator[Source]:
    """Let whatever Transformers meets while it reads a base be an error that names the base.

    Args:
        what: is read of it.

    Raises:
        BackboneError: it cannot be loaded.
    """
    file = config.gguf_file
    if file is not None and (problems := gguf_problems(config, file)):
        raise BackboneError("; ".join(problems))
    place = model_source(config.model_name, file)
    with _named(config, what, place):
        settings: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        yield Source(place, settings) if file is None else _gguf_source(config, place, file, settings)


def _gguf_source(config: BackboneConfig, place: str, file: str, settings: dict[str, Any]) -> Source:
    """The folder of a GGUF file, which is fetched from the hub where it is there.

    NOTE Transformers takes a file of this name in the working directory for the one that was meant, so it is told the
    whole path.

    Raises:
        BackboneError: what reads GGUF is not installed.
    """
    if missing := [name for name in NEEDED_FOR_GGUF if find_spec(name) is None]:
        raise BackboneError(f"reading a GGUF file needs {' and '.join(missing)}: pip install 'lmoe[gguf]'")
    found = Path(place) / file if Path(place).is_dir() else Path(cached_file(place, file, revision=config.revision))  # type: ignore[arg-type]
    check_whole(found)
    return Source(str(found.parent), {**settings, "revision": None, "gguf_file": str(found.absolute())})


def adapter_beside(source: str, revision: str | None = None) -> str | None:
    """Why a base is refused that holds a PEFT adapter, which Transformers would load with it, or in its place, unasked;
    None: it holds none.

    Args:
        source: directory or hub name.
        revision: on the hub.
    """
    if find_adapter_config_file(source, revision=revision) is None:
        return None
    apart = "move its files to a folder of their own" if Path(source).is_dir() else "download both, each to a folder"
    return (
        "it holds a PEFT adapter (adapter_config.json), which would be loaded into the model unasked. To use both, "
        f"{apart} and give the adapter as an expert of a blend (docs/BLENDING.md), or merge it "
        "into the base first with PEFT's merge_and_unload"
    )


def refuse_kernels(config: BackboneConfig, source: Source) -> None:
    """Refuse a model whose attention is code from the hub; a GGUF file has no place for it.

    Raises:
        BackboneError: the model's config.json names a kernel, and its code is not trusted.
    """
    if config.trust_remote_code or config.gguf_file is not None:
        return
    file = Path(cached_file(source.place, "config.json", revision=config.revision))  # type: ignore[arg-type]
    for key, name in kernels(MODEL_FILE.json(file)).items():
        raise BackboneError(
            f"{file}: {key} is {quoted(name)}, a kernel whose code would be fetched from the hub and run; {TO_TRUST}"
        )


def load_tokenizer(config: BackboneConfig) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer, with a padding token.

    Raises:
        BackboneError: no tokenizer there, damaged files, or no network.
    """
    with reading(config, "tokenizer") as source:
        return _with_padding(AutoTokenizer.from_pretrained(source.place, **source.settings))


def tokenizer_in(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was saved in a folder, or None if there is none; code beside it runs only where it is trusted.

    Raises:
        BackboneError: there is one that cannot be loaded, or a file of it is a link to somewhere else.
    """
    for name in TOKENIZER_FILES:
        if (problem := link_outside(folder / name)) is not None:
            raise BackboneError(f"{folder}: the tokenizer cannot be loaded: {problem}")
    if not (folder / "tokenizer_config.json").exists():
        return None
    with _named(None, "tokenizer", folder):
        # NOTE left at its default, trust_remote_code asks on the terminal whether to run code from the folder.
        return _with_padding(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """One that has been tried: settings of a wrong type show only in use."""
    tokenizer.decode(tokenizer("Hello", verbose=True)["input_ids"])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(
    config: BackboneConfig,
    *,
    notices_changes: bool = True,
    device: torch.device | None = None,
    places: Mapping[str, int] | None = None,
) -> PreTrainedModel:
    """The backbone, frozen, in evaluation mode, on the CPU; a quantised one where bitsandbytes computes.

    Args:
        device: where a quantised one is put, and has to stay; None: the current GPU, if there is one.
        places: the GPU of each module, by path, where they have to stay; None: all in one place.
        notices_changes: warn of a folder that lmoe has exported and somebody has changed since.

    Raises:
        BackboneError: no model there, no network, torn weights, or weights that are not safetensors.
        CheckpointError: of a folder that lmoe has exported the record is damaged.
    """
    stored = storage(config.precision)
    if device is not None and config.precision in QUANTISED:
        stored["device_map"] = {"": device}
    if places is not None:
        stored["device_map"] = dict(places)
    with reading(config, "model") as source:
        if (reason := adapter_beside(source.place, config.revision)) is not None:
            raise BackboneError(reason)
        refuse_kernels(config, source)
        if config.gguf_file is not None:
            stored |= {"config": settings_of(config, source), "quantization_config": GgufConfig(dequantize=True)}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.place,
            **source.settings,
            **stored,
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            output_loading_info=True,
        )
        model, loading = loaded
        own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        if config.precision not in QUANTISED and (missing := sorted(own & set(loading["missing_keys"]))):
            raise ValueError(f"its files lack {len(missing)} weights, which would start at random; first {missing[0]}")
    if config.gguf_file is not None:
        _forget_gguf(model)
        # By this name every verb finds the same file again; Transformers has left the folder alone there.
        model.name_or_path = config.full_name
    if notices_changes:
        notice_changes(Path(source.place))
    stay_trainable(model)
    return model.requires_grad_(False).eval()


def notice_changes(folder: Path) -> None:
    """Warn where a folder is not what an export has left there."""
    record = read_export_record(folder)
    if record is not None and (found := changes(folder, record)):
        warnings.warn(f"{folder} is not as lmoe has exported it: {'; '.join(found)}", stacklevel=3)


def settings_of(config: BackboneConfig, source: Source) -> PreTrainedConfig:
    """The model's config, of sizes that can be."""
    settings = AutoConfig.from_pretrained(source.place, **source.settings)
    if config.gguf_file is not None:  # a config.json has been looked at as it is written
        _check_sizes(Path(source.place) / config.gguf_file, settings.to_dict())
    return settings


def _forget_gguf(model: PreTrainedModel) -> None:
    """Let a model that was read from a GGUF file be an ordinary one: its weights are plain numbers now.

    NOTE Transformers may leave what it reads with on the model, which could not be saved then.
    """
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
    ):
        if hasattr(holder, name):
            delattr(holder, name)


def bare_model(config: BackboneConfig) -> PreTrainedModel:
    """The backbone on the meta device, from its config alone: sizes without numbers, no weights needed. Quantised
    Linears are there in the type that they are computed in.

    Raises:
        BackboneError: no config there, or no network.
    """
    dtype = torch.bfloat16 if config.precision in QUANTISED else getattr(torch, config.precision.value)
    with reading(config, "config") as source:
        refuse_kernels(config, source)
        settings = settings_of(config, source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    return model.requires_grad_(False).eval()


def stored_precision(config: BackboneConfig) -> BackbonePrecision:
    """The type that the config of a model names for its weights; of one that names none, float32.

    Raises:
        BackboneError: no config there, or no network.
    """
    dtype = str(bare_config(config).dtype).removeprefix("torch.")
    return BackbonePrecision(dtype) if dtype in tuple(BackbonePrecision) else BackbonePrecision.float32


def bare_config(config: BackboneConfig) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        BackboneError: no config there, or no network.
    """
    with reading(config, "config") as source:
        return settings_of(config, source)


def has_weights(config: BackboneConfig) -> bool:
    """False for a local directory that holds a config and no weights; what the hub has is not asked."""
    folder = Path(model_source(config.model_name, config.gguf_file))
    return (
        config.gguf_file is not None
        or not folder.is_dir()
        or any(folder.glob("*.safetensors"))
        or any(folder.glob("*.bin"))
    )


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
    """The family in the model's config, or None if there is no config that can be loaded."""
    try:
        return bare_config(config).model_type
    except BackboneError:
        return None


SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "processor_config.json", "preprocessor_config.json", "chat_template.json"),
)
"""JSON objects that Transformers reads itself, in words of its own where they hold something else."""
INDEX = "model.safetensors.index.json"
LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 100_000_000,
    "num_attention_heads": 100_000,
    "num_experts": 100_000,
    "num_local_experts": 100_000,
    "n_routed_experts": 100_000,
}
"""Sizes in config.json, far beyond those of any model."""
MODEL_FILE = Reader(error=BackboneError, most=64_000_000, what="such a file", finite=False)
TEMPLATE = Reader(error=BackboneError, most=1_000_000, what="a chat template")


def check_files(folder: Path) -> None:
    """Read the small files of a model or a tokenizer before Transformers does.

    Raises:
        BackboneError: names the first that is damaged, and what is no ordinary file, for which a reader would wait.
    """
    for entry in sorted(folder.iterdir()):
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise BackboneError(f"{entry}: {NO_FILE}; remove it")
        if entry.name in SMALL_FILES:
            content = MODEL_FILE.json(entry)
            if entry.name == "config.json":
                _check_sizes(entry, content)
        elif entry.name == INDEX:
            check_places(entry, MODEL_FILE.json(entry))
        elif entry.name == "chat_template.jinja":
            TEMPLATE.text(entry)


def _check_sizes(file: Path, content: dict[str, Any]) -> None:
    """Refuse sizes that no model has: Transformers would build such a model until the memory is full."""
    for part in (content, *(part for part in content.values() if isinstance(part, dict))):
        for key, most in LARGEST.items():
            size = part.get(key)
            if isinstance(size, int | float) and not 0 <= size <= most:
                raise BackboneError(f"{file}: {key} is {shown(size)}, and must be from 0 to {most:,}")


def check_places(file: Path, content: dict[str, Any]) -> None:
    """Refuse an index of weights that looks outside of its folder."""
    places = content.get("weight_map")
    if not isinstance(places, dict):
        raise BackboneError(f"{file}: has no weight_map by name")
    for place in places.values():
        if not isinstance(place, str) or Path(place).name != place or place in ("", ".", ".."):
            raise BackboneError(f"{file}: weight_map names {quoted(place)}, which is no file of this folder")


@contextmanager
def _named(config: BackboneConfig | None, what: str, source: str | Path) -> Iterator[None]:
    """Let whatever Transformers meets while it loads from a folder or the hub be an error that names the place.

    Args:
        config: the place is its backbone; None: it is the tokenizer in a folder.

    Raises:
        BackboneError: it cannot be loaded.
    """
    named = f"backbone.model_name={config.full_name}" if config is not None else str(source)
    try:
        if Path(source).is_dir():
            check_files(Path(source))
        yield
    except LmoeError as error:
        raise BackboneError(f"{named}: the {what} cannot be loaded: {error}") from None
    except Exception as error:  # of many libraries, for each of which a damaged file is another type
        reason = f"{_reason(error)}; {_remedy(config, error)}"
        raise BackboneError(f"{named}: the {what} cannot be loaded: {reason}") from None


def _reason(error: Exception) -> str:
    usual = isinstance(error, OSError | ValueError | ImportError | RuntimeError | SafetensorError)
    return first_line(error) if usual else f"{type(error).__name__}: {first_line(error)}"


def _remedy(config: BackboneConfig | None, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return TO_TRUST
    if config is None:
        return "put back the files that were saved there, or remove its tokenizer_config.json to use that of the base"
    if config.gguf_file is not None and "not supported" in str(error):
        return "Transformers reads no such GGUF file; give the model as a folder in the format of Transformers"
    if Path(config.model_name).expanduser().exists() or named_base(config.model_name) is not None:
        return "check backbone.model_name"
    return (
        "give a local directory, or check the name and the network (a download needs the hub once; then "
        "HF_HUB_OFFLINE=1 works from the cache)"
    )
