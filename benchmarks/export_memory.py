"""Memory that `lmoe export --format native-moe` takes while it writes, beside the size of what it writes.

`python -m benchmarks.export_memory` makes a random Llama in bfloat16 and an adapter of experts, exports them in a
process of its own, and prints a line. RssAnon and RssShmem are counted: pages of files that are mapped or written are
the system's to drop.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lmoe
from lmoe.backbones.load import precision_of
from lmoe.export.native_moe import write_native_moe
from lmoe.export.native_plan import native_plan
from lmoe.export.record import record_of
from lmoe.pretrain.bpe import train_bpe
from lmoe.vocabulary import ExportFormat

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
EVERY = 0.002
"""Seconds between two looks."""


class OwnMemory:
    """The most that this process has held since the last call of `settled`, in MB."""

    def __init__(self) -> None:
        self.most = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._ended.wait(EVERY):
            self.most = max(self.most, own_memory())

    def settled(self) -> float:
        """What is held now; the count begins anew."""
        self.most = now = own_memory()
        return now

    @contextmanager
    def watched(self) -> Iterator["OwnMemory"]:
        """Look in the block."""
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join()


def own_memory() -> float:
    """MB of anonymous and of shared memory of this process; Linux alone counts them."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    found = [int(line.split()[1]) * 1024 / MB for line in status if line.startswith(("RssAnon:", "RssShmem:"))]
    assert len(found) == 2, "no RssAnon and RssShmem in the process status"
    return sum(found)


def make(folder: Path, *, layers: int, hidden: int, experts: int) -> None:
    """A base in bfloat16, and an adapter with experts in every layer."""
    tokenizer = train_bpe(["some words to have a tokenizer of"], 300, 128)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lmoe.inject(model, {"strategy": "moe_expert_lora", "num_experts": experts, "lora_r": 16, "lora_B_std": 0.01})
    lmoe.save(model, folder / "adapter", tokenizer=tokenizer, base_model=str(folder / "base"))


def measure(folder: Path) -> dict[str, float]:
    """Export what `make` has made, in this process, which must be a fresh one; MB."""
    model, tokenizer = lmoe.load(folder / "adapter")
    precision = precision_of(model)
    plan = native_plan(model, precision)
    record = record_of(folder / "adapter", folder / "out", ExportFormat.native_moe, precision)
    with OwnMemory().watched() as memory:
        held = memory.settled()
        write_native_moe(model, tokenizer, plan, folder / "out", record)
    return {
        "parameters": sum(p.numel() for p in model.parameters()) / MB,
        "written": plan.bytes / MB,
        "largest_tensor": max(tensor.bytes for tensor in plan.tensors) / MB,
        "held": held,
        "peak": memory.most,
    }


def main() -> int:
    """Make, measure, and print; or one of the first two, in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--only", choices=("make", "measure"))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.only == "make":
        make(given.folder, layers=given.layers, hidden=given.hidden, experts=given.experts)
    elif given.only == "measure":
        sys.stdout.write(json.dumps(measure(given.folder)) + "\n")
    else:
        sys.stdout.write(line(in_own_processes(given)) + "\n")
    return 0


def in_own_processes(given: argparse.Namespace) -> dict[str, float]:
    """What `measure` returns."""
    sizes = [f"--{name}={getattr(given, name)}" for name in ("layers", "hidden", "experts")]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("make", "measure"):
            command = [sys.executable, "-m", "benchmarks.export_memory", *sizes, "--only", part, "--folder", folder]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(done.stdout.splitlines()[-1])


def line(found: dict[str, float]) -> str:
    """The result in a sentence."""
    more = found["peak"] - found["held"]
    return (
        f"{found['written']:,.0f} MB written (largest tensor {found['largest_tensor']:,.0f} MB) of a model that holds "
        f"{found['held']:,.0f} MB: at most {found['peak']:,.0f} MB, {more:,.0f} MB more, "
        f"{100 * more / found['written']:.1f} % of what is written"
    )


if __name__ == "__main__":
    sys.exit(main())
