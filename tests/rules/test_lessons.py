"""Objectives of a run and of its phases, and the rows for them: what is refused, under which key, and what helps."""

import pytest

from lmoe.config.data import DataConfig
from lmoe.config.phase import HandoffConfig, PhaseConfig
from lmoe.config.run import RunConfig, TaskConfig
from lmoe.rules.lessons import lesson_of, lesson_problems
from lmoe.rules.study import objective_problems
from lmoe.rules.validate import run_problems
from lmoe.vocabulary import PreferenceLoss, Reference, Role, RouterTarget, TaskName, TrainOn

PAIRS = {"path": "bundled", "batch_size": 4}


def config(task: TaskConfig | None = None, **phases: PhaseConfig) -> RunConfig:
    """A run; without phases of one that trains adapters."""
    found = RunConfig(task=task or TaskConfig())
    found.phase.phases = phases or {"only": PhaseConfig(trainable=[Role.lora])}
    return found


def then_dpo(task: dict | None = None, data: dict | None = None, **settings) -> RunConfig:
    """SFT, and from step 50 on a phase of another objective."""
    return config(
        sft=PhaseConfig(trainable=[Role.lora]),
        dpo=PhaseConfig(
            start="50",
            trainable=[Role.lora],
            task={"name": "dpo"} if task is None else task,
            data=PAIRS if data is None else data,
            **settings,
        ),
    )


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


REFUSED = {
    "beta=0": (TaskConfig(name=TaskName.dpo, beta=0.0), "task.beta is 0.0, must be above 0"),
    "beta<0": (TaskConfig(name=TaskName.simpo, beta=-1.0), "task.beta is -1.0, must be above 0"),
    "beta=nan": (TaskConfig(name=TaskName.orpo, beta=float("nan")), "task.beta is nan, must be above 0"),
    "gamma": (TaskConfig(name=TaskName.simpo, gamma=-0.1), "task.gamma is -0.1, must be at least 0"),
    "weight": (TaskConfig(name=TaskName.kto, bad_weight=0.0), "task.bad_weight is 0.0, must be above 0"),
    "smoothing": (
        TaskConfig(name=TaskName.dpo, label_smoothing=0.5),
        "task.label_smoothing is 0.5, must be from 0 to below 0.5",
    ),
    "smoothing of hinge": (
        TaskConfig(name=TaskName.dpo, label_smoothing=0.1, loss_type=PreferenceLoss.hinge),
        "task.label_smoothing has no effect with task.loss_type=hinge",
    ),
    "beta of sft": (TaskConfig(beta=0.1), "task.beta has no effect with task.name=sft"),
    "dropout of sft": (TaskConfig(dropout=True), "task.dropout has no effect with task.name=sft"),
    "gamma of dpo": (TaskConfig(name=TaskName.dpo, gamma=1.0), "task.gamma has no effect with task.name=dpo"),
    "reference of orpo": (
        TaskConfig(name=TaskName.orpo, reference=Reference.base),
        "task.reference has no effect with task.name=orpo",
    ),
    "weights of dpo": (TaskConfig(name=TaskName.dpo, good_weight=2.0), "task.good_weight has no effect"),
    "precompute of simpo": (
        TaskConfig(name=TaskName.simpo, precompute_reference=True),
        "task.precompute_reference has no effect with task.name=simpo",
    ),
}


@pytest.mark.parametrize(("task", "message"), REFUSED.values(), ids=REFUSED)
def test_a_setting_of_an_objective_is_refused_by_its_key(task, message):
    assert message in only(lesson_problems(config(task)))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("packing", True, "packing=true: task.name=dpo keeps"),
        ("train_on", TrainOn.all, "train_on=all: task.name=dpo compares"),
    ],
)
def test_rows_are_refused_by_the_key_that_mends_it(setting, value, message):
    run = config(TaskConfig(name=TaskName.dpo))
    setattr(run.data, setting, value)
    assert f"data.{message}" in only(lesson_problems(run))
    run = then_dpo()
    setattr(run.data, setting, value)  # sft may, and the rows of the phase take it over
    found = only(lesson_problems(run))
    assert found.startswith(f"phase.phases.dpo.data.{setting}")
    mended = "false" if setting == "packing" else "assistant"
    assert f"set phase.phases.dpo.data.{setting}={mended}" in found
    run.phase.phases["dpo"].data[setting] = mended if setting == "train_on" else False
    assert lesson_problems(run) == []


