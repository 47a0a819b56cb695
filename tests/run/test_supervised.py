"""`moe=supervised`: one router for the model, taught what prompts are about, whatever the rows are."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lmoe
from lmoe.adapter.folder import read_tensors
from lmoe.cli.main import app
from lmoe.config.run import RunConfig
from lmoe.injection.record import injected
from lmoe.rules.routers import mixture_scale
from lmoe.rules.validate import validate
from lmoe.vocabulary import MixtureScale, Role, RouteBy, RouterKind, RouterScope, RouterTarget
from tests.composing import compose
from tests.conftest import process_state
from tests.micro import SUPERVISED, write_rows
from tests.preference_rows import pairs_of

TARGETS = "targets: "


@pytest.fixture(scope="module")
def supervised_run(micro, tmp_path_factory) -> Path:
    """A finished run on rows of three domains, with four experts."""
    from lmoe.cli.train import main

    base = tmp_path_factory.mktemp("supervised")
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        assert main([*micro.changed(SUPERVISED), f"hydra.run.dir={base / 'run'}"]) == 0
    return base / "run"


def taught(run: Path) -> tuple[RouterTarget, list[str] | None]:
    moe = injected(lmoe.load(run)[0]).moe
    return moe.router_target, moe.domains


def test_it_is_the_arm_that_was_judged(restored):
    """conf/study/supervised.yaml takes experiment=supervised_routing, which is this with eight experts."""
    given = compose("train", RunConfig, [SUPERVISED, "injection.num_experts=8"])
    judged = compose("train", RunConfig, ["experiment=supervised_routing"])
    validate(given)
    for section in ("moe", "injection", "phase", "optim", "data", "trainer"):
        assert getattr(given, section) == getattr(judged, section), section
    assert (given.moe.router, given.moe.router_scope) == (RouterKind.sequence, RouterScope.model)
    assert given.moe.prompt_experts and given.moe.router_target is RouterTarget.auto
    assert (given.optim.lr, given.optim.roles["router"].lr, given.injection.top_k) == (2e-3, 2e-2, 1)
    ((name, phase),) = given.phase.phases.items()
    assert name == "taught" and phase.route_by is RouteBy.target
    assert phase.trainable == [Role.router, Role.lora, Role.attn_lora]


def test_one_expert_weighs_1_and_more_share_it_by_their_probabilities(restored):
    one, two = (compose("train", RunConfig, [SUPERVISED, f"injection.top_k={k}"]) for k in (1, 2))
    validate(two)
    assert mixture_scale(one.moe, one.injection) is MixtureScale.unit
    assert mixture_scale(two.moe, two.injection) is MixtureScale.sum_to_one


@pytest.mark.parametrize("router", ["top_k", "soft", "sigmoid", "relu", "noisy_top_k", "sequence"])
def test_a_router_that_learns_from_the_loss_keeps_its_phases_learning_rate_and_two_experts(restored, router):
    config = compose("train", RunConfig, [f"moe={router}"])
    validate(config)
    assert list(config.phase.phases) == ["router_warmup", "experts"]
    assert (config.optim.lr, config.optim.roles["router"].lr, config.injection.top_k) == (3e-3, None, 2)
    assert config.moe.router_target is RouterTarget.none


def test_rows_of_domains_teach_domains(supervised_run):
    assert taught(supervised_run) == (RouterTarget.domain, ["code", "math", "words"])


def test_rows_without_domains_teach_clusters(train, micro):
    done = train(SUPERVISED, f"data.path={micro.train / 'code.jsonl'}", "data.val_path=null")
    assert done.code == 0, done.text
    assert f"{TARGETS}4 clusters of prompts, because all training rows are of one domain" in done.text
    assert taught(done.run)[0] is RouterTarget.cluster


def test_two_experts_for_more_domains_teach_clusters(train):
    done = train(SUPERVISED, "injection.num_experts=2")
    assert done.code == 0, done.text
    assert f"{TARGETS}2 clusters of prompts, because 3 domains are more than the 2 experts of a site" in done.text


@pytest.mark.parametrize(
    ("mistaken", "problem"),
    [
        ("moe.router_target=foo", "moe.router_target is foo; allowed: none, domain, cluster, auto"),
        ("injection.num_experts=1", "moe.router_target=auto needs two experts at least, and a site has 1"),
        ("data.clusters=9", "data.clusters=9 needs an expert for each cluster, and a site has 4"),
        ("moe.expert_dropout=0.3", "moe.expert_dropout has no effect where every phase has route_by=target"),
        ("trainer.stop_on_collapse=true", "trainer.stop_on_collapse has no effect where every phase has route_by="),
    ],
)
def test_a_mistake_that_the_config_shows_is_said_alone_before_anything_is_read(train, mistaken, problem):
    done = train(SUPERVISED, mistaken, "dry_run=config")
    assert done.code == 1 and f"config: 1 problem - {problem}" in done.text, done.text


def test_rows_without_prompts_are_learnt(train, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{word} " * 9}) + "\n" for word in ("red", "green", "blue", "tree")))
    done = train(SUPERVISED, f"data.path={rows}", f"data.val_path={rows}", "injection.num_experts=2")
    assert done.code == 0, done.text


def test_a_stream_of_named_domains_is_learnt(train):
    done = train(SUPERVISED, "data.streaming=true", "data.batch_size=2")
    assert done.code == 0 and f"{TARGETS}3 domains" in done.text, done.text


@pytest.mark.parametrize("task", ["dpo", "kto", "reward"])
def test_preferences_are_learnt(train, micro, task):
    done = train(SUPERVISED, f"task={task}", *pairs_of(micro), "data.batch_size=2")
    assert done.code == 0, done.text


def test_a_run_that_was_stopped_ends_like_one_that_was_not(train, supervised_run):
    half = train(SUPERVISED, "trainer.max_steps=3", "optim.schedule=constant", run="half")
    full = train(SUPERVISED, "optim.schedule=constant", run="full")
    assert half.code == full.code == 0
    done = train(f"resume={half.run}", "trainer.max_steps=6", settings=False)
    assert done.code == 0, done.text
    expected, found = read_tensors(full.run / "adapter"), read_tensors(half.run / "adapter")
    assert all((found[name] == tensor).all() for name, tensor in expected.items())


def test_what_it_leaves_is_generated_from_measured_explained_and_exported(restored, supervised_run, micro, tmp_path):
    checkpoint, page = ["--checkpoint", str(supervised_run)], str(tmp_path / "why.html")
    for command in (
        ["generate", *checkpoint, "--prompt", "say red", "--max-new-tokens", "3"],
        ["generate", *checkpoint, "--rows", str(micro.val / "code.jsonl"), "--output", str(tmp_path / "answers.jsonl"),
         "--max-new-tokens", "3"],
        ["evaluate", *checkpoint, "--samples", "1"],
        ["explain", *checkpoint, "--prompt", "say red", "--max-new-tokens", "3", "--output", page],
        ["export", *checkpoint, "--format", "peft-experts", "--output", str(tmp_path / "experts")],
    ):  # fmt: skip
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output)


def test_on_to_rows_of_the_same_domains_each_keeps_its_expert(train, supervised_run):
    done = train(SUPERVISED, f"injection.experts_from={supervised_run}", "phase=joint", "data.domains=[words,code]")
    assert done.code == 0, done.text
    assert taught(done.run) == (RouterTarget.domain, ["code", "math", "words"])


def test_on_to_rows_of_a_new_domain_a_free_expert_is_for_it(train, supervised_run, tmp_path):
    write_rows(tmp_path / "new", rows=6, first=50)
    (tmp_path / "new" / "code.jsonl").rename(tmp_path / "new" / "law.jsonl")
    rows = (f"data.path={tmp_path / 'new'}", f"data.val_path={tmp_path / 'new'}", "data.domains=[law]")
    done = train(SUPERVISED, f"injection.experts_from={supervised_run}", "phase=joint", *rows)
    assert done.code == 0, done.text
    assert taught(done.run) == (RouterTarget.domain, ["code", "math", "words", "law"])
    grown = train(
        SUPERVISED, f"injection.experts_from={done.run}", "injection.num_experts=5", "phase=grow",
        *rows[:2], "data.domains=[math]", run="grown",
    )  # fmt: skip
    assert grown.code == 0, grown.text
    assert taught(grown.run) == (RouterTarget.domain, ["code", "math", "words", "law"])


def test_where_no_expert_is_free_routers_learn_from_the_loss_and_it_is_said(train, supervised_run, micro, tmp_path):
    write_rows(tmp_path / "new", rows=6, first=50)
    for name in ("code", "math"):
        (tmp_path / "new" / f"{name}.jsonl").rename(tmp_path / "new" / f"{name}_new.jsonl")
    rows = (f"data.path={tmp_path / 'new'}", f"data.val_path={tmp_path / 'new'}")
    done = train(SUPERVISED, f"injection.experts_from={supervised_run}", "phase=joint", *rows)
    assert done.code == 0, done.text
    assert f"{TARGETS}none: the experts of" in done.text
    assert taught(done.run)[0] is RouterTarget.none
    refused = train(SUPERVISED, f"injection.experts_from={supervised_run}", *rows, run="other")
    assert refused.code == 1
    assert "route_by=target has no target" in refused.text and "phase=joint" in refused.text


@pytest.mark.parametrize("domains", ["[words,code]", "[words]"])
def test_a_run_goes_on_without_its_source_with_the_targets_that_it_began_with(train, supervised_run, tmp_path, domains):
    source = Path(shutil.copytree(supervised_run, tmp_path / "source"))
    settings = (SUPERVISED, f"injection.experts_from={source}", "phase=joint", "optim.schedule=constant")
    half = train(*settings, f"data.domains={domains}", "trainer.max_steps=2", run="half")
    assert half.code == 0, half.text
    shutil.rmtree(source)
    done = train(f"resume={half.run}", "trainer.max_steps=3", settings=False)
    assert done.code == 0, done.text
    assert taught(half.run) == (RouterTarget.domain, ["code", "math", "words"])


def test_a_run_that_teaches_clusters_to_the_experts_of_another_goes_on(train, finished_run):
    settings = (f"injection.experts_from={finished_run}", "moe.router_target=cluster", "phase=joint")
    half = train(*settings, "trainer.max_steps=2", "optim.schedule=constant")
    assert half.code == 0, half.text
    done = train(f"resume={half.run}", "trainer.max_steps=3", settings=False)
    assert done.code == 0, done.text
    assert taught(half.run) == (RouterTarget.cluster, ["cluster0", "cluster1", "cluster2", "cluster3"])


def test_a_run_that_has_grown_by_one_new_domain_goes_on(train, supervised_run, tmp_path):
    write_rows(tmp_path / "new", rows=6, first=50)
    (tmp_path / "new" / "code.jsonl").rename(tmp_path / "new" / "law.jsonl")
    rows = (f"data.path={tmp_path / 'new'}", f"data.val_path={tmp_path / 'new'}", "data.domains=[law]")
    more = ("injection.num_experts=5", "phase=grow", "trainer.max_steps=2", "optim.schedule=constant")
    half = train(SUPERVISED, f"injection.experts_from={supervised_run}", *more, *rows)
    assert half.code == 0, half.text
    done = train(f"resume={half.run}", "trainer.max_steps=3", settings=False)
    assert done.code == 0, done.text
    assert taught(half.run) == (RouterTarget.domain, ["code", "math", "words", "law"])


def test_routers_of_another_kind_do_not_go_on_with_a_run(train, supervised_run, finished_run):
    done = train(SUPERVISED, f"injection.experts_from={finished_run}", "phase=joint")
    assert done.code == 1 and "set moe=top_k" in done.text
    done = train(f"injection.experts_from={supervised_run}", "phase=joint")
    assert done.code == 1 and "set moe=supervised" in done.text


def test_adapters_are_for_the_domains_that_they_are_called_like(train, micro, tmp_path):
    lora = ("injection=dense_lora", "phase=adapters", "injection.lora_r=4")
    places = {name: train(*lora, f"data.path={micro.train / f'{name}.jsonl'}", run=name) for name in ("words", "code")}
    named = ", ".join(f"{name}: {done.run}" for name, done in places.items())
    attention = (
        "injection.target_keywords=[gate_proj,up_proj,down_proj,q_proj,v_proj]",
        "injection.attn_lora.enabled=false",
    )
    given = (SUPERVISED, f"injection.experts_from={{{named}}}", "phase=routers", *attention)
    done = train(*given, "injection.num_experts=2", "data.domains=[code,words]", run="mixed")
    assert done.code == 0, done.text
    assert taught(done.run) == (RouterTarget.domain, ["words", "code"])
    refused = train(*given, "injection.num_experts=2", run="more")
    assert refused.code == 1
    assert "brings experts that are for what they are called" in refused.text and "moe=top_k" in refused.text
    refused = train(*given, "injection.num_experts=2", "moe.router_target=cluster", run="clusters")
    assert refused.code == 1 and "would deal them to clusters" in refused.text
