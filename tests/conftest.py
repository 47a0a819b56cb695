"""What tests of whole runs share; see tests/micro.py."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

# One thread a process: on models this small more are no faster, and beside other work they wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Neither a W&B account nor a download, whatever the machine has.
os.environ.update({"HF_HUB_OFFLINE": "1", "NETRC": os.devnull})
for _name in [name for name in os.environ if name.startswith("WANDB_")]:
    del os.environ[_name]

TEXTS = ("it's a, b = {c}! Answer the question.", "user and assistant say hello to the user and the assistant.")
VOCAB, CONTEXT = 300, 96


@dataclass(frozen=True, kw_only=True)
class Done:
    """A command that has ended.

    Args:
        code: its exit code.
        out, err: what it wrote.
        run: its run directory.
    """

    code: int
    out: str
    err: str
    run: Path

    @property
    def text(self) -> str:
        """Everything it wrote, in one line, so that a line break of the terminal hides nothing."""
        return " ".join((self.out + " " + self.err).split())


@contextmanager
def process_state(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """Put back what a run in this process changes: arguments, environment, working directory, torch, Hydra."""
    import torch
    from hydra.core.global_hydra import GlobalHydra

    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(sys.argv))
        for name in ("HYDRA_FULL_ERROR", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "WANDB_MODE", "WANDB_RUN_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", "200")
        # Hydra composes everything once more to ask whether the config chooses a multirun; here only -m does.
        patch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *_self, **_config: None)
        patch.chdir(folder)
        yield patch
    torch.use_deterministic_algorithms(deterministic)
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory):
    """The micro backbone and its rows."""
    from tests.micro import make_micro

    return make_micro(tmp_path_factory.mktemp("micro"))


@pytest.fixture
def restored(tmp_path: Path) -> Iterator[None]:
    """The test works in its own folder, and what a run changes in this process is put back."""
    with process_state(tmp_path):
        yield


@pytest.fixture
def train(restored: None, micro, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run `lmoe train` on the micro backbone in this process; `run` names the run directory.

    The report has its page but no pictures, which take longer than the rest, unless the test asks for them.
    """
    from lmoe.cli.train import main

    def command(*overrides: str, run: str = "run", settings: bool = True, pictures: bool = False) -> Done:
        folder = tmp_path / run
        own_place = any(o.startswith(("resume=", "-m", "hydra.run.dir=")) for o in overrides)
        given = micro.changed(*overrides) if settings else list(overrides)
        with pytest.MonkeyPatch.context() as patch:
            if not pictures:
                patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
            capsys.readouterr()
            code = main(given if own_place else [*given, f"hydra.run.dir={folder}"])
        out, err = capsys.readouterr()
        return Done(code=code, out=out, err=err, run=folder)

    return command


@pytest.fixture(scope="session")
def finished_run(micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the micro backbone with all it leaves but pictures, shared: copy it before changing it."""
    from lmoe.cli.train import main

    base = tmp_path_factory.mktemp("finished")
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        assert main([*micro.changed(), f"hydra.run.dir={base / 'run'}"]) == 0
    return base / "run"


@pytest.fixture(scope="session")
def sft_dpo_run(micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, of which the second learns by dpo from pairs of two of the three domains; shared."""
    from lmoe.cli.train import main
    from tests.pair_rows import write_pairs

    base = tmp_path_factory.mktemp("sft_dpo")
    for part, first in (("train", 0), ("val", 100)):
        write_pairs(base / part, rows=4, first=first)
    rows = f"{{path: {base / 'train'}, val_path: {base / 'val'}, batch_size: 4}}"
    overrides = (
        *("phase=joint", "trainer.max_steps=2", "optim.lr=0.02", "optim.warmup_steps=0"),
        f"+phase.phases.prefer={{start: 1, trainable: [lora, router], task: {{name: dpo}}, data: {rows}}}",
    )
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        assert main([*micro.changed(*overrides), f"hydra.run.dir={base / 'run'}"]) == 0
    return base / "run"


@pytest.fixture
def own_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that the test may change."""
    return Path(shutil.copytree(finished_run, tmp_path / "own"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base on disk with its tokenizer, and an adapter for it that is away from its start.

    base: model directory; run: run directory; adapter: its adapter; model: in memory, as it was saved.
    """
    from transformers import AutoModelForCausalLM

    import lmoe
    from lmoe.pretrain.bpe import train_bpe
    from tests.tiny_models import randomise, tiny_model

    folder = tmp_path_factory.mktemp("trained")
    base, run = folder / "base", folder / "run"
    tokenizer = train_bpe(TEXTS, VOCAB, CONTEXT)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    tiny_model(vocab_size=VOCAB, max_position_embeddings=CONTEXT, **ids).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    lmoe.inject(model, injection={"lora_r": 4, "num_experts": 3})
    randomise(model, std=0.2)
    lmoe.save(model, run / "adapter", tokenizer=tokenizer)
    (run / "config.yaml").write_text("seed: 0\n")
    return SimpleNamespace(base=base, run=run, adapter=run / "adapter", model=model, tokenizer=tokenizer)
