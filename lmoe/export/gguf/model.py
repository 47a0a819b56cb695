"""A model in the format of Transformers as a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GenerationConfig, PreTrainedConfig

from lmoe.backbones.load import bare_model, load_tokenizer, model_source
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError
from lmoe.export.gguf.architectures import EMBEDDING, Architecture, architecture_of, head_size, num_experts
from lmoe.export.gguf.file import gguf_output, write_gguf_file
from lmoe.export.gguf.stored_weights import StoredWeights
from lmoe.export.gguf.tensors import model_tensors
from lmoe.export.gguf.vocabulary import vocabulary_of
from lmoe.vocabulary import GgufType

if TYPE_CHECKING:
    from gguf import GGUFWriter  # type: ignore[import-not-found] - an extra

GENERATION = "generation_config.json"


def write_gguf(folder: str | Path, output: str | Path, kind: GgufType = GgufType.f16) -> Path:
    """Write a Hugging Face model with its tokenizer as one GGUF file; its weights are read a tensor at a time.

    Args:
        folder: with config.json, safetensors and a tokenizer; or a base that ships with lmoe.
        output: a file that does not exist, whose name ends in .gguf.
        kind: type of the matrices; vectors and routers are float32.

    Raises:
        BackboneError: no such model, a class, setting or tokenizer that llama.cpp does not have, or torn weights.
        CheckpointError: something in the way, too little space, or gguf is not installed.
    """
    file = gguf_output(output)
    place = _local(str(folder))
    backbone = BackboneConfig(model_name=str(place))
    bare = bare_model(backbone)
    config = bare.config
    architecture = architecture_of(type(bare).__name__, config, place)
    weights = StoredWeights(place)
    tensors = model_tensors(weights, architecture, config, kind)
    rows = weights.shapes[f"{EMBEDDING}.weight"][0]
    vocabulary = vocabulary_of(load_tokenizer(backbone), rows, _generation(place), place)

    def describe(writer: "GGUFWriter") -> None:
        _describe(writer, architecture, config, kind, name=file.stem, rows=rows)
        vocabulary.add_to(writer)

    return write_gguf_file(file, architecture.name, describe, tensors)


def _local(name: str) -> Path:
    """The folder of a model."""
    backbone = BackboneConfig(model_name=name)
    if backbone.gguf_file is not None:
        raise BackboneError(f"`model_name={name}` is a GGUF file already")
    place = Path(model_source(backbone.model_name))
    if not place.is_dir():
        raise BackboneError(
            f"`model_name={name}` is no local directory; download it first, with hf download, and name its folder"
        )
    return place


def _generation(folder: Path) -> GenerationConfig | None:
    if not (folder / GENERATION).exists():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise BackboneError(f"{folder / GENERATION} cannot be read: {error}") from None


def _describe(
    writer: "GGUFWriter", architecture: Architecture, config: PreTrainedConfig, kind: GgufType, *, name: str, rows: int
) -> None:
    """Add the sizes of a model."""
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType, RopeScalingType  # type: ignore[import-not-found]

    size = head_size(config)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32 if kind is GgufType.f32 else LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if architecture.is_mixture:
        writer.add_expert_count(num_experts(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture.name in ("qwen2moe", "qwen3moe"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture.name == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
