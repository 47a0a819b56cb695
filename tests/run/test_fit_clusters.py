"""Rows that are put into clusters once the run's model stands: those of a stream. Sharded bases: see two processes."""

import json
import shutil
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lmoe.backbones.load import load_model
from lmoe.data.encoded import opening
from lmoe.data.stream import Place
from lmoe.errors import ConfigError
from lmoe.run import fit_clusters as module
from lmoe.run.fit_clusters import FitClusters, bare_states
from tests.resume.test_exactness import adapter, keep_as_if_killed, losses
from tests.run.test_clustered_rows import FILE, TAUGHT

STREAM = (*TAUGHT, "data.streaming=true", "data.shuffle_buffer=8", "data.batch_size=2")


@pytest.fixture
def few(monkeypatch):
    """Clusters are fitted to three rows of each of the three files of a stream, so that others come later."""
    monkeypatch.setattr("lmoe.run.clustered_rows.FIT_PROMPTS", 8)


def put(parts, run: Path) -> list[str]:
    """Put the rows of a run into clusters; what is said of them."""
    said: list[str] = []
    alone = SimpleNamespace(broadcast=lambda own: own)
    trainer = SimpleNamespace(datamodule=parts.datamodule, world_size=1, strategy=alone)
    FitClusters(parts, run, True, said.append, lambda: None).on_fit_start(trainer, parts.module)
    return said


def first_pass(parts):
    """Rows of the stream with their clusters, in the order of training."""
    samples = parts.datamodule.prepared.train.samples(Place())
    return [row for row, _, _ in takewhile(lambda sample: sample[1].epoch == 0, samples)]


def test_each_row_of_a_stream_gets_the_nearest_of_the_clusters_that_its_first_rows_made(micro, tmp_path, few):
    parts = micro.parts(*STREAM)
    assert parts.target_lines == ["targets: 4 clusters of prompts"]
    said = put(parts, tmp_path)
    sizes = [int(line.split()[1]) for line in said if line.endswith("such as")]
    assert len(sizes) == 4 and sum(sizes) == 9
    clusters, model = SimpleNamespace(**load_file(tmp_path / FILE)), load_model(parts.config.backbone)
    rows = first_pass(parts)
    assert len(rows) == 30 and {row.cluster for row in rows} == {0, 1, 2, 3}
    for row in [*rows, *parts.datamodule.prepared.val]:
        with torch.no_grad():
            states = model(row.input_ids[None, : opening(row)].long(), output_hidden_states=True).hidden_states[-1]
        apart = ((states[0].mean(0) - clusters.mean) / clusters.std - clusters.centroids).norm(dim=1)
        assert row.cluster == int(apart.argmin())


def test_packed_rows_of_a_stream_have_the_clusters_of_the_same_rows_alone(micro, tmp_path):
    alone, packed = (micro.parts(*STREAM, f"data.packing={word}") for word in ("false", "true"))
    for parts in (alone, packed):
        put(parts, tmp_path)
    by_tokens = {tuple(row.input_ids.tolist()): row.cluster for row in first_pass(alone)}
    rows = [row for sequence in first_pass(packed) for row in sequence]
    assert len(rows) == 30 and all(by_tokens[tuple(row.input_ids.tolist())] == row.cluster for row in rows)


def test_what_adapters_have_learnt_moves_no_row_into_another_cluster(micro, tmp_path, few):
    parts = micro.parts(*STREAM)
    put(parts, tmp_path)
    model, prompts = parts.model.train(), [row.input_ids[: opening(row)] for row in parts.datamodule.prepared.val]
    read = bare_states(model, 64)
    clusters, states = [row.cluster for row in first_pass(parts)], torch.cat([found for _, found in read(prompts)])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    assert [row.cluster for row in first_pass(parts)] == clusters and model.training
    assert torch.equal(torch.cat([found for _, found in read(prompts)]), states)


def test_a_killed_run_over_a_stream_goes_on_as_if_nothing_had_been(train, tmp_path, monkeypatch, few):
    with monkeypatch.context() as patch:
        keep_as_if_killed(patch, tmp_path / "whole", 3)
        whole = train(*STREAM, "checkpoint.every_n_steps=1", run="whole")
    assert whole.code == 0, whole.text
    killed = tmp_path / "killed 3"
    lost = Path(shutil.copytree(killed, tmp_path / "lost"))
    (lost / FILE).unlink()
    for run in (killed, lost):
        done = train(f"resume='{run}'", settings=False)
        assert done.code == 0, done.text
        assert adapter(run) == adapter(whole.run) and losses(run) == losses(whole.run)
        assert (run / FILE).read_bytes() == (whole.run / FILE).read_bytes()
    assert "fitted anew" in done.text


def test_auto_takes_clusters_of_a_stream_without_domains_and_the_router_is_fitted_to_them(train, micro):
    one = f"data.path={micro.train / 'code.jsonl'}", f"data.val_path={micro.val / 'code.jsonl'}"
    done = train("moe=supervised", "moe.router_fit_prompts=100", "data.streaming=true", "data.batch_size=2", *one)
    assert done.code == 0, done.text
    assert "targets: 4 clusters of prompts, because all training rows are of one domain" in done.text
    assert "router: fitted to the targets of 10 training prompts" in done.text, done.text


def test_the_first_rows_of_a_stream_are_those_of_every_file(micro):
    parts = micro.parts(*STREAM)
    stream = parts.prepared.train
    names = [parts.prepared.domains[number] for number in stream.first_rows(8).domains.tolist()]
    assert names == ["code"] * 3 + ["math"] * 3 + ["words"] * 3 and stream.first_domains(8) == ["code", "math", "words"]
    assert len(stream.first_rows(1000)) == 30 and len(stream.first_rows(1)) == 3


def test_domains_that_rows_of_a_stream_name_are_taught_and_no_other(train, tmp_path):
    lines = [
        json.dumps({"prompt": f"{n} say {d}", "response": d, "domain": d}) for n in range(6) for d in ("red", "sea")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "val.jsonl").write_text("\n".join([*lines[:4], json.dumps({"prompt": "a", "response": "b"})]))
    rows = f"data.path={tmp_path / 'rows.jsonl'}", f"data.val_path={tmp_path / 'val.jsonl'}"
    done = train("moe=supervised", "moe.router_fit_prompts=100", "data.streaming=true", "data.batch_size=2", *rows)
    assert done.code == 0, done.text
    assert "targets: 2 domains: red, sea" in done.text and "fitted to the targets of 12 training" in done.text, (
        done.text
    )


def test_what_cannot_be_put_into_clusters_is_refused(micro, train):
    base = ("phase=joint", "phase.phases.joint.trainable=[router,lora,base_ffn]")
    with pytest.raises(ConfigError, match="a phase trains base_ffn of it"):
        micro.parts(*STREAM[1:], "moe=sequence", "injection.num_experts=4", *base)
    few_rows = train(*STREAM, "injection.num_experts=31", "injection.top_k=2")
    assert few_rows.code == 1 and "30 different prompts, which cannot be put into 31 clusters" in few_rows.text
    assert not (few_rows.run / "config.yaml").exists()


def test_a_preflight_of_a_stream_asks_for_no_clusters(train, monkeypatch):
    monkeypatch.setattr(module, "put_into_clusters", None)
    done = train(*STREAM, "dry_run=preflight")
    assert done.code == 0, done.text
    assert "targets: 4 clusters of prompts" in done.text and not done.run.exists()
