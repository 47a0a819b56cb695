"""Runs that prefer answers, alone and after SFT: dry, in mixed precision, on streams, with clusters; refusals."""

import json

import pytest
import torch

from lmoe.errors import DataError
from tests.metric_names import rows
from tests.preference_rows import labelled_of, pairs_of

LN2 = float(torch.tensor(2.0).log())


def then(micro, task: str, own: str | None = None, phase: str = "") -> tuple[str, ...]:
    """SFT, and from step 3 on another objective, by default on pairs."""
    train, val = (override.partition("=")[2] for override in pairs_of(micro))
    data = f"path: {train}, val_path: {val}" if own is None else own
    lesson = f"{{start: 3, trainable: [lora], task: {{{task}}}, data: {{{data}}}{phase}}}"
    return "phase=joint", f"+phase.phases.later={lesson}"


@pytest.mark.parametrize("dry", ["config", "estimate", "preflight"])
def test_a_run_of_two_lessons_can_be_tried_dry(train, micro, dry):
    """The larger batch of the two is what counts."""
    train_rows, val = (override.partition("=")[2] for override in pairs_of(micro))
    own = f"path: {train_rows}, val_path: {val}, batch_size: 6, max_length: 64"
    done = train(*then(micro, "name: dpo, reference: start", own), f"dry_run={dry}")
    assert done.code == 0, done.text
    said = {
        "config": ("no problems",),
        "estimate": ("a micro-batch of 6 rows (2 sequences each) of 64 tokens",),
        "preflight": (
            "phase joint: steps 1 to 3 train attn_lora, lora, router by sft; rows: data",
            "phase later: steps 4 to 6 train lora by dpo; rows: phase.phases.later.data",
            "phase.phases.later.data: 24 rows to learn",
            "preflight: ready",
        ),
    }
    for words in said[dry]:
        assert words in done.text
    assert not done.run.exists()


def operations_of_a_step(text: str) -> float:
    """In TFLOP, by which the seconds of every device are worked out: the rate of this CPU is measured, and drifts."""
    return float(text.partition("time of ")[2].split()[0])


def test_an_estimate_counts_the_forwards_of_a_reference(train, micro):
    def estimated(task: str) -> float:
        done = train(f"task={task}", *pairs_of(micro), "phase=joint", "dry_run=estimate")
        assert done.code == 0, done.text
        return operations_of_a_step(done.text)

    assert 1.2 * estimated("simpo") < estimated("dpo") < 2 * estimated("simpo")


def test_in_mixed_precision_a_run_begins_at_ln_2_too_and_learns(train, micro):
    done = train("task=dpo", *pairs_of(micro), "phase=joint", "trainer.precision=bf16-mixed", "optim.lr=0.01")
    assert done.code == 0, done.text
    table = {int(row["step"]): row for row in rows(done.run)}
    assert table[0]["val/loss"] == table[1]["train/loss"] == pytest.approx(LN2, abs=1e-7)
    assert table[6]["val/loss"] < 0.9 * LN2
    assert table[6]["val/reward_accuracy"] > 0.5 < table[6]["train/reward_margin"] + 0.5
    assert "loss per pair" in done.text


WAYS = {
    "rows read while training": ("dpo", "data.streaming=true", "data.shuffle_buffer=8"),
    "answers read while training": ("kto", "data.streaming=true", "data.shuffle_buffer=8"),
    "clusters of prompts": ("kto", "moe=sequence", "moe.router_target=cluster"),
    "clusters of pairs": ("dpo", "moe=sequence", "moe.router_target=cluster"),
    "a decision for each turn": ("kto", "moe=sequence", "moe.router_scope=model", "moe.decide=turn"),
    "hashes of prompts": ("kto", "moe=prompt_hash"),
}


@pytest.mark.parametrize("chosen", WAYS.values(), ids=WAYS)
def test_a_preference_run_works_with(train, micro, chosen):
    task, *settings = chosen
    data = labelled_of(micro) if task == "kto" else pairs_of(micro)
    done = train(f"task={task}", *data, "phase=joint", "trainer.max_steps=2", *settings)
    assert done.code == 0, done.text
    last = rows(done.run)[-1]
    assert 0 < last["val/loss"] < 2 and 0 <= last["val/reward_accuracy"] <= 1


def test_rows_that_an_objective_cannot_learn_from_are_refused_with_where_others_go(micro, restored, tmp_path):
    """Rows are dropped where others are left alone."""
    pair = {"prompt": "say one", "chosen": "red", "rejected": "blue"}
    some = tmp_path / "code.jsonl"
    some.write_text((micro.train / "code.jsonl").read_text().splitlines()[0] + "\n" + json.dumps(pair) + "\n")
    for own, key in ((f"path: {some}", "phase.phases.later.data.on_bad_row"), (f"path: {micro.train}", ""), ("", "")):
        with pytest.raises(DataError) as refusal:
            micro.parts(*then(micro, "name: dpo", own))
        text = str(refusal.value)
        assert "code.jsonl:1" in text and "phase.phases.later.task.name=dpo" in text
        assert f"with {key}=drop" in text if key else "=drop" not in text
        assert ("phase.phases.later.data={path: …} gives it some" in text) == (not own)


@pytest.mark.parametrize("label", [True, False])
def test_answers_that_are_all_good_or_all_bad_are_refused(micro, restored, tmp_path, label):
    lines = [{"prompt": f"say {n}", "completion": "red", "label": label} for n in range(6)]
    file = tmp_path / "alike.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    word, other = ("good", "label false") if label else ("bad", "label true")
    with pytest.raises(DataError, match=f"^data.path: all 5 rows to train on are {word} answers.*{other}"):
        micro.parts("task=kto", "phase=joint", f"data.path={file}", "data.val_path=null")
    with pytest.raises(DataError, match=r"^phase.phases.later.data.path: all .*phase.phases.later.task.name=kto"):
        micro.parts(*then(micro, "name: kto", f"path: {file}"))


def test_a_place_that_is_not_there_is_named_by_the_key_of_the_phase(train, micro):
    for dry in ("config", "preflight"):
        done = train(*then(micro, "name: dpo", "path: no/such.jsonl"), f"dry_run={dry}")
        assert done.code == 1
        assert "phase.phases.later.data.path=no/such.jsonl: no such file or folder" in done.text


def test_a_length_beyond_the_context_is_named_by_the_key_of_the_phase(micro, restored):
    train_rows = pairs_of(micro)[0].partition("=")[2]
    with pytest.raises(DataError, match=r"^phase.phases.later.data.max_length=4096 is beyond"):
        micro.parts(*then(micro, "name: dpo", f"path: {train_rows}, max_length: 4096"))


def test_routers_that_are_frozen_stay_as_they_are_beside_a_reference_that_changes_places_with_them(train, micro):
    from safetensors.torch import load_file

    settings = ("task=dpo", "task.reference=start", *pairs_of(micro), "phase=adapters", "optim.lr=0.01")
    parts = micro.parts(*settings)
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters() if name.endswith("router.weight")}
    done = train(*settings, "trainer.max_steps=2")
    assert done.code == 0, done.text
    found = load_file(done.run / "adapter" / "adapter.safetensors")
    assert before and all(torch.equal(found[name], tensor) for name, tensor in before.items())
