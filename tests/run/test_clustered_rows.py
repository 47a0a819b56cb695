"""Runs whose routers are taught clusters of prompts: fitted once on the bare base, kept with the run."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import lmoe.run.train
from lmoe.backbones.fingerprint import base_fingerprint
from lmoe.backbones.load import load_model
from lmoe.cli.train import main
from lmoe.data.encoded import opening
from lmoe.data.pack import PackedRows
from lmoe.errors import CheckpointError, ConfigError
from lmoe.run import clustered_rows as module
from lmoe.run.clusters import PromptClusters, RowPrompts
from lmoe.training.callbacks.same_clusters import SameClusters
from tests.conftest import process_state
from tests.resume.test_exactness import adapter, keep_as_if_killed, losses

SEQUENCE = ("moe=sequence", "moe.router_scope=model", "phase=supervised_routing", "injection.num_experts=4")
TAUGHT = (*SEQUENCE, "moe.router_target=cluster")
FILE = "clusters.safetensors"


@pytest.fixture(scope="module")
def whole(micro, tmp_path_factory) -> Path:
    """A whole run; beside it, what there was of it after the fit, and at the end of step 3."""
    base = tmp_path_factory.mktemp("clusters")
    build = lmoe.run.train.build_trainer

    def keep_and_build(loop, run_dir, *others):
        shutil.copytree(run_dir, run_dir.with_name("killed 0"))
        return build(loop, run_dir, *others)

    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        patch.setattr("lmoe.run.train.build_trainer", keep_and_build)
        keep_as_if_killed(patch, base / "whole", 3)
        command = micro.changed(*TAUGHT, "checkpoint.every_n_steps=1")
        assert main([*command, f"hydra.run.dir={base / 'whole'}"]) == 0
    return base / "whole"


def never(*_, **__):
    pytest.fail("the base was asked again")


@pytest.mark.parametrize("step", [pytest.param(0, id="between fit and first step"), pytest.param(3, id="at step 3")])
def test_a_killed_run_reads_its_clusters_and_goes_on_as_if_nothing_had_been(train, whole, tmp_path, monkeypatch, step):
    run = Path(shutil.copytree(whole.with_name(f"killed {step}"), tmp_path / "run"))
    assert (run / "checkpoints").exists() == bool(step)
    monkeypatch.setattr(module, "states_in_batches", never)
    done = train(f"resume={run}", settings=False)
    assert done.code == 0, done.text
    assert adapter(run) == adapter(whole) and losses(run) == losses(whole)
    assert (run / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_run_that_lost_its_clusters_fits_the_same_and_says_so(train, whole, tmp_path):
    run = Path(shutil.copytree(whole.with_name("killed 3"), tmp_path / "run"))
    (run / FILE).unlink()
    done = train(f"resume={run}", settings=False)
    assert done.code == 0, done.text
    assert f"the run has no {FILE}; fitted anew" in done.text
    assert adapter(run) == adapter(whole) and (run / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_the_start_says_what_is_in_each_cluster_and_how_they_agree_with_domains(micro):
    lines = micro.parts(*TAUGHT).target_lines
    assert lines[0] == "targets: 4 clusters of prompts"
    sizes = [line for line in lines if line.startswith("cluster") and line.endswith("such as")]
    counts = [int(line.split(": ")[1].split()[0]) for line in sizes]
    assert len(counts) == 4 and sum(counts) == 30 and counts == sorted(counts, reverse=True)
    examples = [line for line in lines if line.startswith("  ")]
    assert len(examples) == sum(min(count, 3) for count in counts)
    assert all("\n" not in line and "say " in line for line in examples)
    assert "clusters and domains of training rows: adjusted mutual information" in lines[-1]


@pytest.mark.parametrize("target", ["auto", "cluster"])
def test_auto_takes_clusters_where_domains_are_more_than_experts_and_says_why(micro, target):
    line = micro.parts(*SEQUENCE[:3], "injection.num_experts=2", f"moe.router_target={target}").target_lines[0]
    why = ", because 3 domains are more than the 2 experts of a site" if target == "auto" else ""
    assert line == f"targets: 2 clusters of prompts{why}"


def test_auto_takes_domains_where_there_is_an_expert_for_each(micro, monkeypatch):
    monkeypatch.setattr(module, "states_in_batches", never)
    parts = micro.parts(*SEQUENCE, "moe.router_target=auto")
    assert parts.target_lines == ["targets: 3 domains: code, math, words"] and parts.clustered is None


ALONE = ("moe=top_k", "moe.load_balance.type=none")
SURPLUS = [
    (("moe=supervised", "injection.num_experts=6"), "each target has 2, of which a prompt gets 1", 2),
    ((*ALONE, "injection.num_experts=7"), "a target has 2 or 3, of which a token gets 2", 3),
    ((*ALONE, "injection.num_experts=6"), "", 0),
    (("moe=top_k", "injection.num_experts=7"), "", 0),
    (("moe=soft", "injection.num_experts=7"), "", 0),
]


@pytest.mark.parametrize(("settings", "share", "top_k"), SURPLUS)
def test_the_start_warns_of_targets_with_more_experts_than_a_router_chooses(micro, settings, share, top_k):
    lines = micro.parts(*settings, "moe.router_target=auto").target_lines
    assert lines[0].startswith("targets: 3 domains") and len(lines) == (2 if share else 1)
    if share:
        assert lines[1].startswith("warning: ") and share in lines[1]
        assert lines[1].endswith(f"set injection.num_experts=3 or injection.top_k={top_k}")


BY_ROWS = [
    (("moe=sigmoid", "injection.num_experts=3"), "aux_loss_free", False),
    (("moe=sigmoid", "injection.num_experts=6", "injection.top_k=1"), "aux_loss_free", True),
    (("moe=top_k", "moe.load_balance.aux_loss_coef=0.5", "injection.num_experts=3"), "aux_loss", False),
    (("moe=top_k", "injection.num_experts=6", "injection.top_k=1"), "", False),
]


@pytest.mark.parametrize(("settings", "kind", "surplus"), BY_ROWS)
def test_the_start_warns_of_a_balance_that_the_rows_leave_nothing_to(micro, settings, kind, surplus):
    """No bias says which expert of a target a row gets, and a loss does."""
    _, *lines = micro.parts(*settings, "phase=taught", "moe.router_target=auto").target_lines
    why = "where every phase has route_by=target, and the rows say how much each expert gets"
    idle = [f"warning: moe.load_balance.type={kind} has no effect {why}"] if kind else []
    assert [line for line in lines if "has no effect" in line] == idle
    assert ["nothing says which" in line for line in lines if line not in idle] == [True] * surplus


def test_auto_takes_clusters_where_all_rows_are_of_one_domain(micro):
    parts = micro.parts(*SEQUENCE, "moe.router_target=auto", "data.domains=[math]", "data.clusters=2")
    assert parts.target_lines[0] == "targets: 2 clusters of prompts, because all training rows are of one domain"


def test_packed_rows_have_the_clusters_of_the_same_rows_alone(micro):
    alone, packed = (micro.parts(*TAUGHT, f"data.packing={word}").prepared for word in ("false", "true"))
    assert isinstance(packed.train, PackedRows)
    assert torch.equal(packed.train.rows.clusters, alone.train.clusters)
    by_tokens = {tuple(row.input_ids.tolist()): row.cluster for row in alone.train}
    assert all(by_tokens[tuple(row.input_ids.tolist())] == row.cluster for row in packed.train[0])
    assert torch.equal(packed.val.clusters, alone.val.clusters) and int(alone.val.clusters.min()) >= 0


def test_batches_of_worker_processes_carry_the_clusters(micro):
    here, there = (micro.parts(*TAUGHT, f"data.num_workers={count}").datamodule for count in (0, 1))
    first, other = (next(iter(data.train_dataloader())) for data in (here, there))
    assert torch.equal(first["cluster_ids"], other["cluster_ids"])
    assert torch.equal(first["cluster_ids"] >= 0, first["valid_mask"])


def test_validation_rows_get_the_nearest_centroid(micro):
    parts = micro.parts(*TAUGHT)
    clusters = parts.clustered.clusters
    model = load_model(parts.config.backbone)
    for row in parts.prepared.val:
        with torch.no_grad():
            states = model(row.input_ids[None, : opening(row)].long(), output_hidden_states=True).hidden_states[-1]
        apart = ((states[0].mean(0) - clusters.mean) / clusters.std - clusters.centroids).norm(dim=1)
        assert row.cluster == int(apart.argmin())


def test_the_rows_of_a_base_that_is_a_mixture_itself_are_put_into_clusters(micro):
    parts = micro.parts(*TAUGHT, f"backbone.model_name={micro.native}")
    assert set(parts.prepared.train.clusters.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("way", ["preflight", "estimate"])
def test_neither_a_preflight_nor_an_estimate_has_the_base_read_all_prompts(train, monkeypatch, way):
    monkeypatch.setattr(module, "states_in_batches", never)
    done = train(*TAUGHT, f"dry_run={way}")
    assert done.code == 0, done.text
    assert way == "estimate" or "targets: 4 clusters of prompts" in done.text
    assert not done.run.exists()


def test_equal_prompts_are_refused_before_the_base_reads_any(train, micro, monkeypatch):
    monkeypatch.setattr(module, "states_in_batches", never)
    row = (micro.train / "code.jsonl").read_text().splitlines()[0]
    rows = micro.train.parent / "alike.jsonl"
    rows.write_text(f"{row}\n" * 9)
    done = train(*TAUGHT, "data.clusters=2", f"data.path={rows}", "data.val_path=null", "dry_run=preflight")
    assert done.code == 1, done.text
    assert "the training rows have 1 prompt, which cannot be put into 2 clusters" in done.text


def test_it_is_said_before_the_base_reads_prompts(train):
    done = train(*TAUGHT)
    assert "clusters: the base reads 39 prompts" in done.text, done.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("injection.num_experts=31", "injection.top_k=2"), "30 different prompts, which cannot be put into 31 clus"),
        (("moe.domains=[a,b]",), "has no effect with moe.router_target=cluster, whose targets are clusters"),
    ],
)
def test_what_cannot_be_put_into_clusters_is_refused(micro, settings, message):
    with pytest.raises(ConfigError) as error:
        micro.parts(*TAUGHT, *settings)
    assert message in str(error.value)


def test_a_new_run_that_fails_leaves_no_clusters_behind(train, monkeypatch):
    def fail(*_, **__):
        raise ConfigError("nothing can be built today")

    with monkeypatch.context() as patch:
        patch.setattr("lmoe.run.train.build_loggers", fail)
        done = train(*TAUGHT)
    assert done.code == 1 and not (done.run / FILE).exists()


def changed(change):
    """A change of the file's tensors, its metadata left alone."""

    def act(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        save_file(tensors, file, metadata=about)

    return act


def renamed(**entries):
    """A change of the file's metadata, its tensors left alone."""

    def act(file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            about = json.loads(opened.metadata()["lmoe_clusters"])
        save_file(load_file(file), file, metadata={"lmoe_clusters": json.dumps(about | entries)})

    return act


DAMAGES = {
    "torn": (lambda file: file.write_bytes(file.read_bytes()[:200]), "cannot be read"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read"),
    "another file": (
        lambda file: file.write_bytes(save({"centroids": torch.zeros(2, 2)})),
        "has no lmoe_clusters in its metadata",
    ),
    "another version": (renamed(format_version=9), "format_version is 9; this lmoe reads 1"),
    "another seed": (renamed(seed=7), "fitted with seed 7; this run has 0"),
    "another base": (renamed(base={"digest": "0" * 32}), "fitted on another base, fingerprint 000000"),
    "no base": (renamed(base=3), "does not say which base"),
    "a tensor less": (changed(lambda tensors: tensors.pop("std")), "must hold centroids, mean, std"),
    "another width": (changed(lambda tensors: tensors.update(std=torch.ones(3))), "std has the shape (3,)"),
    "not finite": (changed(lambda tensors: tensors["centroids"].fill_(torch.nan)), "holds NaN"),
    "a std of 0": (changed(lambda tensors: tensors["std"].zero_()), "a std that is not above 0"),
    "an unknown cluster": (changed(lambda tensors: tensors["clusters"].fill_(4)), "names clusters"),
    "other rows": (changed(lambda tensors: tensors["digests"].add_(1)), "30 of 30 prompts of this run's training rows"),
    "clusters less": (
        changed(lambda t: t.update(centroids=t["centroids"][:2], clusters=t["clusters"].clamp(max=1))),
        "holds 2 clusters; this run has 4",
    ),
}


@pytest.fixture(scope="module")
def going_on(micro, whole) -> SimpleNamespace:
    """What the clusters of a run that goes on are read with."""
    config = micro.config(*TAUGHT)
    config.resume = str(whole)
    parts = micro.parts(*TAUGHT)
    return SimpleNamespace(config=config, prepared=parts.prepared, tokenizer=parts.tokenizer, micro=micro)


def clustered(given: SimpleNamespace, run: Path, prepared=None) -> module.ClusteredRows:
    model = load_model(given.config.backbone)
    return module.clustered_rows(given.config, prepared or given.prepared, model, given.tokenizer, 4, run, print)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_of_clusters_is_refused(going_on, whole, tmp_path, damage):
    act, message = DAMAGES[damage]
    shutil.copy(whole / FILE, tmp_path / FILE)
    act(tmp_path / FILE)
    with pytest.raises(CheckpointError) as error:
        clustered(going_on, tmp_path)
    assert message in str(error.value) and str(tmp_path / FILE) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_validation_rows_get_the_nearest_centroid_of_the_file(going_on, whole, tmp_path):
    """The file holds those of one half; the other half is as if it had been in it."""
    half = going_on.prepared.val.subset(range(0, 9, 2))
    rows = going_on.prepared.with_clusters(going_on.prepared.train.clusters, going_on.prepared.val.clusters)
    rows.val = half
    known = set(RowPrompts.of(going_on.prepared.train).different) | set(RowPrompts.of(half).different)
    tensors = load_file(whole / FILE)
    kept = torch.tensor([digest in known for digest in tensors["digests"].tolist()])
    shutil.copy(whole / FILE, tmp_path / FILE)
    changed(lambda t: t.update({name: t[name][kept] for name in ("digests", "clusters", "distances")}))(tmp_path / FILE)
    found = clustered(going_on, tmp_path)
    assert torch.equal(found.prepared.val.clusters, going_on.prepared.val.clusters)
    found.write(tmp_path)
    assert sorted(load_file(tmp_path / FILE)["digests"].tolist()) == sorted(tensors["digests"].tolist())


def test_the_same_base_in_another_type_may_read_the_file(going_on, whole):
    base = base_fingerprint(load_model(going_on.config.backbone).bfloat16())
    assert isinstance(module.read_clusters(whole / FILE, base, 0, 4), PromptClusters)


def test_processes_take_the_clusters_of_the_first(micro, monkeypatch):
    monkeypatch.setattr(module, "is_first_process", lambda processes: False)
    monkeypatch.setattr(module, "states_in_batches", never)
    parts = micro.parts(*TAUGHT)
    assert parts.clustered.clusters is None and set(parts.prepared.train.clusters.tolist()) == {-1}
    of_first = torch.arange(30) % 4, torch.arange(9) % 4
    strategy = SimpleNamespace(broadcast=lambda value: of_first)
    trainer = SimpleNamespace(datamodule=parts.datamodule, strategy=strategy, world_size=2)
    SameClusters().setup(trainer, parts.module, "fit")
    assert torch.equal(parts.datamodule.prepared.train.clusters, of_first[0])
    batch = next(iter(parts.datamodule.train_dataloader()))
    assert int(batch["cluster_ids"].max()) > 0
    rows = parts.datamodule.val_dataloader().dataset
    assert sorted(rows.clusters.tolist()) == sorted(of_first[1].tolist())
