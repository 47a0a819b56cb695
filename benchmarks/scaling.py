"""The table of docs/SCALING.md: memory and time by formula, for bases of 0.6 to 70 billion parameters.

`python -m benchmarks.scaling` writes it between its markers; nothing is downloaded and no weights are made.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks import docs_table
from lmoe.cli.compose import compose_config
from lmoe.config.problems import raise_problems
from lmoe.config.read import read_section
from lmoe.config.run import RunConfig
from lmoe.estimate.cost import TFLOPS, UTILISATION, rough_duration
from lmoe.estimate.estimate import Estimate, estimate_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "SCALING.md"
BEGIN, END = "<!-- table: python -m benchmarks.scaling -->", "<!-- end of table -->"
SETTINGS = [
    "injection.num_experts=8",
    "moe=top_k",
    "injection.lora_r=16",
    "data.batch_size=4",
    "data.max_length=2048",
    "trainer.precision=bf16-mixed",
]
SHAPES = {
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "Qwen3-4B": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "Qwen3-8B": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "Llama-3.1-70B": ("llama", 8192, 28672, 80, 64, 8, 128, 128256, False),
}
"""Family, hidden, inner, layers, heads, key-value heads, head size, vocabulary, tied embeddings."""


@dataclass(slots=True, frozen=True)
class Case:
    """One row: a base, how its weights are stored, checkpointing, and devices that share the weights."""

    base: str
    precision: str
    checkpointing: bool
    shards: int = 1


CASES = (
    Case("Qwen3-0.6B", "bfloat16", False),
    Case("Qwen3-0.6B", "bfloat16", True),
    Case("Qwen3-4B", "bfloat16", False),
    Case("Qwen3-4B", "bfloat16", True),
    Case("Qwen3-4B", "nf4", True),
    Case("Qwen3-8B", "bfloat16", False),
    Case("Qwen3-8B", "bfloat16", True),
    Case("Qwen3-8B", "nf4", True),
    Case("Llama-3.1-70B", "bfloat16", True),
    Case("Llama-3.1-70B", "nf4", True),
    Case("Llama-3.1-70B", "bfloat16", True, 8),
    Case("Llama-3.1-70B", "bfloat16", True, 32),
)


def estimated(case: Case) -> Estimate:
    """The formulas on the base's shape."""
    chosen = [f"backbone.precision={case.precision}", f"trainer.gradient_checkpointing={case.checkpointing}"]
    config, reading = read_section(RunConfig, compose_config("train", RunConfig, [*SETTINGS, *chosen]))
    raise_problems(reading.problems)
    return estimate_model(config, bare(case.base), shards=case.shards)


def bare(base: str) -> PreTrainedModel:
    """The base on the meta device."""
    family, hidden, inner, layers, heads, keys, head_dim, vocabulary, tied = SHAPES[base]
    settings = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)


def row(case: Case) -> str:
    """One line of the table."""
    found = estimated(case)
    memory = found.memory
    trained = memory.adapters + memory.gradients + memory.optimizer
    parts = (
        memory.weights,
        memory.gathered,
        trained,
        memory.activations + memory.recomputed,
        memory.logits,
        memory.total,
    )
    rate = TFLOPS["H100"][0] * 1e12 * UTILISATION
    seconds = found.cost.step_seconds(found.tokens, rate)
    cells = [
        case.base,
        case.precision,
        "on" if case.checkpointing else "off",
        f"{case.shards}",
        *(f"{part / 1000:.1f}" for part in parts),
        rough_duration(seconds),
        rough_duration(seconds * 1000),
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table with its heads, in Markdown."""
    heads = ["base", "stored as", "checkpointing", "shared by", "weights", "gathered", "adapters, gradients, AdamW"]
    heads += ["activations", "logits", "total GB", "a step", "1,000 steps"]
    rule = "|---|---|---" + "|---:" * (len(heads) - 3) + "|"
    return "\n".join([f"| {' | '.join(heads)} |", rule, *(row(case) for case in CASES)])


def main() -> int:
    """Write the table into the page."""
    docs_table.put(table(), PAGE, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
