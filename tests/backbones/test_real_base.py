"""On SmolLM2-135M-Instruct, whose weights the public packages bring: what random weights cannot show."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lmoe
from lmoe.backbones.load import load_model, load_tokenizer
from lmoe.blend.blend import Blend
from lmoe.cli.main import app
from lmoe.cli.train import main
from lmoe.config.backbone import BackboneConfig
from lmoe.files.resources import REAL_BASE
from lmoe.vocabulary import BackbonePrecision
from tests.conftest import process_state
from tests.metric_names import rows
from tests.public_packages import real_base
from tests.tiny_models import randomise

BACKBONE = BackboneConfig(model_name=REAL_BASE, precision=BackbonePrecision.bfloat16)
SMALL = (
    *("data.path=data/sft/train/sql.jsonl", "data.val_path=data/sft/val/sql.jsonl", "data.max_length=96"),
    *("data.batch_size=1", "data.val_rows_per_domain=2", "trainer.max_steps=2", "trainer.enable_progress_bar=false"),
    *("injection=dense_lora", "optim.warmup_steps=0", "logger=none"),
)


@pytest.fixture(scope="module", autouse=True)
def place() -> Path:
    """The folder of the real base, named to every test here."""
    folder = real_base()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMOE_REAL_BASE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """`one`, a run of two steps of plain LoRA, and `two`, an adapter of random numbers."""
    folder = tmp_path_factory.mktemp("real")
    with process_state(Path.cwd()) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        places = [f"data.cache_dir={folder / 'cache'}", f"hydra.run.dir={folder / 'one'}"]
        assert main([*SMALL, *places, f"backbone={REAL_BASE}"]) == 0
    model = load_model(BACKBONE)
    lmoe.inject(model, injection={"strategy": "dense_lora", "lora_r": 2})
    randomise(model, std=0.02)
    lmoe.save(model, folder / "two")
    return folder


def test_two_steps_on_the_real_base_lower_its_loss_from_that_of_a_model_that_knows_english(adapters):
    first, last = rows(adapters / "one")[0], rows(adapters / "one")[-1]
    before, after = float(first["val/sql/loss"]), float(last["val/sql/loss"])
    assert after < before < 3.0  # uniform over its vocabulary would be 10.8
    stored = json.loads((adapters / "one/adapter/lmoe_config.json").read_text())["base_model"]
    assert (stored["name"], stored["precision"]) == (REAL_BASE, "bfloat16")


def test_two_adapters_are_blended_over_the_real_base_as_each_of_them_works_alone(adapters):
    exact = replace(BACKBONE, precision=BackbonePrecision.float32)  # so that rounding hides nothing
    model, tokenizer = load_model(exact), load_tokenizer(exact)
    tokens = tokenizer("SELECT name FROM table WHERE", return_tensors="pt")
    with torch.no_grad():
        base = model(**tokens).logits
        trained = load_model(exact)
        lmoe.attach(trained, adapters / "one")
        alone = trained(**tokens).logits
        with Blend(model, {"one": adapters / "one", "two": adapters / "two"}, {"one": 1, "two": 0}) as blend:
            first = model(**tokens).logits
            blend.weights = {"one": 0.5, "two": 0.5}
            half = model(**tokens).logits
    torch.testing.assert_close(first, alone, atol=1e-3, rtol=1e-4)
    assert (first - base).abs().max() > 0.1 and (half - first).abs().max() > 0.1
    assert torch.equal(model(**tokens).logits, base)


def test_the_real_base_answers_a_question():
    prompt = "What is the capital of France?"
    call = ["generate", "--model", REAL_BASE, "--precision", "bfloat16", "--prompt", prompt, "--max-new-tokens", "12"]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert "Paris" in done.output