def test_kto_needs_two_rows_in_a_batch():
    run = config(TaskConfig(name=TaskName.kto))
    run.data.batch_size = 1
    assert "data.batch_size=1: task.name=kto measures" in only(lesson_problems(run))
    run = then_dpo({"name": "kto"}, {**PAIRS, "batch_size": 1})
    assert "phase.phases.dpo.data.batch_size=1: phase.phases.dpo.task.name=kto" in only(lesson_problems(run))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (then_dpo({"name": "dpo", "betta": 0.1}), ("phase.phases.dpo.task", "betta", "beta")),
        (then_dpo({"name": "dop"}), ("phase.phases.dpo.task.name", "dop", "dpo")),
        (then_dpo(data={**PAIRS, "max_lenght": 64}), ("phase.phases.dpo.data", "max_lenght", "max_length")),
        (then_dpo({"name": "dpo", "beta": "much"}), ("phase.phases.dpo.task.beta", "much")),
        (then_dpo(data={**PAIRS, "batch_size": 0}), ("phase.phases.dpo.data.batch_size is 0",)),
        (then_dpo({"name": "dpo", "beta": float("inf")}), ("phase.phases.dpo.task.beta", "inf")),
        (then_dpo({"name": "dpo", "beta": -1}), ("phase.phases.dpo.task.beta is -1",)),
        (then_dpo({"name": "simpo", "loss_type": "ipo"}), ("phase.phases.dpo.task.loss_type has no effect", "simpo")),
        (
            then_dpo(data={**PAIRS, "chat_template": "x.jinja"}),
            ("phase.phases.dpo.data.chat_template", "set data.chat"),
        ),
        (then_dpo(data={**PAIRS, "streaming": True}), ("phase.phases.dpo.data.streaming", "data.streaming")),
    ],
)
def test_a_mistake_in_the_section_of_a_phase_is_named_by_its_key(run, words):
    found = lesson_problems(run)
    assert any(all(word in problem for word in words) for problem in found), found


def test_a_place_of_rows_of_a_phase_that_is_not_there_is_found_before_a_run():
    found = only([p for p in run_problems(then_dpo(data={"path": "no/such.jsonl"})) if "no/such" in p])
    assert found.startswith("phase.phases.dpo.data.path=no/such.jsonl")
    found = only([p for p in run_problems(then_dpo(data={**PAIRS, "val_path": "./lost.jsonl"})) if "lost" in p])
    assert found.startswith("phase.phases.dpo.data.val_path=./lost.jsonl")
    run = then_dpo(data={"batch_size": 60_000})
    run.trainer.accumulate_grad_batches = 60_000
    found = [problem for problem in run_problems(run) if "data.batch_size=60000 times" in problem]
    assert only(found).startswith("phase.phases.dpo.data.batch_size")


def test_an_epoch_a_stream_and_clusters_are_of_one_set_of_rows():
    run = then_dpo()
    run.data.streaming, run.trainer.max_epochs, run.moe.router_target = True, 2.0, RouterTarget.cluster
    found = lesson_problems(run)
    for key in ("data.streaming", "trainer.max_epochs", "moe.router_target=cluster"):
        assert any(p.startswith(key) and "phase.phases.<name>.data" in p for p in found), (key, found)
    run = then_dpo({"name": "kto"}, data={})
    run.task.name = TaskName.dpo
    assert lesson_problems(run) == []
    run.data.streaming = True  # the pairs of one phase are single answers in the other
    assert only(lesson_problems(run)).startswith("data.streaming=true cannot be where not all phases learn")


def test_a_phase_of_the_same_objective_takes_over_its_settings_and_one_of_another_does_not():
    run = config(
        TaskConfig(name=TaskName.dpo, beta=0.3),
        first=PhaseConfig(trainable=[Role.lora]),
        second=PhaseConfig(start="50", trainable=[Role.lora], task={"label_smoothing": 0.1}),
        third=PhaseConfig(start="60", trainable=[Role.lora], task={"name": "simpo"}),
    )
    assert lesson_problems(run) == []
    second, third = lesson_of(run, "second").task, lesson_of(run, "third").task
    assert (second.name, second.beta, second.label_smoothing) == (TaskName.dpo, 0.3, 0.1)
    assert (third.beta, third.gamma) == (2.0, 1.0)


