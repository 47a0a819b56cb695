"""The real default, shortened: `python train.py injection=mixture_lora injection.num_experts=8` on the tiny base."""

import json
import re
import resource
import subprocess
from pathlib import Path

import pytest
import torch

import lmoe
from lmoe.injection.apply import adapters_off
from tests.metric_names import rows
from tests.micro import ROOT, process
from tests.wandb_file import history, run_files

COMMAND = ("injection=mixture_lora", "injection.num_experts=8")
SHORT = ("trainer.max_steps=6", "data.val_rows_per_domain=2")
DOMAINS = ("code", "commonsense", "dialogue", "general", "math", "medical", "sql", "translation")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Where both processes keep the tokenised rows."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def default_run(tmp_path_factory, cache) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The default run and what it wrote; standard input closed, every proxy a dead end."""
    run = tmp_path_factory.mktemp("end") / "run"
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    arguments = ("train.py", *COMMAND, *SHORT, f"data.cache_dir={cache}", f"hydra.run.dir={run}")
    done = process(*arguments, cwd=ROOT, env=dead)
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done


def test_it_leaves_every_file_of_a_run(default_run):
    run, _ = default_run
    for name in (
        "config.yaml",
        "provenance.json",
        "metrics.csv",
        "wandb",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "adapter/lmoe_config.json",
        "adapter/adapter.safetensors",
        "adapter/tokenizer.json",
        "report/index.html",
        "report/summary.json",
        "report/loss_curves.png",
        "report/load_by_site.png",
        "report/load_by_domain.png",
    ):
        assert (run / name).exists(), name
    assert not list(run.rglob("*.partial"))


def test_the_first_row_is_the_base_and_the_last_is_better(default_run):
    first, *_, last = rows(default_run[0])
    assert (first["step"], last["step"]) == (0, 6)
    for domain in DOMAINS:
        assert first[f"val/{domain}/loss"] > 0
    assert last["val/loss"] < first["val/loss"]


def test_the_console_tells_losses_loads_places_and_the_next_command(default_run):
    _, done = default_run
    for words in (*DOMAINS, "adapters off", "Load of each expert", "lmoe generate --checkpoint", "wandb sync"):
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    assert "API key" not in done.stdout + done.stderr


def test_wandb_was_offline_and_holds_the_metrics(default_run):
    (file,) = run_files(default_run[0] / "wandb")
    assert file.parent.name.startswith("offline-run-")
    logged = {name for row in history(file) for name in row}
    assert {"train/loss", "val/loss", "report/loss_curves._type"} <= logged


def test_load_gives_the_weights_of_the_last_step(default_run):
    """Logits of lmoe.load against a model that is built anew and takes its adapters from last.ckpt."""
    run, _ = default_run
    model, tokenizer = lmoe.load(run)
    ids = tokenizer("What is 2 + 2?\n\nSELECT name FROM people;", return_tensors="pt")["input_ids"]
    other, _ = lmoe.load(run)
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name or name.endswith("router.weight"):
                parameter.zero_().copy_(saved.pop(f"model.{name}"))
        assert saved == {}
        logits = model(ids).logits
        torch.testing.assert_close(logits, other(ids).logits, rtol=0, atol=0)
        with adapters_off(model):
            assert not torch.allclose(logits, model(ids).logits)


def test_generate_writes_text(default_run):
    command = ("-c", "from lmoe.cli.main import main; main()", "generate", "--checkpoint", str(default_run[0]))
    done = process(*command, "--prompt", "it's a, b = {c}!", "--max-new-tokens", "8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_preflight_estimates_the_measured_peak_within_a_quarter(default_run, cache, tmp_path):
    run, _ = default_run
    arguments = (*COMMAND, *SHORT, f"data.cache_dir={cache}", "dry_run=preflight")
    done = process("train.py", *arguments, f"hydra.run.dir={tmp_path / 'none'}", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"total\s+([\d,]+) MB", done.stdout)
    assert found is not None
    estimate = float(found.group(1).replace(",", ""))
    measured = json.loads((run / "report" / "summary.json").read_text())["peak_memory_mb"]
    assert estimate == pytest.approx(measured, rel=0.25)
    assert not (tmp_path / "none").exists()


def test_dry_run_config_is_quick_and_leaves_nothing(tmp_path):
    """Processor time, which a busy machine does not stretch as it does the clock; 6 s on the clock are promised."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process(str(ROOT / "train.py"), "dry_run=config", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "config: no problems" in done.stdout
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 4
    assert list(tmp_path.iterdir()) == []
