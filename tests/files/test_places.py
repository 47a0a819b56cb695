"""What can only be a local path must be there; what may be a name on the hub is told so."""

from pathlib import Path

import pytest

from lmoe.config.run import RunConfig
from lmoe.files.places import blocked_folder, hub_note, is_local, missing_file, missing_place
from lmoe.rules.validate import hub_names, place_problems


@pytest.mark.parametrize(
    "place",
    [
        *("./x", "../x", "/x", "~/x", "rows.jsonl", "some/rows.json", "x.jsonl.gz", "x.parquet", "x.CSV"),
        *("there/nosuch", "path/to/model"),
    ],
)
def test_what_is_written_like_a_path_must_be_there(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert is_local(place)
    assert missing_place("data.path", place) == [f"data.path={place}: no such file or folder"]
    assert hub_note("data.path", place) == []


@pytest.mark.parametrize("place", ["Qwen/Qwen3-0.6B", "gpt2", "some/rows", "tatsu-lab/alpaca", "hf://datasets/a/b"])
def test_a_name_that_the_hub_may_have_is_not_looked_up(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert missing_place("data.path", place) == []
    assert hub_note("data.path", place) == [f"data.path={place}: taken for a hub name, not looked up"]


@pytest.mark.parametrize("place", ["\0", "x" * 5000, "~nobody-here/x", "/" + "y" * 300])
def test_what_no_file_system_takes_is_missing_and_no_crash(place):
    assert len(missing_place("data.path", f"/{place}")) == 1
    assert len(missing_file("data.chat_template", place)) == 1


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert blocked_folder("data.cache_dir", str(tmp_path / "new" / "cache")) == []
    (problem,) = blocked_folder("data.cache_dir", str(tmp_path / "file" / "cache"))
    assert f"{tmp_path / 'file'} is a file" in problem


def test_every_key_that_names_a_place_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").touch()
    config = RunConfig()
    config.backbone.model_name, config.data.path, config.data.val_path = "/no/model", "no.jsonl", "there.jsonl"
    config.injection.experts_from = {"a": "/no/expert", "b": "some/expert", "c": "plain"}
    config.data.cache_dir = "there.jsonl"
    keys = [problem.split("=")[0] for problem in place_problems(config)]
    assert keys == [
        "backbone.model_name",
        "data.path",
        "injection.experts_from.a",
        "injection.experts_from.c",  # a name on the hub has a slash
        "data.cache_dir",
    ]
    assert hub_names(config) == ["injection.experts_from.b=some/expert: taken for a hub name, not looked up"]
    config.injection.experts_from = "run"
    assert any(problem.startswith("injection.experts_from=./run") for problem in place_problems(config))
    config.resume = "run"  # its experts are in its checkpoint
    assert not any(problem.startswith("injection.") for problem in place_problems(config))
