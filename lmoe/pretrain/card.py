"""The card of a pre-trained base: what it read, how well it predicts, how it was made."""

import gzip
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.backbones.label_losses import LabelLosses
from lmoe.config.data import DataConfig
from lmoe.data.collate import Collate
from lmoe.data.datamodule import TrainingData
from lmoe.data.prepare import prepare
from lmoe.files.resources import resource_dir
from lmoe.metrics.language import DomainLoss
from lmoe.objectives.model_inputs import ModelInputs
from lmoe.ops.labels import IGNORE
from lmoe.pretrain.corpus import DomainText, Windows
from lmoe.report.markdown import front_matter, plain, table


@dataclass(slots=True, frozen=True, kw_only=True)
class HeldOut:
    """One domain's held-out text.

    Args:
        size: bytes of UTF-8.
        bits_per_byte: total loss of its tokens in bits, over its bytes.
        gzip_bits_per_byte: of gzip -9 on the same text.
    """

    size: int
    bits_per_byte: float
    gzip_bits_per_byte: float


@torch.no_grad()
def held_out_figures(model: PreTrainedModel, texts: list[DomainText], windows: Windows) -> dict[str, HeldOut]:
    """Bits per byte of every domain: every token is predicted once, so the sum covers the whole text."""
    metric, label_losses = DomainLoss([text.name for text in texts]), LabelLosses(model)
    model.eval()
    for batch in DataLoader(windows, batch_size=16):
        losses = label_losses({"input_ids": batch["input_ids"]}, batch["labels"])
        metric.update(losses, batch["labels"] != IGNORE, batch["domain"][:, None])
    figures = {}
    for text, nats in zip(texts, metric.loss_sum.tolist(), strict=True):
        raw = text.held_out.encode("utf-8")
        figures[text.name] = HeldOut(
            size=len(raw),
            bits_per_byte=nats / math.log(2) / len(raw),
            gzip_bits_per_byte=8 * len(gzip.compress(raw, 9)) / len(raw),
        )
    return figures


@torch.no_grad()
def chat_losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: str) -> dict[str, float]:
    """Loss in nats per assistant token by domain, on chat rows that the base has not seen."""
    config = DataConfig(path=rows, val_path=rows, max_length=1024)
    prepared = prepare(config, tokenizer, seed=0, bundled=resource_dir("data"), packing_model_type=None)
    data = TrainingData(
        prepared,
        config,
        units=lambda samples: samples.label_counts,
        collate=Collate,
        seed=0,
        max_steps=1,
        accumulate_grad_batches=1,
        pad_token_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
    )
    metric = DomainLoss(prepared.domains)
    inputs, label_losses = ModelInputs(model), LabelLosses(model)
    model.eval()
    for batch in data.val_dataloader():
        labels = batch["labels"][:, 1:]
        metric.update(label_losses(inputs(batch), labels), labels != IGNORE, batch["domain_ids"][:, 1:])
    return {name.removesuffix("/loss"): loss for name, loss in metric.compute().items() if name != "loss"}


def card_text(
    *,
    model: PreTrainedModel,
    token_counts: Mapping[str, int],
    tokens_seen: int,
    held_out: Mapping[str, HeldOut],
    chats: Mapping[str, float],
    command: str,
    versions: str,
) -> str:
    """README.md of the base, in Markdown."""
    parameters = sum(p.numel() for p in model.parameters())
    config = model.config
    total = sum(token_counts.values())
    base_mean = _mean([figures.bits_per_byte for figures in held_out.values()])
    gzip_mean = _mean([figures.gzip_bits_per_byte for figures in held_out.values()])
    mean = ["mean", "", f"{base_mean:.3f}", f"{gzip_mean:.3f}"]
    lines = [
        *front_matter({"license": "cc-by-sa-4.0", "library_name": "transformers", "pipeline_tag": "text-generation"}),
        "# lmoe tiny base",
        "",
        f"A causal language model of {parameters:,} parameters in the Qwen3 architecture, pre-trained from scratch on "
        f"{tokens_seen:,} tokens. It is small enough to fine-tune in minutes on two CPU cores, and is made for trying "
        "out mixtures of LoRA experts, not for answering anybody's questions.",
        "",
        f"Hidden size {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} query and "
        f"{config.num_key_value_heads} key/value heads of {config.head_dim}, FFN {config.intermediate_size}, tied "
        f"embeddings, context {config.max_position_embeddings}, vocabulary {config.vocab_size} (its own byte-level BPE "
        "with ChatML turns). Weights in bfloat16.",
        "",
        "## Data",
        "",
        *table(
            ["part", "tokens", "share"],
            [
                *([plain(name), f"{count:,}", f"{count / total:.1%}"] for name, count in token_counts.items()),
                ["all", f"{total:,}", ""],
            ],
        ),
        "",
        f"{tokens_seen:,} tokens were seen, {tokens_seen / total:.2f} passes. `chats` are instruction rows in the chat "
        "template; none of them is among the rows of `data/sft/`. Sources: see `data/README.md`.",
        "",
        "## Held-out text",
        "",
        "Bits per byte on the tail of each domain, which was kept out of the training; gzip -9 on the same bytes.",
        "",
        *table(["domain", "bytes", "base", "gzip -9"], [*(_held_out_row(n, h) for n, h in held_out.items()), mean]),
        "",
    ]
    if chats:
        lines += [
            "## Instruction rows it has not seen",
            "",
            "Loss in nats per assistant token on the validation rows of `data/sft/`, before any fine-tuning.",
            "",
            *table(
                ["domain", "loss"],
                [
                    *([plain(name), f"{loss:.3f}"] for name, loss in chats.items()),
                    ["mean", f"{_mean(list(chats.values())):.3f}"],
                ],
            ),
            "",
        ]
    lines += [
        "## How it was made",
        "",
        f"`{command}` ({versions}).",
        "",
        "![Training and validation loss](loss_curve.png)",
        "",
        "## Licence",
        "",
        "CC BY-SA 4.0, since parts of the text are share-alike; the code around it is Apache-2.0. Sources, licences "
        "and attribution are in `data/README.md`. The text was filtered only crudely.",
        "",
    ]
    return "\n".join(lines)


def write_card(folder: Path, text: str) -> None:
    """README.md beside the weights."""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _held_out_row(name: str, figures: HeldOut) -> list[str]:
    return [plain(name), f"{figures.size:,}", f"{figures.bits_per_byte:.3f}", f"{figures.gzip_bits_per_byte:.3f}"]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
