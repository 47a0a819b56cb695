"""A backbone of two layers, a few rows, and a training of a second: what the tests of whole runs share."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lmoe.config.run import RunConfig
from lmoe.pretrain.bpe import PAD, TURN_END, train_bpe
from lmoe.rules.validate import validate
from lmoe.run.parts import Parts, build_parts
from tests.composing import compose

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("red", "green", "blue", "seven", "eight", "nine", "river", "stone", "tree", "cloud", "bird", "fish")
DOMAINS = ("code", "math", "words")
STEPS, WARM_UP = 6, "phase.phases.experts.start=33%"
SUPERVISED = "moe=supervised"
"""Which has one phase."""


@dataclass(frozen=True, kw_only=True)
class Micro:
    """Where the pieces are.

    Args:
        model: directory of the backbone and its tokenizer.
        native: the same with a backbone that is a mixture of four experts already.
        train, val: folders with a JSONL file a domain.
        cache: of tokenised rows.
    """

    model: Path
    native: Path
    train: Path
    val: Path
    cache: Path

    @property
    def overrides(self) -> list[str]:
        """A run of six steps in float32 of routers that choose for each token, which logs to metrics.csv alone."""
        return [
            "moe=top_k",
            f"backbone.model_name={self.model}",
            f"data.path={self.train}",
            f"data.val_path={self.val}",
            f"data.cache_dir={self.cache}",
            "data.max_length=48",
            "data.packing=false",
            "data.val_rows_per_domain=0",
            "data.batch_size=4",
            "injection.lora_r=4",
            "optim.warmup_steps=1",
            "trainer.precision=32-true",
            f"trainer.max_steps={STEPS}",
            "trainer.val_every_n_steps=0",
            "trainer.enable_progress_bar=false",
            "logger=none",
        ]

    def changed(self, *overrides: str) -> list[str]:
        """Its overrides with others in place of those of the same key; routers warm up for a third of the run."""
        keys = {override.split("=", 1)[0].lstrip("+") for override in overrides}
        if "experiment" in keys:  # which chooses the routers
            keys.add("moe")
        kept = [o for o in self.overrides if o.split("=", 1)[0] not in keys]
        own_phases = SUPERVISED in overrides or any(key.startswith(("phase", "experiment")) for key in keys)
        return [*kept, *([] if own_phases else [WARM_UP]), *overrides]

    def config(self, *overrides: str) -> RunConfig:
        """The validated config of such a run."""
        config = compose("train", RunConfig, self.changed(*overrides))
        validate(config)
        return config

    def parts(self, *overrides: str) -> Parts:
        """Its parts, built."""
        return build_parts(self.config(*overrides))


def make_micro(folder: Path) -> Micro:
    """Save the backbone with its tokenizer, and write the rows."""
    write_rows(folder / "train", rows=10, first=0)
    write_rows(folder / "val", rows=3, first=100)
    model = folder / "model"
    texts = [file.read_text(encoding="utf-8") for file in sorted((folder / "train").iterdir())]
    tokenizer = train_bpe(texts, 320, 128)
    tokenizer.save_pretrained(model)
    torch.manual_seed(1)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # logits far from flat, so that a wrong weight shows
        "eos_token_id": tokenizer.convert_tokens_to_ids(TURN_END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "bos_token_id": None,
    }
    Qwen3ForCausalLM(Qwen3Config(**settings)).save_pretrained(model)
    native = folder / "native"
    tokenizer.save_pretrained(native)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, **experts)).save_pretrained(native)
    return Micro(model=model, native=native, train=folder / "train", val=folder / "val", cache=folder / "cache")


def write_rows(folder: Path, *, rows: int, first: int) -> None:
    """One JSONL file a domain; answers of very different lengths."""
    folder.mkdir(parents=True)
    for shift, domain in enumerate(DOMAINS):
        lines = []
        for number in range(first, first + rows):
            word = WORDS[(number + shift) % len(WORDS)]
            answer = " ".join([word] * (1 + 3 * ((number + shift) % 4)))
            messages = [
                {"role": "user", "content": f"{domain} {number}: say {word}"},
                {"role": "assistant", "content": answer},
            ]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")


def start(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process with the standard input closed, no W&B account and no network; `finished` waits for it."""
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=bare_environment() | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """What a process wrote; it must end well."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return out + err


def bare_environment() -> dict[str, str]:
    """This process's environment without W&B settings, without an account, and offline for the hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA", "PL_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "NETRC": os.devnull, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def saved_config(run: Path) -> dict:
    """config.yaml of a run."""
    loaded = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert isinstance(loaded, dict)
    return loaded
