"""`lmoe evaluate --model`: an exported folder has the losses of its run, and what was changed since is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lmoe
from lmoe.cli.main import app
from lmoe.config.evaluate import EvaluateSettings
from lmoe.errors import CheckpointError
from lmoe.evaluate.evaluate import evaluate
from lmoe.evaluate.val_loss import val_loss, validation_rows
from tests.micro import DOMAINS
from tests.pair_rows import PAIR_DOMAINS, pairs_of, write_pairs
from tests.tiny_models import randomise

WAYS = {
    "native-moe": {"strategy": "moe_expert_lora", "num_experts": 3, "lora_r": 4},
    "merged": {"strategy": "dense_lora", "lora_r": 4},
}


@pytest.fixture(scope="module")
def places(micro, finished_run, tmp_path_factory) -> dict[str, tuple[Path, Path, str]]:
    """Run, exported folder and what the command said, of each format; the rows are those of finished_run."""
    found = {}
    for way, injection in WAYS.items():
        place = tmp_path_factory.mktemp(way)
        (place / "run").mkdir()
        shutil.copy(finished_run / "config.yaml", place / "run")
        model = AutoModelForCausalLM.from_pretrained(micro.model)
        lmoe.inject(model, injection)
        randomise(model, std=0.1)
        tokenizer = AutoTokenizer.from_pretrained(finished_run / "adapter")
        lmoe.save(model, place / "run" / "adapter", tokenizer=tokenizer, base_model=str(micro.model))
        given = ["export", "--checkpoint", str(place / "run"), "--format", way, "--output", str(place / "out")]
        done = CliRunner().invoke(app, given)
        assert done.exit_code == 0, done.output
        found[way] = (place / "run", place / "out", done.stdout)
    return found


def measured(*arguments: str) -> tuple[list[dict], list[str], str]:
    """Rows of the exported model, notes, and what was said."""
    model = arguments[arguments.index("--model") + 1]
    done = CliRunner().invoke(app, ["evaluate", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    content = json.loads((Path(model) / "evaluation" / "evaluation.json").read_text())
    return content["exported"], content["notes"], " ".join(done.stdout.split())


def test_the_price_comes_first_and_the_next_command_last(places):
    _, folder, said = places["native-moe"]
    lines = said.splitlines()
    assert lines[0].startswith("Qwen3MoeForCausalLM: ") and "each of 2 layers holds 3 copies of its FFN" in lines[0]
    assert lines[-1].endswith(f"lmoe evaluate --model {folder}")


@pytest.mark.parametrize("way", WAYS)
def test_an_exported_model_has_the_losses_of_its_run_on_the_rows_of_the_run(places, way):
    run, folder, _ = places[way]
    rows, notes, said = measured("--model", str(folder))
    assert [row["domain"] for row in rows] == [*DOMAINS, "(all tokens)", "(domain mean)"]
    own = {row.domain: row for row in evaluate(EvaluateSettings(checkpoint=str(run))).losses}
    for row in rows:
        assert row["run_loss"] == own[row["domain"]].on_loss
        assert row["loss"] == pytest.approx(row["run_loss"], abs=1e-5)
        assert abs(row["loss"] - own[row["domain"]].off_loss) > 1e-4
    assert notes == [] and "of the run │ difference" in said.replace("┃", "│")


def test_a_folder_that_was_changed_by_hand_is_noticed_and_its_losses_show_it(places, tmp_path):
    run, folder, _ = places["native-moe"]
    changed = shutil.copytree(folder, tmp_path / "changed", ignore=shutil.ignore_patterns("evaluation"))
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    save_file({"x": torch.zeros(1)}, changed / "more.safetensors")
    (changed / "generation_config.json").unlink()
    rows, notes, _ = measured("--model", str(changed), "--checkpoint", str(run), "--limit", "1")
    assert [note.split(": ", 1)[1] for note in notes] == [
        "generation_config.json is missing",
        "model.safetensors has been changed since",
        "more.safetensors has been added",
    ]
    assert abs(rows[-1]["loss"] - rows[-1]["run_loss"]) > 1e-3


def test_a_run_that_is_gone_or_another_one_is_said_and_one_may_be_named(places, tmp_path):
    run, folder, _ = places["native-moe"]
    moved = shutil.copytree(folder, tmp_path / "out", ignore=shutil.ignore_patterns("evaluation"))
    rows, notes, said = measured("--model", str(moved), "--limit", "1", "--data", str(places_rows(run)))
    assert rows[0]["run_loss"] is None
    assert f"the run that {moved} was exported from is not at {tmp_path / 'run'}; name it with --checkpoint" in said
    other = places["merged"][0]
    rows, notes, _ = measured("--model", str(moved), "--limit", "1", "--checkpoint", str(other))
    assert "adapter.safetensors is another one" in notes[0] and rows[0]["run_loss"] is not None
    rows, notes, _ = measured("--model", str(moved), "--limit", "1", "--checkpoint", str(run))
    assert notes == [] and rows[-1]["loss"] == pytest.approx(rows[-1]["run_loss"], abs=1e-5)
    record = json.loads((moved / "lmoe_export.json").read_text())
    (moved / "lmoe_export.json").write_text(json.dumps(record | {"run": ""}))  # as the hub has it
    _, notes, said = measured("--model", str(moved), "--limit", "1", "--data", str(places_rows(run)))
    assert "does not say where the run is that it was exported from; name it with --checkpoint" in said
    (moved / "lmoe_export.json").write_text('{"format_version": 9}')
    with pytest.raises(CheckpointError, match="format_version is 9; this lmoe reads 1"):
        evaluate(EvaluateSettings(model=str(moved)))


def places_rows(run: Path) -> str:
    """The validation rows that a run names."""
    from tests.micro import saved_config

    return saved_config(run)["data"]["val_path"]


def test_any_plain_model_is_measured_and_what_nobody_knows_of_it_is_said(micro, tmp_path):
    plain = shutil.copytree(micro.model, tmp_path / "plain")
    rows, notes, _ = measured("--model", str(plain), "--data", str(micro.val), "--limit", "1", "--max-length", "48")
    assert rows[0]["loss"] > 0 and rows[0]["run_loss"] is None
    assert "has no lmoe_export.json" in notes[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give --checkpoint RUN (a trained mixture) or --model FOLDER"),
        (("--model", "x", "--samples", "2", "--choices", "bundled"), "--samples 2 is for --checkpoint alone"),
        (("--model", "x", "--data", "none"), "--data none leaves nothing to measure with --model"),
        (("--model", "/nowhere/model", "--data", "bundled"), "--model /nowhere/model"),
        (("--model", "x", "--checkpoint", "/nowhere/run"), "/nowhere/run: no such run or adapter directory"),
    ],
)
def test_flags_that_cannot_act_and_places_that_are_not_there_are_named(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 1 and said in " ".join(done.output.split()), done.output
    assert not any(tmp_path.iterdir())


def of_pairs(run: Path, folder: Path, task: str, *, rows: int) -> Path:
    """A copy of a run that says it has learnt a task from pairs of answers, which lie beside it."""
    write_pairs(folder / "pairs", rows=rows, first=100)
    own = Path(shutil.copytree(run, folder / "run"))
    data = {"path": str(folder / "pairs"), "val_path": str(folder / "pairs"), "max_length": 48}
    (own / "config.yaml").write_text(yaml.safe_dump({"task": {"name": task}, "data": data}))
    return own


def test_of_a_run_that_learnt_by_kto_bad_answers_count_and_a_note_says_so(places, tmp_path):
    run, folder, _ = places["merged"]
    own = of_pairs(run, tmp_path, "kto", rows=2)
    found = evaluate(EvaluateSettings(model=str(folder), checkpoint=str(own)))
    assert "the run has learnt by kto: the loss is that of its bad answers too" in found.notes


def test_of_a_run_that_learnt_from_pairs_the_chosen_answers_are_measured(places, tmp_path):
    run, folder, _ = places["merged"]
    own = of_pairs(run, tmp_path, "orpo", rows=3)
    found = evaluate(EvaluateSettings(model=str(folder), checkpoint=str(own)))
    with (tmp_path / "chosen.jsonl").open("w") as file:
        for domain in PAIR_DOMAINS:
            for row in pairs_of(domain, rows=3, first=100):
                said = {"prompt": row["prompt"], "response": row["chosen"], "domain": domain}
                file.write(json.dumps(said) + "\n")
    chosen = evaluate(EvaluateSettings(model=str(folder), checkpoint=str(own), data=str(tmp_path / "chosen.jsonl")))
    assert [row.domain for row in found.exported] == [*PAIR_DOMAINS, "(all tokens)", "(domain mean)"]
    assert [row.loss for row in found.exported] == pytest.approx([row.loss for row in chosen.exported], rel=1e-5)
    assert [row.run_loss for row in found.exported] == pytest.approx([row.loss for row in found.exported], rel=1e-4)
    assert "the run has learnt by orpo: the loss is that of the chosen answers of its pairs" in found.notes
    model, tokenizer = lmoe.load(own)
    rows = validation_rows(None, own, model, tokenizer)
    assert val_loss(model, tokenizer, rows) == pytest.approx(found.exported[2].run_loss, rel=1e-5)
