"""What may change on resume: keys alone, without a run."""

from types import SimpleNamespace

import pytest

from lmoe.resume.rules import batch_sizes_of_phases, refused

OWN = "phase.phases.prefer.data.batch_size"
ACCUMULATED = "trainer.accumulate_grad_batches"
VALUES = {"data.batch_size": 16, ACCUMULATED: 1, "trainer.devices": 1, OWN: 4}


def reasons(changes: dict, values: dict | None = None) -> dict[str, str]:
    """Why keys may not change that the command names, in a run with a record of its contents."""
    saved = VALUES if values is None else values
    return refused(changes, saved, meant=set(changes), watched=False, recorded=True)


def test_a_phase_with_a_batch_size_of_its_own_keeps_the_samples_of_a_step_too():
    run = {"data.batch_size": (8, 16), ACCUMULATED: (2, 1)}
    found = reasons(run)
    assert found.keys() == {ACCUMULATED}
    assert "a step of phase prefer would take 8 samples instead of 4: change phase.phases.prefer" in found[ACCUMULATED]
    assert reasons(run | {OWN: (2, 4)}) == {}
    assert reasons(run, {name: value for name, value in VALUES.items() if name != OWN}) == {}


def test_the_batch_size_of_one_phase_alone_changes_its_steps():
    assert reasons({OWN: (2, 4)}).keys() == {OWN}
    found = reasons({OWN: (2, 4), ACCUMULATED: (2, 1)})
    assert found.keys() == {ACCUMULATED}
    assert "a step would take 32 samples instead of 16" in found[ACCUMULATED]


def test_a_batch_size_of_its_own_neither_comes_nor_goes():
    other = "phase.phases.joint.data.batch_size"
    for changes in ({other: (16, None)}, {OWN: (None, 4)}):
        assert set(reasons(changes).values()) == {"it cannot change on resume"}


def test_batch_sizes_of_phases_are_those_that_they_name_themselves():
    phases = {"joint": SimpleNamespace(data={}), "prefer": SimpleNamespace(data={"path": "pairs", "batch_size": 4})}
    assert batch_sizes_of_phases(phases) == {OWN: 4}


@pytest.mark.parametrize("section", ["data", "phase.phases.prefer.data"])
def test_rows_may_be_elsewhere_where_the_command_says_so_and_the_run_knows_what_they_were(section):
    for name in ("path", "val_path", "sources.code.path", "sources.code.revision"):
        key = f"{section}.{name}"
        changes = {key: ("new", "old")}
        assert refused(changes, VALUES, meant={key}, watched=False, recorded=True) == {}
        assert key in refused(changes, VALUES, meant={key}, watched=False, recorded=False)
        assert key in refused(changes, VALUES, meant=(), watched=False, recorded=True)


@pytest.mark.parametrize(
    ("key", "new", "old"),
    [
        ("trainer.device_ids", [1], [0]),
        ("trainer.device_ids", None, [0, 1]),
        ("trainer.gradient_checkpointing", True, False),
        ("moe.backend", "auto", "triton"),
    ],
)
def test_what_computes_and_how_may_change_where_the_command_says_so(key, new, old):
    assert reasons({key: (new, old)}) == {}
    assert key in refused({key: (new, old)}, VALUES, meant=(), watched=False, recorded=True)


@pytest.mark.parametrize("key", ["data.sources.code", "data.sources.code.weight", "data.sources.code.domain"])
def test_what_is_made_of_the_rows_of_a_source_stays(key):
    assert reasons({key: ("new", "old")}) == {key: "it cannot change on resume"}
