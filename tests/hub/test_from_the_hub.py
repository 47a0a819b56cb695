"""Adapters from the hub: what is downloaded, where a name leads, and what is said when there is no way there."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import lmoe
from lmoe.adapter.folder import read_tensors
from lmoe.adapter.place import local_checkpoint
from lmoe.cli.main import app
from lmoe.errors import CheckpointError, ConfigError
from lmoe.hub.push import PushSettings, push
from lmoe.peft.reader import read_expert
from tests.hub.stand_in import TOKEN, Repository

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

NAME = "maria/experts"


@pytest.fixture
def there(hub, trained):
    """The hub with an adapter for everybody to read, and beside it what nobody should fetch."""
    files = {file.name: file.read_bytes() for file in trained.adapter.iterdir() if file.is_file()}
    more = {"pytorch_model.bin": b"a pickle", "custom.py": b"raise SystemExit", "samples.jsonl": b"{}"}
    repository = hub.repositories[NAME] = Repository(private=False)
    repository.commit("main", files | more)
    return hub


def fetched(hub) -> set[str]:
    return {path.rpartition("/")[2] for method, path in hub.asked if method == "GET" and "/resolve/" in path}


def test_only_what_lmoe_reads_is_downloaded_and_code_only_where_it_is_trusted(there, trained):
    lmoe.load(NAME)
    assert fetched(there) == {
        *("lmoe_config.json", "adapter.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    before = len(there.asked)
    lmoe.load(NAME)
    assert not any("/resolve/" in path for _, path in there.asked[before:]), "it is in the cache"
    lmoe.load(NAME, trust_remote_code=True)
    assert "custom.py" in fetched(there) and "pytorch_model.bin" not in fetched(there)


def test_a_folder_of_that_name_goes_before_the_hub(there, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained.adapter, tmp_path / NAME)
    lmoe.load(NAME)
    assert there.asked == []
    with pytest.raises(ConfigError, match=r"`revision=main` has no effect on maria/experts, which is on this machine"):
        lmoe.load(NAME, revision="main")


def test_a_mistyped_path_in_a_folder_that_exists_is_not_told_to_the_hub(there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(CheckpointError, match="outputs/mistyped: no such run or adapter directory"):
        lmoe.load("outputs/mistyped")
    assert there.asked == []


def test_attach_takes_it_into_a_base_in_memory(there, trained):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.attach(model, NAME, revision="main")
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, trained.model.eval()(ids).logits)


def test_without_network_what_was_downloaded_before_is_used(there, monkeypatch):
    first = local_checkpoint(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(there.asked)
    assert local_checkpoint(NAME) == first
    lmoe.load(NAME)
    assert len(there.asked) == asked


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"HF_HUB_OFFLINE": True}, "HF_HUB_OFFLINE forbids the network, and it was not downloaded before"),
        ({"ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached, and it was not downloaded before"),
    ],
)
def test_without_network_and_without_a_copy_the_message_says_so(there, monkeypatch, changes, reason):
    for name, value in changes.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    with pytest.raises(CheckpointError, match=f"{NAME}: no such directory, and the hub does not give it: {reason}"):
        lmoe.load(NAME)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("maria/nothing", "it has no such repository, or it is private and nobody is signed in who may read it"),
        ("maria/private", "check the name, and set HF_TOKEN, or sign in once with `hf auth login`"),
        ("maria/plain", "on the hub, and no adapter of lmoe: it has no lmoe_config.json"),
        ("maria/a--b", "Cannot have -- or .. in repo_id"),
    ],
)
def test_what_the_hub_does_not_give_is_one_clear_message(hub, name, reason):
    for each in ("maria/private", "maria/plain"):
        hub.repositories[each] = Repository(private=each.endswith("private"))
        hub.repositories[each].commit("main", {"config.json": b"{}"})
    with pytest.raises(CheckpointError) as refused:
        lmoe.load(name)
    assert reason in str(refused.value) and refused.value.__cause__ is None


def test_a_private_adapter_is_read_by_its_owner(there, monkeypatch):
    there.repositories[NAME].private = True
    with pytest.raises(CheckpointError, match="nobody is signed in who may read it"):
        lmoe.load(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert lmoe.load(NAME)


def test_every_verb_that_takes_a_checkpoint_takes_a_name_and_a_revision(there, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there.repositories[NAME].branches["v1"] = there.repositories[NAME].branches["main"]
    place = ("--checkpoint", NAME, "--revision", "v1")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "hello", "response": "the user"}) + "\n")
    calls = (
        ("generate", *place, "--prompt", "hello", "--max-new-tokens", "2"),
        ("evaluate", *place, "--data", str(rows), "--device", "cpu"),
        ("export", *place, "--format", "peft-experts", "--output", "experts"),
        ("export", *place, "--format", "lmoe", "--without-expert", "0", "--output", "less"),
    )
    for call in calls:
        done = CliRunner().invoke(app, list(call))
        assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["chat", *place, "--max-new-tokens", "2"], input="hello\n")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "outputs" / "evaluation" / NAME / "evaluation.json").exists(), "not in the hub's cache"
    assert len(read_tensors(tmp_path / "less")) < len(read_tensors(trained.adapter))
    refused = CliRunner().invoke(app, ["generate", "--model", "tiny", "--revision", "v1", "--prompt", "x"])
    assert refused.exit_code == 1 and "--revision has no effect without --experts" in refused.output


def test_a_run_trains_on_from_an_adapter_of_the_hub(hub, monkeypatch, micro, finished_run, train):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(PushSettings(checkpoint=str(finished_run), name=NAME))
    done = train(f"injection.experts_from={NAME}", "phase=joint", "trainer.max_steps=1", "optim.lr=1e-9")
    assert done.code == 0, done.text
    before, after = read_tensors(finished_run / "adapter"), read_tensors(done.run / "adapter")
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_an_expert_of_a_blend_comes_by_the_same_way(hub, trained, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"strategy": "dense_lora", "lora_r": 2})
    lmoe.save(model, tmp_path / "dense")
    files = {file.name: file.read_bytes() for file in (tmp_path / "dense").iterdir()}
    hub.repositories[NAME] = Repository(private=False)
    hub.repositories[NAME].commit("main", files)
    assert read_expert(NAME).branches
