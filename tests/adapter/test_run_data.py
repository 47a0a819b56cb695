"""What a saved config says that a run has learnt, and from which rows."""

import pytest
import yaml

from lmoe.adapter.run_data import run_lessons
from lmoe.errors import CheckpointError
from lmoe.vocabulary import Reference, TaskName

PAIRS = {"path": "pairs.jsonl", "batch_size": 2}


def lessons_of(folder, **config):
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return run_lessons(folder)


def test_an_adapter_on_its_own_and_a_run_without_objectives_have_learnt_answers(tmp_path):
    assert [lesson.task.name for lesson in run_lessons(None).values()] == [TaskName.sft]
    phases = {"b": {"start": "50%", "no_key_of_this_version": 1}, "a": {}}
    found = lessons_of(tmp_path, data={"path": "rows.jsonl"}, phase={"phases": phases}, task={"name": "sft"})
    assert list(found) == [""] and found[""].data.path == "rows.jsonl"


def test_each_phase_has_its_objective_and_rows_in_the_order_of_the_phases(tmp_path):
    phases = {
        "prefer": {"start": "50%", "task": {"name": "dpo", "reference": "start"}, "data": PAIRS},
        "learn": {"start": "0", "task": {}, "data": {}},
    }
    data = {"path": "rows.jsonl", "prompt_prefix": "x", "domains": ["a"]}
    found = lessons_of(tmp_path, data=data, phase={"phases": phases}, trainer={"max_steps": 10})
    assert list(found) == ["learn", "prefer"]
    learn, prefer = found.values()
    assert (learn.task.name, learn.data.path, learn.data.domains) == (TaskName.sft, "rows.jsonl", ["a"])
    assert (prefer.task.name, prefer.task.beta, prefer.task.reference) == (TaskName.dpo, 0.1, Reference.start)
    assert (prefer.data.path, prefer.data.prompt_prefix, prefer.data.domains) == ("pairs.jsonl", "x", None)


def test_a_run_without_phases_has_the_objective_of_its_section(tmp_path):
    found = lessons_of(tmp_path, task={"name": "simpo", "gamma": 0.5}, data=PAIRS)
    assert [(name, lesson.task.gamma, lesson.task.beta) for name, lesson in found.items()] == [("", 0.5, 2.0)]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"task": {"name": "dop"}}, "allowed: sft, dpo, orpo, simpo, kto, reward; did you mean dpo?"),
        ({"task": {"name": "dpo", "betta": 1}}, "task.betta: no such key"),
        (
            {"task": {"name": "dpo"}, "phase": {"phases": {"a": {"start": "soon"}}}},
            "the start of a phase: got 'soon'",
        ),
    ],
)
def test_a_config_that_says_something_else_is_refused(tmp_path, config, said):
    with pytest.raises(CheckpointError, match="what its phases learn cannot be read: ") as caught:
        lessons_of(tmp_path, **config)
    assert said in str(caught.value) and "config.yaml" in str(caught.value)
