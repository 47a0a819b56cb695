"""Every file in conf/ and sweeps/ composes, validates and builds; none is forgotten."""

import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from lmoe.cli.study import compose_arms, read_study
from lmoe.config.backbone import BackboneConfig
from lmoe.config.defaults import injection_section, moe_section
from lmoe.config.injection import InjectionConfig
from lmoe.config.keys import unknown_key
from lmoe.config.moe import MoeConfig
from lmoe.config.pretrain import PretrainConfig
from lmoe.config.run import RunConfig
from lmoe.config.trainer import TrainerConfig
from lmoe.errors import ConfigError
from lmoe.files.resources import resource_dir
from lmoe.pretrain.rules import pretrain_problems
from lmoe.rules.injection import injection_problems
from lmoe.rules.moe import moe_problems
from lmoe.rules.objectives import OBJECTIVES
from lmoe.rules.phases import phase_warnings
from lmoe.rules.routers import ROUTERS, Need
from lmoe.rules.strategies import STRATEGIES
from lmoe.rules.validate import validate
from lmoe.run.parts import with_domains
from lmoe.vocabulary import InjectionStrategy, LoggerKind, RouterKind, RowKind
from tests.composing import compose
from tests.injection.pairs import adapts_native
from tests.metric_names import names, rows, undocumented
from tests.micro import ROOT
from tests.preference_rows import pairs_of

CONF = resource_dir("conf")
FILES = sorted(CONF.rglob("*.yaml"))
NAMES = [str(file.relative_to(CONF)) for file in FILES]
PRETRAIN = ("pretrain.yaml", "corpus/", "model/", "optim/pretrain.yaml")
STUDY = ("study.yaml", "study/")
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
# What a file leaves to the user.
REQUIRED = {
    "backbone/custom.yaml": ["backbone.model_name=somebody/model"],
    "data/custom.yaml": ["data.path=somebody/rows"],
    "phase/adapters.yaml": ["injection=dense_lora"],
    **{
        f"moe/{kind}.yaml": ["injection.num_experts=8"]
        for kind, router in ROUTERS.items()
        if router.needs is Need.domain
    },
}
SUPERVISED = "supervised"
"""The one file of conf/moe/ that is not called like its router: it is another one's, with more than a section."""


def choice(name: str) -> list[str]:
    """The override that takes a file of conf/; none for the two roots."""
    group, _, stem = name.removesuffix(".yaml").rpartition("/")
    return [f"{group}={stem}", *REQUIRED.get(name, [])] if group else []


def sweep_choices(name: str) -> list[str]:
    """The first point of a file in conf/sweep, whose own keys are only read in a multirun."""
    if not name.startswith("sweep/"):
        return []
    params = OmegaConf.load(CONF / name).hydra.sweeper.params
    return [f"{key}={str(values).split(',')[0]}" for key, values in params.items()]


def test_no_file_is_forgotten():
    """The numbers are those of the day this was written: fewer would mean that the loops below see too little."""
    assert len(FILES) >= 40
    assert len(SWEEPS) >= 1
    assert {name.split("/")[0] for name in NAMES if "/" in name} >= {
        "backbone", "callbacks", "corpus", "data", "experiment", "injection", "logger", "model", "moe", "optim",
        "phase", "sweep", "task", "trainer",
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith((*PRETRAIN, *STUDY))])
def test_a_file_of_a_training_composes_validates_and_builds(name, micro, restored, monkeypatch):
    """On the micro backbone and its rows, whatever the file says about those."""
    from lmoe.run.loggers import build_loggers
    from lmoe.run.parts import build_parts
    from lmoe.run.trainer import extra_callbacks

    monkeypatch.setenv("LMOE_REAL_BASE", str(micro.model))  # which not every machine has
    config = compose("train", RunConfig, [*choice(name), *sweep_choices(name)])
    validate(config)
    native = adapts_native(config.injection.strategy)
    backbone = BackboneConfig(
        model_name=str(micro.native if native else micro.model), precision=config.backbone.precision
    )
    config.backbone = backbone
    train, val = str(micro.train), str(micro.val)
    pairs, val_pairs = (override.partition("=")[2] for override in pairs_of(micro))
    if OBJECTIVES[config.task.name].rows is not RowKind.answers:  # single answers are made of pairs too
        train, val = pairs, val_pairs
    for phase in config.phase.phases.values():
        phase.data |= {"path": pairs, "val_path": val_pairs} if phase.data else {}
    config.data = replace(config.data, path=train, val_path=val, max_length=48, cache_dir=str(micro.cache))
    parts = build_parts(config)
    assert parts.plan.sites
    assert len(parts.module.schedule.phases) == len(config.phase.phases)
    assert len(extra_callbacks(config.callbacks)) == len(config.callbacks)
    if config.logger.kind != "wandb":
        assert len(build_loggers(config, micro.cache, None, print)) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(PRETRAIN)])
