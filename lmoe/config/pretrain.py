"""`lmoe pretrain`: train a small base model from scratch."""

from dataclasses import dataclass, field

from lmoe.config.checkpoint import CheckpointConfig
from lmoe.config.logger import LoggerConfig
from lmoe.config.optim import OptimConfig
from lmoe.config.trainer import TrainerConfig


@dataclass(slots=True, kw_only=True)
class CorpusConfig:
    """Plain text by domain, plus chats."""

    path: str | None = None
    """Folder of <domain>.txt or <domain>.txt.gz; paragraphs separated by a blank line."""
    chats_path: str | None = None
    """Folder of <domain>.jsonl or <domain>.jsonl.gz chat rows; null: no chats."""
    chats_exclude: str | None = None
    """JSONL file or folder of rows that must not be seen, e.g. the fine-tuning set."""
    chats_share: float = 0.05
    """Largest share of the tokens that are chats, 0 to 1."""
    held_out_share: float = 0.02
    """Tail of each domain's text that is kept out for the card."""
    held_out_min_bytes: int = 32768
    """Least size of that tail, in bytes."""
    sequence_length: int = 512
    """Tokens in one packed sequence."""
    batch_size: int = 16
    """Sequences in one micro-batch."""


@dataclass(slots=True, kw_only=True)
class BaseModelConfig:
    """A Qwen3-architecture model with its own byte-level BPE."""

    vocab_size: int = 4096
    """Tokens, the chat special tokens included."""
    hidden_size: int = 256
    """Width."""
    num_hidden_layers: int = 6
    """Decoder layers."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads."""
    head_dim: int = 64
    """Width of one head."""
    intermediate_size: int = 768
    """Width of the FFN."""
    max_position_embeddings: int = 2048
    """Longest context, in tokens."""


@dataclass(slots=True, kw_only=True)
class PretrainConfig:
    """The whole of one pre-training run."""

    name: str = "tiny"
    """Name of the run; part of the folder's path."""
    seed: int = 0
    """Seed of weights and data order."""
    resume: str | None = None
    """Run directory to continue."""
    output: str | None = None
    """Folder for the finished base and its card; null: <run>/base."""
    eval_sft: str | None = None
    """Chat rows (JSONL file or folder) on which the card states the base's assistant-token loss."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    model: BaseModelConfig = field(default_factory=BaseModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
