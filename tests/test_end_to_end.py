"""The real default, shortened: `python train.py injection=mixture_lora injection.num_experts=8` on the tiny base."""

import json
import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lmoe
from lmoe.cli.main import app
from lmoe.injection.tracing import adapters_off
from tests.metric_names import rows
from tests.micro import ROOT, finished, start
from tests.wandb_file import history, run_files

COMMAND = ("injection=mixture_lora", "injection.num_experts=8")
SHORT = ("trainer.max_steps=6", "data.val_rows_per_domain=2")
DOMAINS = ("code", "commonsense", "dialogue", "general", "math", "medical", "sql", "translation")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, str, str]:
    """The default run after its preflight: the run's folder, and what each wrote.

    The standard input is closed, and every proxy a dead end. The preflight has filled the cache: to tokenise takes more
    memory than to train this backbone, and the estimate is of training.
    """
    base = tmp_path_factory.mktemp("end")
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = (sys.executable, "train.py", *COMMAND, *SHORT)
    said = {}
    for name, more in {"none": ("dry_run=preflight",), "run": ()}.items():
        folders = (f"hydra.run.dir={base / name}", f"data.cache_dir={base / 'cache'}")
        said[name] = finished(start(*command, *more, *folders, cwd=ROOT, env=dead))
    return base / "run", said["run"], said["none"]


@pytest.fixture(scope="module")
def default_run(both) -> Path:
    return both[0]


def test_it_leaves_every_file_of_a_run(default_run):
    run = default_run
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
    first, *_, last = rows(default_run)
    assert (first["step"], last["step"]) == (0, 6)
    for domain in DOMAINS:
        assert first[f"val/{domain}/loss"] > 0
    assert last["val/loss"] < first["val/loss"]


def test_the_console_tells_losses_loads_places_and_the_next_command(both):
    _, said, _ = both
    said = " ".join(said.replace("\\\n", " ").split())  # long commands are continued on the next line
    for words in (*DOMAINS, "adapters off", "Load of each expert", "lmoe generate --checkpoint", "wandb sync"):
        assert words in said
    assert "Traceback" not in said
    assert "API key" not in said


def test_wandb_was_offline_and_holds_the_metrics(default_run):
    (file,) = run_files(default_run / "wandb")
    assert file.parent.name.startswith("offline-run-")
    logged = {name for row in history(file) for name in row}
    assert {"train/loss", "val/loss", "report/loss_curves._type"} <= logged


def test_load_gives_the_weights_of_the_last_step(default_run):
    """Logits of lmoe.load against a model that is built anew and takes its adapters from last.ckpt."""
    run = default_run
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
    arguments = ["generate", "--checkpoint", str(default_run), "--prompt", "it's a, b = {c}!", "--max-new-tokens", "8"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


def test_preflight_estimates_the_measured_peak_within_a_quarter(both):
    run, _, said = both
    found = re.search(r"total\s+([\d,]+) MB", said)
    assert found is not None
    estimate = float(found.group(1).replace(",", ""))
    measured = json.loads((run / "report" / "summary.json").read_text())["peak_memory_mb"]
    assert estimate == pytest.approx(measured, rel=0.25)
    assert not (run.parent / "none").exists()


def test_dry_run_config_is_quick_and_leaves_nothing(tmp_path):
    """Processor time, which a busy machine does not stretch as it does the clock; 6 s on the clock are promised."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = finished(start(sys.executable, ROOT / "train.py", "dry_run=config", cwd=tmp_path))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "config: no problems" in said
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 4
    assert list(tmp_path.iterdir()) == []