def test_a_file_of_a_pretraining_composes_validates_and_builds(name, micro, restored):
    from lmoe.backbones.load import load_tokenizer
    from lmoe.pretrain.run import base_model

    config = compose("pretrain", PretrainConfig, [*choice(name), f"corpus.path={micro.train}"])
    assert pretrain_problems(config) == []
    model = base_model(config, load_tokenizer(BackboneConfig(model_name=str(micro.model))))
    assert model.config.hidden_size == config.model.hidden_size


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("moe/")])
def test_a_file_in_conf_moe_leaves_out_nothing_that_is_required(name):
    given, stem = OmegaConf.load(CONF / name), Path(name).stem
    given.pop("defaults", None)
    moe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(MoeConfig), given.get("moe", given)))
    assert isinstance(moe, MoeConfig)
    assert moe.router is (RouterKind.sequence if stem == SUPERVISED else RouterKind(stem))
    assert moe_problems(moe, InjectionConfig()) == []


@pytest.mark.parametrize("kind", [kind for kind, router in ROUTERS.items() if not router.trains])
def test_a_router_without_parameters_is_refused_a_warm_up_and_told_the_cure(kind, restored):
    needed = choice(f"moe/{kind}.yaml")
    with pytest.raises(ConfigError, match="has no parameters; use phase=joint"):
        validate(compose("train", RunConfig, [*needed, "phase=router_warmup"]))
    config = compose("train", RunConfig, needed)
    validate(config)
    assert list(config.phase.phases) == ["joint"]
    assert phase_warnings(config) == [], "what ships does not warn of itself"
    again = compose("train", RunConfig, [*needed, "+phase.phases.later={start: 50%, trainable: [router, lora]}"])
    assert phase_warnings(again)[-1] == f"phase.phases.later names router, but moe.router={kind} has no parameters"


def test_the_oracle_has_an_expert_for_each_domain_of_the_bundled_rows_with_what_its_file_needs(restored):
    domains = sorted(file.stem for file in (resource_dir("data/sft") / "train").iterdir())
    config = compose("train", RunConfig, choice("moe/oracle.yaml"))
    assert with_domains(config.moe, config.injection, domains).domains == domains
    fewer = compose("train", RunConfig, ["moe=oracle"])
    with pytest.raises(ConfigError, match=f"set injection.num_experts={len(domains)}"):
        with_domains(fewer.moe, fewer.injection, domains)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("injection/")])
def test_a_file_in_conf_injection_names_its_strategy_and_is_whole(name):
    given = OmegaConf.load(CONF / name)
    given.pop("defaults", None)
    injection = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(InjectionConfig), given))
    assert isinstance(injection, InjectionConfig)
    assert injection.strategy is InjectionStrategy(Path(name).stem)
    experts = {"num_experts"} if STRATEGIES[injection.strategy].own_routers else set()
    assert {"strategy", "lora_r", "lora_alpha", "lora_dropout"} | experts <= given.keys()
    assert injection_problems(injection, moe_section({})) == []


