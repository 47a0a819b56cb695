"""What users do, once each: run by `make test-lowest` with the lowest versions that pyproject.toml allows."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import grouped_mm
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lmoe
from lmoe.cli.main import app
from lmoe.cli.train import main
from tests.conftest import process_state
from tests.run.as_rank import cut_back
from tests.tiny_models import tiny_model, tokens

COMMON = ("trainer.max_steps=4", "checkpoint.every_n_steps=1", "checkpoint.keep_last=10", "injection.lora_dropout=0")


@pytest.fixture(scope="module")
def runs(micro, tmp_path_factory) -> Path:
    """A folder with a mixture that checkpoints activations, the same cut after step 2 and resumed, and a plain LoRA."""
    folder = tmp_path_factory.mktemp("smoke")
    mixture = micro.changed(*COMMON, "trainer.gradient_checkpointing=true", f"hydra.run.dir={folder / 'mixture'}")
    plain = micro.changed(*COMMON, "injection=dense_lora", "phase=joint", f"hydra.run.dir={folder / 'plain'}")
    with process_state(folder) as patch:
        assert main(mixture) == 0
        cut_back(folder / "mixture", folder / "resumed", 2)
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        assert main([f"resume={folder / 'resumed'}"]) == 0
        assert main(plain) == 0
    return folder


def test_a_run_trains_and_leaves_adapter_metrics_and_report(runs):
    run = runs / "mixture"
    assert (run / "report/index.html").exists() and (run / "metrics.csv").read_text().count("\n") > 4
    assert json.loads((run / "adapter/lmoe_config.json").read_text())["injection"]["num_experts"] == 4


def test_a_run_resumes_bit_for_bit(runs):
    whole, resumed = (load_file(runs / name / "adapter/adapter.safetensors") for name in ("mixture", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_an_adapter_is_loaded_saved_again_and_generates(runs, tmp_path):
    model, tokenizer = lmoe.load(runs / "mixture")
    prompt = tokenizer("code 1: say red", return_tensors="pt")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    said = model.generate(input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], **settings)
    lmoe.save(model, tmp_path / "again", tokenizer=tokenizer)
    again, _ = lmoe.load(tmp_path / "again")
    same = again.generate(input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], **settings)
    assert torch.equal(said, same)


def test_a_plain_lora_is_exported_to_peft_and_blended(runs, micro, tmp_path):
    done = CliRunner().invoke(app, ["export", "--checkpoint", str(runs / "plain"), "--output", str(tmp_path / "peft")])
    assert done.exit_code == 0, done.output
    ids, own = tokens(), lmoe.load(runs / "plain")[0]
    with torch.no_grad():
        expected = own(ids).logits
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(micro.model), tmp_path / "peft").eval()
        base = AutoModelForCausalLM.from_pretrained(micro.model).eval()
        lmoe.Blend(base, {"one": tmp_path / "peft"}, {"one": 1.0})
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(base(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_the_command_line_generates_and_evaluates(runs):
    for command in (
        ["generate", "--checkpoint", str(runs / "mixture"), "--prompt", "code 1: say red", "--max-new-tokens", "2"],
        ["evaluate", "--checkpoint", str(runs / "mixture")],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("llama", "mixture_lora"), ("qwen3", "moe_expert_lora"), ("qwen3_moe", "native_moe_expert_lora")],
)
def test_each_strategy_trains_in_a_loop_of_ones_own(family, strategy):
    model, ids = tiny_model(family).train(), tokens()
    lmoe.inject(model, {"strategy": strategy, "lora_r": 4})
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        loss = model(input_ids=ids, labels=ids).loss + trace.auxiliary_loss()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n)


def test_a_selection_bias_moves_in_a_loop_of_ones_own():
    model, ids = tiny_model().train(), tokens()
    lmoe.inject(model, {"lora_r": 4}, {"router": "sigmoid"})
    with lmoe.trace(model, attention_mask=torch.ones_like(ids)) as trace:
        model(input_ids=ids)
        trace.auxiliary_loss()
    lmoe.balance(model)
    moved = [buffer for name, buffer in model.named_buffers() if name.endswith("selection_bias")]
    assert moved and all(bias.any() for bias in moved)


def test_torch_has_the_grouped_matmul_that_experts_are_computed_with():
    rows, matrices = torch.randn(4, 8), torch.randn(2, 8, 4)
    found = grouped_mm(rows, matrices, offs=torch.tensor([1, 4], dtype=torch.int32))
    torch.testing.assert_close(found, torch.cat([rows[:1] @ matrices[0], rows[1:] @ matrices[1]]))
