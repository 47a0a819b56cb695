"""The frozen model that experts are put into."""

from dataclasses import dataclass

from lmoe.files.gguf import split_gguf
from lmoe.vocabulary import BackbonePrecision


@dataclass(slots=True, kw_only=True)
class BackboneConfig:
    """A Hugging Face causal language model."""

    model_name: str = "tiny"
    """Hub name, local directory, tiny (the base that ships with lmoe) or smollm2_q4 (SmolLM2-135M-Instruct, which
    `make real-base` writes into data/real/; LMOE_REAL_BASE names another place of it). folder/file.gguf sets gguf_file
    too."""
    gguf_file: str | None = None
    """GGUF file in the folder or hub repository that model_name names, read and dequantised to precision (pip install
    lmoe[gguf]); null: the folder holds a model in the format of Transformers."""
    precision: BackbonePrecision = BackbonePrecision.float32
    """How the frozen weights are stored: float32, bfloat16 or float16; int8 (LLM.int8 2208.07339) or nf4 (QLoRA
    2305.14314): their Linears quantised by bitsandbytes (pip install lmoe[quantised]), the rest in bfloat16."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null: the default branch."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, …; null: what Transformers chooses. A name with a slash is a kernel, code from
    the hub: only where the command line itself says so."""
    trust_remote_code: bool = False
    """Run code that comes with the model: only where the command line itself says so. The provenance names it."""

    def __post_init__(self) -> None:
        """Take a GGUF file at the end of model_name for gguf_file; two that differ stay, and are refused."""
        folder, file = split_gguf(self.model_name)
        if file is not None and self.gguf_file in (None, file):
            self.model_name, self.gguf_file = folder, file

    @property
    def full_name(self) -> str:
        """The base in one word, as every verb takes it: model_name, or folder/file.gguf."""
        return self.model_name if self.gguf_file is None else f"{self.model_name.rstrip('/')}/{self.gguf_file}"