def test_every_strategy_router_and_logger_has_its_file():
    kinds = (("injection", InjectionStrategy), ("moe", RouterKind), ("logger", LoggerKind))
    for group, kind in kinds:
        found = {Path(n).stem for n in NAMES if n.startswith(f"{group}/")}
        missing = [f"conf/{group}/{name}.yaml" for name in kind if name not in found]
        assert not missing, f"missing: {', '.join(missing)}"
        assert found - set(kind) == ({SUPERVISED} if group == "moe" else set()), group


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("experiment/", "sweep/"))])
def test_an_experiment_is_a_short_diff_with_its_command_on_top(name):
    lines = (CONF / name).read_text(encoding="utf-8").splitlines()
    flag = "" if name.startswith("experiment/") else "-m "
    assert len(lines) <= 30
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python train.py {flag}{choice(name)[0]}")


def test_the_bare_command_is_the_default_that_the_design_promises(restored):
    config = compose("train", RunConfig, [])
    assert (config.backbone.model_name, config.data.path, config.injection.strategy) == (
        "tiny",
        "bundled",
        "mixture_lora",
    )
    assert config == compose("train", RunConfig, ["moe=supervised"])
    assert (config.moe.router, config.moe.router_scope, config.moe.router_target) == ("sequence", "model", "auto")
    (phase,) = config.phase.phases.values()
    assert set(phase.trainable) == {"router", "lora", "attn_lora"} and phase.route_by == "target"
    validate(config)


def test_routers_that_choose_for_each_token_warm_up_first(restored):
    config = compose("train", RunConfig, ["moe=top_k"])
    assert list(config.phase.phases) == ["router_warmup", "experts"]
    assert config.phase.phases["router_warmup"].trainable == ["router"]
    assert set(config.phase.phases["experts"].trainable) == {"lora", "attn_lora"}
    validate(config)


def test_lmoe_inject_takes_routers_that_need_no_targets(restored):
    """Keys left out of lmoe.inject's dicts take the values of conf/ with moe=top_k: a loop of one's own names none."""
    config = compose("train", RunConfig, ["moe=top_k"])
    assert asdict(injection_section({})) == asdict(config.injection)
    assert asdict(moe_section({})) == asdict(config.moe)
    assert asdict(InjectionConfig()) == asdict(config.injection)


def test_the_schedule_of_the_loop_has_one_default(restored):
    assert compose("train", RunConfig, []).trainer.val_every_n_steps == TrainerConfig().val_every_n_steps


def test_the_published_reference_setting(restored):
    config = compose("train", RunConfig, ["experiment=qwen3_5_0_8b_mixture_lora_sft"])
    injection, moe, optim, trainer = config.injection, config.moe, config.optim, config.trainer
    assert config.backbone.model_name == "Qwen/Qwen3.5-0.8B-Base"
    assert (injection.lora_r, injection.lora_alpha, injection.lora_dropout) == (48, 96, 0.05)
    assert (injection.num_experts, injection.top_k) == (4, 2)
    assert injection.target_keywords == ["gate_proj", "up_proj", "down_proj"]
    assert injection.attn_lora.keywords == ["q_proj", "v_proj"]
    assert (moe.router_z_loss_coef, moe.load_balance.aux_loss_coef, moe.router_dtype) == (0.001, 0.01, "float32")
    phases = config.phase.phases
    assert (phases["experts"].start, phases["experts"].trainable) == ("2000", ["lora", "attn_lora"])
    assert (optim.lr, optim.weight_decay, optim.warmup_steps) == (1e-5, 0.01, 200)
    assert (trainer.max_steps, trainer.accumulate_grad_batches, trainer.gradient_clip_val) == (10000, 4, 1.0)
    assert config.data.batch_size == 4


