"""The frozen model that experts are put into."""

from dataclasses import dataclass

from lmoe.vocabulary import BackbonePrecision


@dataclass(slots=True, kw_only=True)
class BackboneConfig:
    """A Hugging Face causal language model."""

    model_name: str = "tiny"
    """Hub name, local directory, or tiny (the base that ships with lmoe)."""
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
