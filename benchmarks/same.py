"""Does the code still compute what it computed: `make same`.

Twelve short runs over strategies, routers, phases and exports, each through the commands that a user types. Their
adapters, metrics, exports and answers are hashed and compared with the hashes recorded by `make same ARGS=--record`.
A change that only moves code must leave all of them equal, on the same machine with the same libraries.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.machine import cpu_model

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "same.json"
TRAIN = (
    "trainer.max_steps=6",
    "trainer.val_every_n_steps=3",
    "data.max_length=96",
    "data.val_rows_per_domain=4",
    "injection.lora_r=4",
    "optim.warmup_steps=1",
    "logger=none",
)
NATIVE = "NATIVE"  # in an override: the folder of a base that is itself a mixture of experts
RUNS: dict[str, tuple[str, ...]] = {
    "warm_up": ("moe=top_k", "phase.phases.experts.start=2"),
    "taught_domains": ("injection.num_experts=8", "moe.router_fit_prompts=256"),
    "taught_clusters": ("moe.router_target=cluster", "moe.router_fit_prompts=256"),
    "joint_soft_two_windows": ("phase=joint", "moe=soft", "trainer.accumulate_grad_batches=2"),
    "sequence_dropout": ("phase=joint", "moe=sequence", "injection.lora_dropout=0.1"),
    "bias_balance_noise": (
        "moe.load_balance.type=aux_loss_free",
        "moe=noisy_top_k",
        "moe.load_balance.bias_update_rate=0.01",
    ),
    "block_top_p_unpacked": ("phase=joint", "moe=top_p", "moe.router_scope=block", "data.packing=false"),
    "expert_ffn_sigmoid": ("injection=moe_expert_lora", "moe=sigmoid", "phase=joint"),
    "native": (
        "injection=native_moe_expert_lora",
        f"backbone.model_name={NATIVE}",
        "injection.attn_lora.enabled=false",
    ),
    "dense": ("injection=dense_lora",),
    "oracle_shared_lora": ("moe=oracle", "phase=joint", "injection.num_experts=8", "injection.shared_lora_r=2"),
    "relu_factors": ("moe=relu", "phase=joint", "moe.mixing=factors", "data.packing=false"),
}
AFTER: dict[str, dict[str, tuple[str, ...]]] = {
    "warm_up": {
        "answer": ("generate", "--prompt", "Hello!", "--max-new-tokens", "12"),
        "losses": ("evaluate", "--limit", "4", "--output", "OUTPUT"),
        "peft-experts": ("export", "--format", "peft-experts", "--output", "OUTPUT"),
        "without": ("export", "--format", "lmoe", "--without-expert", "1", "--output", "OUTPUT"),
    },
    "taught_domains": {
        "answer": ("generate", "--prompt", "Hello!", "--max-new-tokens", "12"),
        "peft-experts": ("export", "--format", "peft-experts", "--output", "OUTPUT"),
    },
    "sequence_dropout": {"answer": ("generate", "--prompt", "Hello!", "--max-new-tokens", "12")},
    "dense": {
        "peft": ("export", "--format", "peft", "--output", "OUTPUT"),
        "merged": ("export", "--format", "merged", "--data", "none", "--output", "OUTPUT"),
    },
    "native": {"peft": ("export", "--format", "peft", "--output", "OUTPUT")},
}
TIMED = ("throughput/", "time/", "memory/")  # columns that no two runs share


def main() -> int:
    """Returns 0 if every hash equals the recorded one, or after recording."""
    flags = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="same-") as folder:
        native_base(Path(folder) / "native_base")
        made = {name: hashes(name, Path(folder)) for name in flags.run or RUNS}
    machine = {"cpu": cpu_model(), "torch": torch.__version__, "transformers": transformers.__version__}
    if flags.record:
        RECORD.write_text(json.dumps({"machine": machine, "hashes": made}, indent=1) + "\n", encoding="utf-8")
        print(f"Recorded in {RECORD.relative_to(ROOT)}.")
        return 0
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    if recorded["machine"] != machine:
        print(f"Recorded on {recorded['machine']}, here {machine}: bits may differ without a fault.")
    return 0 if compared(made, recorded["hashes"]) else 1


def compared(made: dict[str, dict[str, str]], recorded: dict[str, dict[str, str]]) -> bool:
    """True if all are equal; prints one line for each run."""
    all_equal = True
    for name, own in made.items():
        different = [what for what in own if own[what] != recorded[name].get(what)]
        missing = [what for what in recorded[name] if what not in own]
        all_equal &= not different and not missing
        verdict = "equal" if not different else f"DIFFERENT: {', '.join(different)}"
        print(f"{name:24s} {len(own)} hashes {verdict}{' MISSING: ' + ', '.join(missing) if missing else ''}")
    return all_equal


def hashes(name: str, folder: Path) -> dict[str, str]:
    """Returns a hash of each thing that one run leaves: adapter, metrics of each step, exports, answers, losses."""
    run = folder / name
    native = str(folder / "native_base")
    overrides = [override.replace(NATIVE, native) for override in (*TRAIN, *RUNS[name])]
    command("train", *overrides, f"hydra.run.dir={run}", f"data.cache_dir={folder / 'cache'}")
    found = {"adapter": tensors_of(run / "adapter"), "metrics": metrics_of(run / "metrics.csv")}
    for what, arguments in AFTER.get(name, {}).items():
        output = folder / f"{name}-{what}"
        words = [str(output) if word == "OUTPUT" else word for word in arguments]
        text = command(*words, "--checkpoint", str(run))
        if what == "answer":
            found[what] = digest([text.encode()])
        elif what == "losses":
            found[what] = digest([json.dumps(losses_in(output), sort_keys=True).encode()])
        else:
            found[what] = tensors_of(output)
    print(f"{name}: {', '.join(found)}", flush=True)
    return found


def command(*words: str) -> str:
    """What `lmoe …` prints, run in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", "from lmoe.cli.main import main; main()", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"lmoe {' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def tensors_of(folder: Path) -> str:
    """A hash of every safetensors file below a folder, by its path there."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files, f"no tensors in {folder}"
    return digest(part for file in files for part in (str(file.relative_to(folder)).encode(), file.read_bytes()))


def metrics_of(file: Path) -> str:
    """A hash of metrics.csv without the columns that hold times."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    kept = [sorted((key, value) for key, value in row.items() if not key.startswith(TIMED)) for row in rows]
    return digest([json.dumps(kept).encode()])


def losses_in(folder: Path) -> dict:
    """The losses of evaluation.json."""
    return json.loads(next(folder.rglob("*.json")).read_text(encoding="utf-8"))["losses"]


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts in their order, 16 hexadecimal digits."""
    made = hashlib.sha256()
    for part in parts:
        made.update(part)
    return made.hexdigest()[:16]


def native_base(folder: Path) -> None:
    """Writes a small base of four experts a layer, with the tokenizer of the bundled base."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,  # type: ignore[call-arg]
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.same", description=__doc__)
    made.add_argument("--record", action="store_true", help="write the hashes in place of comparing them")
    made.add_argument("--run", choices=list(RUNS), action="append", help="may be repeated; default: all")
    return made


if __name__ == "__main__":
    sys.exit(main())
