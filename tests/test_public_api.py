"""What users call, as DESIGN.md 8 writes it."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.pretrain.bpe import train_bpe
from tests.tiny_models import randomise, tiny_model


def test_importing_lmoe_imports_no_heavy_library():
    code = "import sys, lmoe; print([m for m in ('torch', 'transformers', 'lightning', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_inject_trace_save_and_load_work_as_documented(tmp_path):
    tokenizer = train_bpe(["it's a, b = {c}!"], 300, 64)
    base = tiny_model(vocab_size=300, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.randint(4, 300, (2, 4)), "attention_mask": mask}
    batch["labels"] = batch["input_ids"].masked_fill(mask == 0, -100)

    plan = lmoe.inject(model, injection={"num_experts": 8}, moe={"router_z_loss_coef": 0.01})
    with lmoe.trace(model, attention_mask=mask) as trace:
        loss = model(**batch).loss + trace.auxiliary_loss()
    loss.backward()
    assert "8 experts" in str(plan)
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters() if p.requires_grad)

    randomise(model)
    lmoe.save(model, tmp_path / "my_adapter")
    loaded, its_tokenizer = lmoe.load(str(tmp_path / "my_adapter"))
    inputs = its_tokenizer("it's a", return_tensors="pt")
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        loaded.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings),
        model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings),
    )


@pytest.mark.parametrize("name", lmoe.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(lmoe, name).__doc__


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lmoe' has no attribute 'nothing'"):
        lmoe.nothing  # noqa: B018 - reading the attribute is the test
