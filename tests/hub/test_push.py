"""To the hub and back: what goes, what never goes, and what the hub refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.adapter.folder import read_tensors
from lmoe.backbones.load import load_model
from lmoe.cli.main import app
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import CheckpointError, ConfigError, HubError
from lmoe.export.export import export_merged, export_peft
from lmoe.files.export_record import EXPORT_FILE, changes, read_export_record
from lmoe.hub.push import MESSAGE, PushSettings, prepared, push
from tests.hub.conftest import SECRET
from tests.hub.stand_in import DROP, TOKEN, Repository

# In huggingface_hub's own call of its HTTP client, where it sends a large file without xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

NAME = "maria/sql-experts"
OF_ADAPTER = {
    *("README.md", "lmoe_config.json", "adapter.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = app(["push", *arguments], prog_name="lmoe", standalone_mode=False)
    out, err = capsys.readouterr()
    return code, out, err


def settings(checkpoint, **changes) -> PushSettings:
    return PushSettings(checkpoint=str(checkpoint), name=NAME, **changes)


@pytest.fixture
def pushed(hub, signed_in, trained):
    """An adapter that was pushed."""
    push(settings(trained.run))
    return hub


# --- what goes


def test_an_adapter_comes_back_from_the_hub_with_equal_tensors_and_answers(pushed, trained, monkeypatch):
    repository = pushed.repositories[NAME]
    assert repository.private
    assert set(repository.files("main")) == OF_ADAPTER | {".gitattributes"}
    model, tokenizer = lmoe.load(NAME, base_model=str(trained.base))
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trained.model.eval()(ids).logits)
    assert tokenizer.chat_template == trained.tokenizer.chat_template
    lmoe.save(model, trained.base.parent / "again")
    again, before = read_tensors(trained.base.parent / "again"), read_tensors(trained.adapter)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_large_files_go_by_lfs_and_the_commit_says_what_it_is(pushed):
    assert pushed.uploads() == 1
    assert [path for method, path in pushed.asked if "/commit/" in path] == [f"/api/models/{NAME}/commit/main"]
    assert any(MESSAGE.encode() in body for body in pushed.received)


def test_a_branch_is_made_and_read_by_its_name_and_a_commit_stays_what_it_was(hub, signed_in, trained):
    first = push(settings(trained.run)).rpartition("/")[2]
    push(settings(trained.run, revision="try/two", message="the second one"))
    repository = hub.repositories[NAME]
    assert set(repository.branches) == {"main", "try/two"} and repository.branches["main"] == first
    for revision in ("try/two", first):
        model, _ = lmoe.load(NAME, base_model=str(trained.base), revision=revision)
        assert len(model.lmoe_injected.plan.sites) > 0
    assert 'revision="try/two"' in repository.files("try/two")["README.md"].decode()
    with pytest.raises(CheckpointError, match="at revision nowhere: .* it has no such revision"):
        lmoe.load(NAME, base_model=str(trained.base), revision="nowhere")


def test_an_exported_model_and_a_peft_adapter_go_as_they_are(hub, signed_in, micro, tmp_path):
    parts = micro.parts("injection=dense_lora", "phase=adapters")
    lmoe.save(parts.model, tmp_path / "dense", tokenizer=parts.tokenizer)
    export_merged(tmp_path / "dense", tmp_path / "merged", data="none")
    (tmp_path / "merged" / "optimizer.pt").write_bytes(b"a pickle")
    push(PushSettings(checkpoint=str(tmp_path / "merged"), name="maria/merged", public=True))
    files = hub.repositories["maria/merged"].files("main")
    assert not hub.repositories["maria/merged"].private
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    assert "optimizer.pt" not in files
    model = AutoModelForCausalLM.from_pretrained("maria/merged")
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    got = tmp_path / "downloaded"
    got.mkdir()
    for name, content in files.items():
        (got / name).write_bytes(content)
    record = read_export_record(got)
    assert record is not None and record.files.keys() <= files.keys() and changes(got, record) == []
    assert (record.run, record.base["name"]) == ("", "") and str(micro.model).encode() not in files[EXPORT_FILE]
    (got / "config.json").write_bytes(files["config.json"] + b" ")
    assert changes(got, record) == ["config.json has been changed since"]
    with pytest.warns(UserWarning, match="config.json has been changed since"):
        load_model(BackboneConfig(model_name=str(got)))
    export_peft(tmp_path / "dense", tmp_path / "peft")
    push(PushSettings(checkpoint=str(tmp_path / "peft"), name="maria/peft", base_model="maria/base"))
    sent = hub.repositories["maria/peft"].files("main")
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "maria/base"
    assert sent["adapter_model.safetensors"] == (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()


def test_the_token_that_the_library_has_stored_does_as_well(hub, trained, tmp_path, monkeypatch):
    (tmp_path / "stored").write_text(TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "stored"))
    push(settings(trained.run))
    assert hub.repositories[NAME].private


# --- what an earlier push has left


STALE = {
    *("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
    *("generation_config.json", "lmoe_export.json", "merges.txt", "adapter_model.safetensors"),
    "pictures/knock_out.png",
}
OTHERS = {"notes.md", "model.bin", "model-mine.safetensors", "pictures/mine.png", "sub/config.json", ".gitattributes"}


def add(hub, *names: str) -> None:
    """Commit more files to the repository."""
    repository = hub.repositories[NAME]
    repository.commit("main", repository.files("main") | dict.fromkeys(names, b"{}"))


def test_what_an_earlier_push_has_left_goes_in_the_same_commit_and_nothing_else(pushed, trained, capsys):
    add(pushed, *STALE, *OTHERS)
    commits = len(pushed.repositories[NAME].commits)
    code, out, err = command(capsys, "--checkpoint", str(trained.run), "--name", NAME, "--dry-run")
    assert code == 0, err
    removed = {line.split()[5] for line in out.splitlines() if line.endswith("there, which would be taken away")}
    assert removed == STALE and len(pushed.repositories[NAME].commits) == commits
    code, out, err = command(capsys, "--checkpoint", str(trained.run), "--name", NAME)
    assert code == 0 and "this one takes away adapter_model.safetensors, config.json, " in out, err
    assert set(pushed.repositories[NAME].files("main")) == OF_ADAPTER | OTHERS
    assert len(pushed.repositories[NAME].commits) == commits + 1


def test_a_branch_loses_what_main_has_left_it_and_main_keeps_it(pushed, trained):
    add(pushed, "generation_config.json")
    push(settings(trained.run, revision="next"))
    repository = pushed.repositories[NAME]
    assert "generation_config.json" in repository.files("main")
    assert "generation_config.json" not in repository.files("next")


def test_files_in_a_repository_that_no_push_has_filled_stay(hub, signed_in, trained):
    hub.repositories[NAME] = Repository(private=True)
    for card in ({}, {"README.md": b"---\ntags: [lora]\n---\n# Mine\n"}, {"README.md": b"---\n[\n---\n"}):
        hub.repositories[NAME].commit("main", {"config.json": b"{}", "model.safetensors": b"mine", **card})
        push(settings(trained.run))
        assert {"config.json", "model.safetensors"} <= set(hub.repositories[NAME].files("main"))


def test_a_config_beside_an_adapter_stays_by_which_the_hub_counts_downloads(pushed, trained):
    add(pushed, "config.json")
    push(settings(trained.run, message="again"))
    assert "config.json" in pushed.repositories[NAME].files("main")


# --- what never goes


def test_neither_rows_nor_places_of_this_machine_nor_the_token_are_in_anything_that_is_sent(
    hub, signed_in, secret_run, capsys, monkeypatch
):
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    code, out, err = command(capsys, "--checkpoint", str(secret_run), "--name", NAME)
    assert code == 0, err
    sent = hub.repositories[NAME].files("main")
    pictures = {f"pictures/{name}.png" for name in ("load_by_domain", "load_by_site", "coactivation", "loss_curves")}
    assert set(sent) == OF_ADAPTER | pictures | {".gitattributes"}
    for name, content in sent.items():
        assert SECRET.encode() not in content and TOKEN.encode() not in content, name
    everything = b"\n".join(hub.received)
    assert TOKEN.encode() not in everything and SECRET.encode() not in everything
    assert TOKEN not in out + err
    assert str(secret_run.parent).encode() not in everything


def test_a_run_says_what_it_learnt_without_saying_a_row_of_it(secret_run):
    card = prepared(settings(secret_run)).card
    for words in ("| code.jsonl | own file or folder | unknown |", "Base: my_base (a folder of whoever trained it)"):
        assert words in card
    assert "| domain | adapters off | after |" in card and "| math |" in card


def test_links_to_elsewhere_are_not_followed(trained, tmp_path):
    own = shutil.copytree(trained.adapter, tmp_path / "own")
    (tmp_path / "private.json").write_text("{}")
    (own / "tokenizer.json").unlink()
    (own / "tokenizer.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(CheckpointError, match="tokenizer.json is a link to"):
        prepared(settings(own))


# --- a dry run


def test_a_dry_run_lists_what_would_go_without_network_and_token(no_hub, trained, capsys):
    code, out, err = command(capsys, "--checkpoint", str(trained.run), "--name", NAME, "--dry-run")
    assert code == 0, err
    size = (trained.adapter / "adapter.safetensors").stat().st_size
    assert f"{NAME}, private, branch main: {len(OF_ADAPTER)} files" in out
    assert any(line.split() == ["adapter.safetensors", f"{size:,}"] for line in out.splitlines())
    assert "nothing is sent" in out and "library_name: lmoe" in out and "the hub was not asked" in out
    assert "Where it is on the hub, name it: --base-model" in out


# --- what is refused before the hub is asked


@pytest.mark.parametrize("name", ["maria/a--b", "maria", "maria/a/b", "maria/.git", "a b/c", "maria/x.git", "", "./x"])
def test_names_that_the_hub_refuses_are_refused_before_anything_is_read(name, signed_in, capsys):
    code, _, err = command(capsys, "--checkpoint", "/no/such/run", "--name", name)
    assert code == 1 and "--name" in err and "/no/such/run" not in err
    with pytest.raises(ConfigError, match="allowed: user/name"):
        prepared(PushSettings(checkpoint="/no/such/run", name=name))


def test_without_a_token_nothing_is_read_and_the_message_says_how_to_sign_in(hub, trained, capsys):
    code, _, err = command(capsys, "--checkpoint", "/no/such/run", "--name", NAME)
    assert (code, hub.asked) == (1, [])
    assert "nobody is signed in to the hub: set HF_TOKEN, or sign in once with `hf auth login`" in err
    assert "--dry-run" in err


def test_offline_it_says_so(no_hub, signed_in, trained):
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids the network"):
        push(settings(trained.run))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda place: None, "no such folder"),
        (lambda place: place.mkdir(), "neither a run or an adapter"),
        (lambda place: _write(place / "config.json", "{}"), "only safetensors are pushed"),
        (lambda place: _write(place / "code" / "adapter_config.json", "{}"), "each to be pushed by itself"),
        (lambda place: _write(place / "config.yaml", "seed: 0\n"), "the run has not finished"),
    ],
)
def test_what_cannot_be_pushed_is_named(tmp_path, make, reason):
    make(tmp_path / "given")
    with pytest.raises(CheckpointError, match=reason):
        prepared(settings(tmp_path / "given"))


def _write(file, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)


# --- what the hub refuses


@pytest.mark.parametrize(
    ("where", "status", "reason"),
    [
        (("POST", "/api/repos/create"), 401, "it does not take the token (401)"),
        (("POST", "/api/repos/create"), 403, "the token may not write there (403)"),
        (("POST", "/api/repos/create"), 409, "changed the repository meanwhile (409)"),
        (("POST", "/commit/main"), 412, "give the same command again"),
        (("POST", "/commit/main"), 503, "has a problem of its own (503)"),
        (("POST", "/commit/main"), 418, "(418)"),
        (("POST", "/commit/main"), DROP, "broke ("),
        (("GET", f"/api/models/{NAME}"), 500, "has a problem of its own (500)"),
    ],
)
def test_a_refusal_is_one_clear_message_without_the_token(hub, signed_in, trained, capsys, where, status, reason):
    hub.fails[where] = [status]
    code, out, err = command(capsys, "--checkpoint", str(trained.run), "--name", NAME)
    assert code == 1 and reason in err and f"{NAME} was not pushed" in err
    assert TOKEN not in out + err and "Traceback" not in err


def test_a_wrong_token_is_refused(hub, trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(HubError, match=r"does not take the token \(401\)") as refused:
        push(settings(trained.run))
    assert "somebody_else" not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.parametrize(("where", "status"), [(("POST", "/commit/main"), DROP), (("PUT", ""), 403)])
def test_a_push_that_broke_in_the_middle_is_repeated_by_the_same_command(hub, signed_in, trained, where, status):
    hub.fails[where] = [status]
    with pytest.raises(HubError):
        push(settings(trained.run))
    assert set(hub.repositories[NAME].files("main")) == {".gitattributes"}
    push(settings(trained.run))
    assert set(hub.repositories[NAME].files("main")) == OF_ADAPTER | {".gitattributes"}
    assert hub.uploads() == (1 if where[0] == "POST" else 2)
    push(settings(trained.run))  # nothing has changed
    assert len(hub.repositories[NAME].commits) == 2


@pytest.mark.parametrize(("private", "public"), [(False, False), (True, True)])
def test_a_repository_that_is_there_is_not_more_or_less_open_than_was_asked(hub, signed_in, trained, private, public):
    hub.repositories[NAME] = Repository(private=private)
    hub.repositories[NAME].commit("main", {})
    with pytest.raises(HubError, match="already"):
        push(settings(trained.run, public=public))
    assert len(hub.repositories[NAME].commits) == 1
    push(settings(trained.run, public=not public))
