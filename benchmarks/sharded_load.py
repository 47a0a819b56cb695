"""Memory that each of two processes takes while a base is loaded that they share (`trainer=fsdp2`), beside its size.

`python -m benchmarks.sharded_load` writes a random Llama of about 1 GB in bfloat16, trains one step of it in two
processes with gloo, and prints what each has held at most above its imports until it had its share on its device, and
until the end. RssAnon and RssShmem are counted: pages of files that are mapped are the system's to drop. `--whole` has
each process read the whole base first.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from transformers import LlamaConfig, LlamaForCausalLM

import lmoe.run.base
from benchmarks.export_memory import MB, OwnMemory
from lmoe.cli.train import main as train
from lmoe.pretrain.bpe import PAD, TURN_END, train_bpe
from lmoe.training.sharded import ShardedStrategy

ROOT = Path(__file__).resolve().parents[1]
PROCESSES, SHARE, BESIDE_MB = 2, 0.65, 300.0
"""How many processes, and what each may hold: a share of the base, and so many MB beside it."""
ROW = {"messages": [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red red"}]}


def make(folder: Path, *, layers: int, hidden: int, dtype: str, shard: str) -> None:
    """A base with its tokenizer, and rows."""
    tokenizer = train_bpe(["say red red red"], 300, 128)
    config = LlamaConfig(
        vocab_size=32_000 if hidden > 256 else 512,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    LlamaForCausalLM(config).save_pretrained(folder / "base", max_shard_size=shard)
    tokenizer.save_pretrained(folder / "base")
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text(f"{json.dumps(ROW)}\n" * 8, encoding="utf-8")


def measure(folder: Path, *, precision: str, whole: bool) -> dict[str, float]:
    """Train one step as one of the processes that the environment tells of, which must be a fresh one; MB."""
    if whole:
        lmoe.run.base.unread_model = lambda config: "asked for"
    set_up = ShardedStrategy.setup
    with OwnMemory().watched() as memory:
        found = {"imports": memory.settled()}

        def setup(self: ShardedStrategy, trainer: Trainer) -> None:
            set_up(self, trainer)
            most, now = memory.most, memory.settled()
            found["loading"], found["loaded"] = max(most, now) - found["imports"], now - found["imports"]

        ShardedStrategy.setup = setup
        code = train(
            [
                *(f"backbone.model_name={folder / 'base'}", f"backbone.precision={precision}"),
                *(f"data.path={folder / 'train.jsonl'}", f"data.val_path={folder / 'val.jsonl'}", "data.packing=false"),
                *("data.batch_size=1", "data.max_length=32", f"data.cache_dir={folder / 'cache'}"),
                *("injection.num_experts=2", "injection.lora_r=4", "moe=top_k", "phase=joint", "logger=none"),
                *("trainer.strategy=fsdp2", f"trainer.devices={PROCESSES}", "trainer.precision=bf16-mixed"),
                *("trainer.max_steps=1", "trainer.val_every_n_steps=0", "trainer.enable_progress_bar=false"),
                f"hydra.run.dir={folder / 'run'}",
            ]
        )
        found["training"] = max(memory.most - found["imports"], found["loading"])
    if code:
        raise SystemExit(code)
    return found


def main() -> int:
    """Make, measure, and print; or one of the first two, in a process of its own.

    Returns:
        0: every process held what it may; with --whole whatever it held.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded_load", description=__doc__)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the files")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the run")
    parser.add_argument("--shard", default="50GB", help="largest size of a file")
    parser.add_argument("--whole", action="store_true", help="let each process read the whole base")
    parser.add_argument("--only", choices=("make", "measure"))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.only == "make":
        make(given.folder, layers=given.layers, hidden=given.hidden, dtype=given.dtype, shard=given.shard)
    elif given.only == "measure":
        sys.stdout.write("\n" + json.dumps(measure(given.folder, precision=given.precision, whole=given.whole)) + "\n")
    else:
        base, found = in_own_processes(sys.argv[1:])
        base *= {"bfloat16": 2, "float32": 4}[given.precision] / {"bfloat16": 2, "float32": 4}[given.dtype]
        sys.stdout.write(lines(base, found) + "\n")
        return 0 if given.whole or max(each["loading"] for each in found) <= limit(base) else 1
    return 0


def in_own_processes(words: list[str]) -> tuple[float, list[dict[str, float]]]:
    """MB of the base's files, and what `measure` returns in each process."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        command = [sys.executable, "-m", "benchmarks.sharded_load", *words, "--folder", folder, "--only"]
        subprocess.run([*command, "make"], cwd=ROOT, check=True, capture_output=True)
        started = []
        for rank in map(str, range(PROCESSES)):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "benchmark"}
            sizes = {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES)}
            env = {**os.environ, **ranks, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([*command, "measure"], cwd=ROOT, env=env, **pipes))  # type: ignore[call-overload]
        said = [process.communicate() for process in started]
        for process, (_, errors) in zip(started, said, strict=True):
            if process.returncode:
                raise RuntimeError(errors[-3000:])
        size = sum(file.stat().st_size for file in Path(folder, "base").glob("*.safetensors")) / MB
        return size, [json.loads(out.splitlines()[-1]) for out, _ in said]


def limit(base: float) -> float:
    """MB that a process may hold above its imports while it loads."""
    return SHARE * base + BESIDE_MB


def lines(base: float, found: list[dict[str, float]]) -> str:
    """The result, a line for each process."""
    said = [f"a base of {base:,.0f} MB in {PROCESSES} processes; at most {limit(base):,.0f} MB each above imports"]
    for rank, each in enumerate(found):
        said.append(
            f"  process {rank}: {each['imports']:,.0f} MB after imports; {each['loading']:,.0f} MB more at most while "
            f"loading ({each['loading'] / base:.2f} of the base), {each['loaded']:,.0f} MB loaded, "
            f"{each['training']:,.0f} MB at most in the run"
        )
    return "\n".join(said)


if __name__ == "__main__":
    sys.exit(main())
