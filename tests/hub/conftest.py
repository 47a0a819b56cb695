"""The hub of these tests, a run whose rows and names are secrets, and what is signed in."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import process_state
from tests.hub.stand_in import TOKEN, StandIn, standing_in

SECRET = "zanzibar-4711"
"""Stands in every row of the secret run, in the name of the folder of its rows, and in that of its base."""


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is signed in, nothing was downloaded, and what xet would send by itself goes by LFS."""
    import huggingface_hub.constants as constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def hub(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The stand-in, reached as HF_ENDPOINT and HF_HUB_OFFLINE=0 do when a process begins."""
    import huggingface_hub.constants as constants

    with standing_in() as there:
        monkeypatch.setattr(constants, "ENDPOINT", there.url)
        template = there.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield there


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def secret_run(micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with pictures, evaluated and used, on rows that hold a secret, over a base in a secret place."""
    from lmoe.cli.train import main

    folder = tmp_path_factory.mktemp("secret")
    rows = folder / SECRET
    for part in ("train", "val"):
        shutil.copytree(micro.train, rows / part)
        for file in (rows / part).iterdir():
            kept = [json.loads(line) for line in file.read_text().splitlines()]
            for row in kept:
                for message in row["messages"]:
                    message["content"] = f"{SECRET} {message['content']}"
            file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    base = shutil.copytree(micro.model, folder / SECRET / "my_base")
    places = (f"backbone.model_name={base}", f"data.path={rows / 'train'}", f"data.val_path={rows / 'val'}")
    cache = f"data.cache_dir={folder / 'cache'}"
    with process_state(folder):
        assert main([*micro.changed(*places, cache, "trainer.max_steps=2"), f"hydra.run.dir={folder / 'run'}"]) == 0
    (folder / "run" / "adapter" / "evaluation").mkdir()
    (folder / "run" / "adapter" / "evaluation" / "samples.jsonl").write_text(SECRET)
    (folder / "run" / "adapter" / "answers.jsonl").write_text(SECRET)
    (folder / "run" / "adapter" / "README.md").write_text(SECRET)
    return folder / "run"
