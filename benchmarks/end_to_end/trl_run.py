"""Fine-tune with TRL's SFTTrainer and a LoRA of PEFT, and say when each step has ended: a process of its own.

python -m benchmarks.end_to_end.trl_run SPEC.json, which holds a JSON object of the fields of `TrlJob`.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

LINEARS = ("gate_proj", "up_proj", "down_proj", "q_proj", "v_proj")
"""What carries a LoRA: of lmoe the first three the experts, the others a single one."""


@dataclass(slots=True, frozen=True, kw_only=True)
class TrlJob:
    """One run.

    Args:
        base: folder of the model.
        precision: how its frozen weights are stored, as torch names it.
        rows: JSON lines with `prompt` and `completion`, conversations both.
        rank: of the LoRA.
        steps, batch_size, max_length, packing, lr: of the run.
        output: the JSON file to write.
    """

    base: str
    precision: str
    rows: str
    rank: int
    steps: int
    batch_size: int
    max_length: int
    packing: bool
    lr: float
    output: str


def run(job: TrlJob) -> None:
    """Train, and write times of the steps and real tokens."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]  # of tests/public_packages.txt

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            times.append(time.time())

    folder = Path(job.output).with_suffix("")
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=job.steps,
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=job.lr,
        max_length=job.max_length,
        packing=job.packing,
        completion_only_loss=True,
        bf16=True,
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        seed=0,
        include_num_input_tokens_seen="non_padding",
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.base, dtype=job.precision),
        args=config,
        train_dataset=load_dataset("json", data_files=job.rows, split="train", cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(job.base),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=job.rank, lora_alpha=2 * job.rank, target_modules=list(LINEARS), lora_dropout=0.0
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    tokens = [entry["num_input_tokens_seen"] for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    text = json.dumps({"times": times, "tokens": tokens, "losses": losses})
    Path(job.output).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(TrlJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
