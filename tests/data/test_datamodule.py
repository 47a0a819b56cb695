"""TrainingData: the batches of a run."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lmoe.config.data import DataConfig
from lmoe.data.collate import Collate
from lmoe.data.datamodule import TrainingData
from lmoe.data.order import SeededBatches
from lmoe.data.prepare import prepare


def module(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any, *, packing: bool = False, num_workers: int = 0
) -> TrainingData:
    rows = [{"prompt": "What?", "response": "six " * (n % 17 + 1), "domain": "ab"[n % 2]} for n in range(60)]
    config = DataConfig(
        path=write_rows(*rows),
        cache_dir=str(tmp_path / "cache"),
        val_fraction=0.25,
        max_length=64,
        batch_size=4,
        packing=packing,
        num_workers=num_workers,
    )
    data = prepare(config, tokenizer, seed=0, bundled=Path("nowhere"), packing_model_type="qwen3")
    return TrainingData(
        data,
        config,
        units=lambda samples: samples.label_counts,
        collate=Collate,
        seed=0,
        max_steps=5,
        accumulate_grad_batches=3,
        pad_token_id=tokenizer.pad_token_id,
    )


def same(found: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]]) -> bool:
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_has_one_micro_batch_for_each_accumulation(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any, packing: bool
) -> None:
    batches = list(module(tokenizer, tmp_path, write_rows, packing=packing).train_dataloader())
    assert len(batches) == 15 and all(batch["input_ids"].shape[0] == 4 for batch in batches)
    assert all(("position_ids" in batch) == packing and ("attention_mask" in batch) != packing for batch in batches)
    assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in batches)


def test_workers_change_nothing_and_a_resumed_loader_goes_on(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any
) -> None:
    alone = list(module(tokenizer, tmp_path, write_rows).train_dataloader())
    helped = module(tokenizer, tmp_path, write_rows, num_workers=2)
    assert same(list(helped.train_dataloader()), alone)
    resumed = helped.train_dataloader()
    resumed.load_state_dict({"yielded": 7})
    assert same(list(resumed), alone[7:])
    plain = module(tokenizer, tmp_path, write_rows).val_dataloader()
    assert same(list(helped.val_dataloader()), list(plain))


def test_validation_sees_every_row_once_and_pads_little(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any
) -> None:
    data = module(tokenizer, tmp_path, write_rows, packing=True)
    batches = list(data.val_dataloader())
    seen = Counter(
        tuple(ids[mask].tolist()) for b in batches for ids, mask in zip(b["input_ids"], b["valid_mask"], strict=True)
    )
    assert seen == Counter(tuple(row.input_ids.tolist()) for row in data.prepared.val)
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    assert all("position_ids" not in batch for batch in batches)


def test_domains_of_tokens_are_those_of_their_rows(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any
) -> None:
    data = module(tokenizer, tmp_path, write_rows, packing=True)
    for batch in data.train_dataloader():
        starts = (batch["position_ids"] == 0).cumsum(1)
        for row in range(4):
            for segment in starts[row].unique():
                assert len(batch["domain_ids"][row][starts[row] == segment].unique()) == 1


WORKERS = """
import multiprocessing, os, subprocess, sys, threading, time
from torch.utils.data import DataLoader
from lmoe.data.collate import Collate
from lmoe.data.datamodule import _ignore_signals

# As W&B does: a thread in each fork, with the signal mask of the process.
os.register_at_fork(after_in_child=lambda: threading.Thread(target=time.sleep, args=(99,), daemon=True).start())

def read(fails):
    batches = iter(DataLoader(range(30), num_workers=1, persistent_workers=True, worker_init_fn=_ignore_signals))
    found = [next(batches)]
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "INT", "USR1", "USR2"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
        time.sleep(0.1)
    found += list(batches)
    assert [int(batch) for batch in found] == list(range(30)) and worker.is_alive()
    if fails:
        raise RuntimeError("in a validation")

read(fails=False)
read(fails=True)
"""


def test_signals_to_all_processes_leave_the_workers_at_work_and_no_worker_keeps_a_run_that_fails_from_ending():
    ended = subprocess.run([sys.executable, "-c", WORKERS], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("RuntimeError: in a validation"), ended.stderr


def test_the_samples_of_a_step_are_counted_once_for_all_its_micro_batches(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, index, seen = module(tokenizer, tmp_path, write_rows), SeededBatches.index, []
    monkeypatch.setattr(SeededBatches, "index", lambda order, position: seen.append(position) or index(order, position))
    totals = [data.window_totals(step) for step in (0, 0, 0, 1, 1, 1, 0)]
    assert seen == [*range(12), *range(12, 24), *range(12)]
    assert totals[0] == totals[2] == totals[6] and totals[3] == totals[5]