def sweep(file: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def points(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The grid's first and last point."""
    values = {key: entry.get("values", [entry.get("value")]) for key, entry in spec["parameters"].items()}
    return [{k: v[0] for k, v in values.items()}, {k: v[-1] for k, v in values.items()}]


@pytest.mark.parametrize("file", SWEEPS, ids=[file.name for file in SWEEPS])
def test_a_sweep_has_flat_keys_that_exist_and_a_metric_that_is_logged(file, finished_run, restored):
    spec = sweep(file)
    for key, entry in spec["parameters"].items():
        assert unknown_key(RunConfig, key.split(".")) is None, key
        assert not any(isinstance(value, dict) for value in entry.get("values", [])), f"{key} is nested"
        assert "parameters" not in entry, f"{key} is nested"
    assert spec["metric"]["name"] in names(finished_run)
    assert undocumented([spec["metric"]["name"]]) == []
    assert "${args_no_hyphens}" in spec["command"]
    assert re.match(rf"# wandb sweep sweeps/{file.name}\b", file.read_text(encoding="utf-8"))
    for point in points(spec):
        validate(compose("train", RunConfig, [f"{key}={value}" for key, value in point.items()]))


def agent_command(spec: dict[str, Any], point: dict[str, Any], patch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """The command line that W&B's own sweep runner starts for a point of the grid."""
    import wandb.wandb_agent as agent

    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_options: object) -> None:
            started.append(command)

    patch.setattr(agent, "AgentProcess", Process)
    values = {"WANDB_DIR": str(folder), "WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}
    for name, value in values.items():  # the last two the runner sets itself, in the environment of this process
        patch.setenv(name, value)
    runner = agent.Agent.__new__(agent.Agent)
    runner._in_jupyter, runner._function, runner._forward_signals = False, None, False
    runner._run_processes, runner._sweep_command = {}, spec["command"]
    arguments = {key: {"value": value} for key, value in point.items()}
    runner._command_run({"run_id": "point", "args": arguments, "program": spec["program"]})
    return started[0]


def test_the_sweep_runners_own_command_lines_run(train, micro, tmp_path, monkeypatch):
    """Two points of the grid, with the settings of the micro backbone appended."""
    spec = sweep(SWEEPS[0])
    for number, point in enumerate(points(spec)):
        with monkeypatch.context() as patch:
            command = agent_command(spec, point, patch, tmp_path)
        chosen = [f"{key}={value}" for key, value in point.items()]
        assert command == ["/usr/bin/env", "python", "train.py", *chosen]
        settings = [o for o in micro.changed(*chosen, "trainer.max_steps=2", "logger=wandb") if o not in chosen]
        done = train(*command[3:], *settings, run=str(number), settings=False)
        assert done.code == 0, done.text
        assert spec["metric"]["name"] in rows(done.run)[-1]
        assert list((done.run / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("name", [Path(name).stem for name in NAMES if name.startswith("study/")])
def test_a_file_of_a_study_composes_and_so_does_every_value_of_every_arm(name, micro, restored, monkeypatch):
    monkeypatch.setenv("LMOE_REAL_BASE", str(micro.model))  # which not every machine has
    reworded = Path("data/reworded/varied")  # in the test's own folder: make reworded writes it
    reworded.mkdir(parents=True)
    for split, rows_of_split in (("train", micro.train), ("val", micro.val), ("judge", micro.val)):
        (reworded / split).symlink_to(rows_of_split)
    study, given, _, _ = read_study([f"study={name}"])
    assert study.name == name and study.question.endswith("?")
    configs, arms = compose_arms(study, given, [])
    assert list(configs) == list(arms) == [study.baseline, *(other for other in study.arms if other != study.baseline)]
    assert all(bool(arm.space) is bool(study.space) for arm in arms.values())


def test_a_study_of_ones_own_rows_needs_them_alone(micro, restored):
    study, given, _, _ = read_study(["study=my_data", f"data.path={micro.train}", "data.judge_fraction=0.2"])
    configs, arms = compose_arms(study, given, [])
    assert {config.data.judge_fraction for config in configs.values()} == {0.2}
    assert all("data.split_seed=0" in arm.settings for arm in arms.values())


def methods() -> list[str]:
    """The settings of docs/CHOOSING.md, but for those that need adapters of the reader's."""
    section = (ROOT / "docs" / "CHOOSING.md").read_text(encoding="utf-8").partition("## What papers describe")[2]
    quoted = re.findall(r"`([^`]+)`", section.partition("\n## ")[0])
    return [text for text in dict.fromkeys(quoted) if "=" in text and "DIR" not in text and not text.endswith("=")]


@pytest.mark.parametrize("settings", methods())
def test_the_settings_that_stand_for_a_method_compose_as_they_stand(settings, restored):
    config = compose("train", RunConfig, shlex.split(settings))
    validate(config)
    assert phase_warnings(config) == [] or "attn_lora" in settings


def test_methods_are_found():
    assert len(methods()) > 10