def test_rows_of_a_phase_take_over_what_is_not_of_certain_rows():
    run = then_dpo()
    run.data = DataConfig(path="here.jsonl", val_path="there.jsonl", max_length=64, columns={"response": "x"})
    data = lesson_of(run, "dpo").data
    assert (data.path, data.val_path, data.columns, data.max_length, data.batch_size) == ("bundled", None, {}, 64, 4)


@pytest.mark.parametrize("role", [Role.base_ffn, Role.head])
def test_a_base_that_is_trained_is_no_reference(role):
    run = then_dpo()
    run.phase.phases["sft"].trainable = [role]
    found = only(lesson_problems(run))
    assert (
        found.startswith("phase.phases.dpo.task.reference=base")
        and "set phase.phases.dpo.task.reference=start" in found
    )
    run.phase.phases["dpo"].task["reference"] = "start"
    assert lesson_problems(run) == []


def test_a_start_is_no_reference_where_more_than_weights_changes():
    """The reference is a copy of the weights, and what else decides would change in it too."""
    run = then_dpo({"name": "dpo", "reference": "start"}, lora_handoff=HandoffConfig(role=Role.lora))
    assert "phase.phases.dpo.task.reference=start: phase.phases.dpo.lora_handoff fades lora" in only(
        lesson_problems(run)
    )
    run = then_dpo({"name": "dpo", "reference": "start"})
    run.moe.temperature_end = 0.5
    assert "moe.temperature_end changes what routers decide in phase dpo" in only(lesson_problems(run))
    run.moe.anneal_steps = "50"  # from there on it stays
    assert lesson_problems(run) == []


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("injection", "lora_dropout", 0.1),
        ("moe", "router_noise", 0.5),
        ("moe", "router_noise_end", 0.2),
        ("moe", "expert_dropout", 0.1),
    ],
)
def test_dropout_and_noise_that_no_objective_trains_with_are_refused(section, setting, value):
    run = config(TaskConfig(name=TaskName.dpo))
    setattr(getattr(run, section), setting, value)
    assert only(lesson_problems(run)).startswith(f"{section}.{setting}={value:g} has no effect with task.dropout=false")
    run.task.dropout = True
    assert lesson_problems(run) == []
    run = then_dpo()
    setattr(getattr(run, section), setting, value)
    assert lesson_problems(run) == [], "the first phase trains with it"


@pytest.mark.parametrize(
    ("run", "phase", "keys"),
    [
        (True, None, ["task"]),
        (False, {"precompute_reference": True}, ["phase.phases.only.task"]),
        (False, {"precompute_reference": False}, []),
    ],
)
def test_a_reference_is_not_computed_beforehand_for_rows_of_a_stream(run, phase, keys):
    dpo = TaskConfig(name=TaskName.dpo, precompute_reference=run)
    made = config(dpo, only=PhaseConfig(trainable=[Role.lora], task=phase or {}))
    made.data = DataConfig(path="bundled", packing=False, streaming=True)
    found = [problem for problem in lesson_problems(made) if "precompute_reference" in problem]
    assert found == [
        f"{key}.precompute_reference=true: the rows of a stream are not known before; leave it out" for key in keys
    ]


@pytest.mark.parametrize("switch", ["router_noise", "expert_dropout"])
def test_a_switch_of_a_phase_without_dropout_is_refused(switch):
    found = only(lesson_problems(then_dpo(**{switch: True})))
    assert found.startswith(f"phase.phases.dpo.{switch}=true has no effect with phase.phases.dpo.task.dropout=false")
    assert lesson_problems(then_dpo({"name": "dpo", "dropout": True}, **{switch: True})) == []


def test_runs_that_prefer_answers_are_not_compared_by_nats():
    assert objective_problems(config()) == []
    assert "task.name=dpo" in only(objective_problems(then_dpo()))
    assert "task.name=kto" in only(objective_problems(config(TaskConfig(name=TaskName.kto))))
