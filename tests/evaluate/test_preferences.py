"""Preferences: figures of a loop over single answers, whatever the batch, by the objective that the rows ask for."""

import csv
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from torch import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe
from lmoe.config.evaluate import EvaluateSettings
from lmoe.config.run import TaskConfig
from lmoe.errors import ConfigError, DataError
from lmoe.evaluate.evaluate import evaluate
from lmoe.evaluate.losses import MEAN
from lmoe.evaluate.preferences import preference_figures, row_figures
from lmoe.evaluate.results import Evaluation
from lmoe.evaluate.rows import evaluation_rows
from lmoe.evaluate.subject import Subject
from lmoe.evaluate.tables import evaluation_tables
from lmoe.evaluate.wandb_tables import metrics
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.injection.tracing import domain as of_domain
from lmoe.objectives.objective import objective_of
from lmoe.objectives.preference import ComparesAnswers
from lmoe.pretrain.bpe import TURN_END
from lmoe.rules.objectives import OBJECTIVES
from lmoe.vocabulary import RowKind, TaskName
from tests.evaluate.dumb_likelihood import chat, token_loglikelihoods
from tests.micro import DOMAINS
from tests.pair_rows import PAIR_DOMAINS, pairs_of, write_pairs
from tests.tiny_models import randomise

ALL_PAIRS, LENGTH = "(all pairs)", 48
GONE = {"prompt": "gone", "chosen": "red", "rejected": ""}
BEHIND_THE_CUT = {"prompt": "say " * 40, "chosen": "red", "rejected": "blue"}
CUT = {"prompt": "cut", "chosen": "fish", "rejected": "river " * 20}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Four pairs a domain, and three of which an answer is missing, or cut, wholly or in part."""
    folder = tmp_path_factory.mktemp("pairs") / "val"
    write_pairs(folder, rows=4, first=100, more=(GONE, BEHIND_THE_CUT, CUT))
    return folder


def mixture(micro, router: str, **settings):
    """A mixture away from its start."""
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    lmoe.inject(model, {"num_experts": 3, "lora_r": 4}, {"router": router, **settings})
    randomise(model, std=0.2)
    return model.eval()


@pytest.fixture(scope="module", params=["top_k", "sequence"])
def model(request, micro):
    """Of routers that decide by tokens, and by prompts."""
    return mixture(micro, request.param)


@pytest.fixture(scope="module")
def by_token(micro):
    return mixture(micro, "top_k")


def rows_of(subject: Subject, place: Path, kind: RowKind = RowKind.pairs, **settings):
    asked = EvaluateSettings(checkpoint="none", data=str(place), **settings)
    moe = injected(subject.model).moe
    return evaluation_rows(asked, None, subject.tokenizer, moe, max_length=LENGTH, kind=kind)[0]


def subject_of(model, micro, task: TaskName, **settings) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(micro.model)
    objective = objective_of(TaskConfig(name=task, **settings))
    return Subject(model=model, tokenizer=tokenizer, batch_size=4, max_length=LENGTH, objective=objective)


def log_probs(model, tokenizer, prompt: str, answer: str) -> list[float]:
    """Of the tokens of an answer that are not cut."""
    text, first, last = chat(tokenizer, prompt, answer)
    places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    last = min(last + len(TURN_END), places[min(LENGTH, len(places)) - 1][1])
    by_prompt = injected(model).moe.router == "sequence"
    prompt = {"prompt_mask": tensor([[end <= first for _, end in places]])} if by_prompt else {}
    with (
        nullcontext()
        if injected(model).moe.router == "oracle"
        else lmoe.trace(model, attention_mask=tensor([[1] * len(places)]), **prompt)
    ):
        return token_loglikelihoods(model, tokenizer, text, first, last)


def dumb_answers(model, tokenizer, domain: str) -> list[tuple[list[float], ...]]:
    """Of each pair that is kept: the log-probabilities of its tokens, of the chosen answer and the rejected one with
    the adapters off, and then on."""
    found = []
    for row in (*pairs_of(domain, rows=4, first=100), CUT):
        said = [(row["prompt"], row[name]) for name in ("chosen", "rejected")]
        with adapters_off(model):
            off = [log_probs(model, tokenizer, *one) for one in said]
        found.append((*off, *(log_probs(model, tokenizer, *one) for one in said)))
    return found


def halved(value: float, other: float) -> float:
    return 0.5 if value == other else float(value > other)


def test_the_figures_are_those_of_a_loop_over_single_answers(model, micro, pairs):
    subject, beta = subject_of(model, micro, TaskName.dpo, beta=0.3), 0.3
    found = {row.domain: row for row in preference_figures(subject, rows_of(subject, pairs), "dpo")}
    assert list(found) == [*PAIR_DOMAINS, ALL_PAIRS, MEAN]
    every = []
    for domain in PAIR_DOMAINS:
        answers = dumb_answers(model, subject.tokenizer, domain)
        margins = [beta * (sum(c) - sum(oc) - sum(r) + sum(orr)) for oc, orr, c, r in answers]
        row, n = found[domain], len(margins)
        assert row.pairs == n == 5
        mean = sum(margins) / n
        assert row.on_margin == pytest.approx(mean, rel=1e-4)
        spread = math.sqrt(sum((m - mean) ** 2 for m in margins) / (n - 1) / n)
        assert row.on_margin_stderr == pytest.approx(spread, rel=1e-4)
        assert row.on_loss == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / n, rel=1e-4)
        accuracy = sum(m > 0 for m in margins) / n
        assert row.on_accuracy == pytest.approx(accuracy)
        assert row.on_accuracy_stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (n - 1)))
        shorter = sum(halved(-len(oc), -len(orr)) for oc, orr, _, _ in answers) / n
        assert (row.shorter, row.longer) == pytest.approx((shorter, 1 - shorter)) and 0 < shorter < 1
        assert row.base_log_prob == pytest.approx(sum(halved(sum(oc), sum(orr)) for oc, orr, _, _ in answers) / n)
        means = [halved(sum(oc) / len(oc), sum(orr) / len(orr)) for oc, orr, _, _ in answers]
        assert row.base_mean_log_prob == pytest.approx(sum(means) / n)
        every += margins
    assert found[ALL_PAIRS].pairs == len(every) == 10
    assert found[ALL_PAIRS].on_margin == pytest.approx(sum(every) / 10, rel=1e-4)
    by_domain = [found[domain] for domain in PAIR_DOMAINS]
    assert found[MEAN].on_accuracy == pytest.approx(sum(row.on_accuracy for row in by_domain) / 2)
    together = math.hypot(*(row.on_margin_stderr or 0 for row in by_domain)) / 2
    assert found[MEAN].on_margin_stderr == pytest.approx(together)


def test_with_the_adapters_off_dpo_prefers_nothing(model, micro, pairs):
    subject = subject_of(model, micro, TaskName.dpo)
    for row in preference_figures(subject, rows_of(subject, pairs), "dpo"):
        assert (row.off_margin, row.off_accuracy, row.off_margin_stderr) == (0.0, 0.5, 0.0)
        assert row.off_loss == pytest.approx(math.log(2))


@pytest.mark.parametrize("task", [TaskName.simpo, TaskName.orpo])
def test_with_the_adapters_off_an_objective_without_reference_chooses_as_the_base_by_a_mean_token(
    model, micro, pairs, task
):
    subject = subject_of(model, micro, task)
    for row in preference_figures(subject, rows_of(subject, pairs), task):
        assert row.off_accuracy == row.base_mean_log_prob != 0.5
        assert row.on_margin != row.off_margin


@pytest.mark.parametrize("task", [TaskName.dpo, TaskName.simpo])
def test_the_batch_size_changes_nothing(model, micro, pairs, task):
    subject = subject_of(model, micro, task)
    rows = rows_of(subject, pairs)
    four, one = row_figures(subject, rows), row_figures(replace(subject, batch_size=1), rows)
    assert four.keys() == one.keys() and len(rows.rows) == 10
    for name, values in four.items():
        assert values.tolist() == pytest.approx(one[name].tolist(), abs=2e-5), name


def test_single_answers_are_told_apart_by_the_sign_of_their_reward(model, micro, tmp_path):
    rows = [(domain, row) for domain in PAIR_DOMAINS for row in pairs_of(domain, rows=2, first=100)]
    lines = [
        json.dumps({"prompt": row["prompt"], "completion": row[name], "label": name == "chosen", "domain": domain})
        for domain, row in rows
        for name in ("chosen", "rejected")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    subject = replace(subject_of(model, micro, TaskName.kto), batch_size=1)  # so that z is 0
    found = {
        row.domain: row
        for row in preference_figures(subject, rows_of(subject, tmp_path / "rows.jsonl", RowKind.labelled), "kto")
    }
    for domain in PAIR_DOMAINS:
        signs = []
        for _, row in (one for one in rows if one[0] == domain):
            for name, sign in (("chosen", 1), ("rejected", -1)):
                on = sum(log_probs(model, subject.tokenizer, row["prompt"], row[name]))
                with adapters_off(model):
                    off = sum(log_probs(model, subject.tokenizer, row["prompt"], row[name]))
                signs.append(sign * (on - off) > 0)
        assert found[domain].pairs == len(signs) == 4
        assert found[domain].on_accuracy == sum(signs) / 4
        assert (found[domain].off_accuracy, found[domain].off_margin) == (0.5, 0.0)
        assert found[domain].shorter is None and found[domain].base_log_prob_stderr is None
    assert list(found)[2:] == ["(all answers)", MEAN] and found["(all answers)"].pairs == 8


def saved(model, micro, folder: Path, config: dict | None = None) -> str:
    """A run of the model, or an adapter on its own."""
    tokenizer = AutoTokenizer.from_pretrained(micro.model)
    lmoe.save(model, folder / "adapter", tokenizer=tokenizer, base_model=str(micro.model))
    if config is None:
        return str(folder / "adapter")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder)


def data_of(place: Path, **settings) -> dict:
    return {"path": str(place), "val_path": str(place), "max_length": LENGTH, **settings}


def test_a_run_that_learnt_answers_and_then_preferences_is_measured_by_both(by_token, micro, pairs, tmp_path):
    phases = {
        "prefer": {"start": "50%", "task": {"name": "dpo", "beta": 0.3, "reference": "start"}, "data": data_of(pairs)},
        "answers": {"start": "0"},
        "again": {"start": "80%", "task": {"name": "dpo", "beta": 0.3, "reference": "start"}, "data": data_of(pairs)},
    }
    run = saved(by_token, micro, tmp_path, {"data": data_of(micro.val), "phase": {"phases": phases}})
    found = evaluate(EvaluateSettings(checkpoint=run, samples=1, max_new_tokens=2))
    alone = evaluate(EvaluateSettings(checkpoint=run, data=str(micro.val)))
    assert found.losses == alone.losses and [row.domain for row in found.losses[:3]] == list(DOMAINS)
    assert not alone.preferences
    subject = subject_of(by_token, micro, TaskName.dpo, beta=0.3)
    expected = preference_figures(subject, rows_of(subject, pairs), "dpo")
    assert [row.on_margin for row in found.preferences] == pytest.approx([row.on_margin for row in expected], rel=1e-5)
    assert [row.domain for row in found.preferences] == [row.domain for row in expected]
    (note,) = [note for note in found.notes if "task.reference=start" in note]
    assert note.startswith("dpo: ") and "measured against the base" in note
    assert "data: 2 of 14 rows dropped: nothing left after truncation to 48 tokens" in found.notes
    assert found.settings["task"] == "sft, dpo"
    assert [sample.domain for sample in found.samples] == [*DOMAINS, *PAIR_DOMAINS]
    assert not any(sample.rejected for sample in found.samples[:3])
    first = pairs_of("code", rows=1, first=100)[0]
    sample = found.samples[3]
    assert (sample.reference, sample.rejected) == (first["chosen"], first["rejected"])
    assert sample.prompt.endswith("assistant\n") and first["prompt"] in sample.prompt
    logged = metrics(found)
    assert logged["eval/all_pairs/dpo/accuracy_off"] == 0.5
    assert logged["eval/code/dpo/margin"] == found.preferences[0].on_margin
    assert logged["eval/code/loss"] == found.losses[0].on_loss


def test_lessons_of_the_same_objective_are_told_apart_by_their_phases(by_token, micro, pairs, tmp_path):
    phases = {
        "first": {"start": "0", "task": {"name": "dpo"}},
        "second": {"start": "50%", "task": {"name": "dpo", "beta": 1.0}},
    }
    run = saved(by_token, micro, tmp_path, {"data": data_of(pairs), "phase": {"phases": phases}})
    found = evaluate(EvaluateSettings(checkpoint=run, limit=1))
    assert {row.lesson: row.pairs for row in found.preferences if row.domain == ALL_PAIRS} == {
        "dpo first": 2,
        "dpo second": 2,
    }
    one, ten = (row.on_margin for row in found.preferences if row.domain == ALL_PAIRS)
    assert ten == pytest.approx(10 * one, rel=1e-5) and not found.losses


def test_what_rows_are_says_by_which_objective_they_are_measured(by_token, micro, pairs, tmp_path):
    alone = saved(by_token, micro, tmp_path)

    def measured(**settings):
        return evaluate(EvaluateSettings(checkpoint=alone, max_length=LENGTH, **settings))

    found = measured(data=str(pairs))
    assert {row.lesson for row in found.preferences} == {"dpo"} and not found.losses
    as_simpo = measured(data=str(pairs), task=TaskName.simpo)
    assert {row.lesson for row in as_simpo.preferences} == {"simpo"}
    assert as_simpo.preferences[0].on_loss != found.preferences[0].on_loss
    assert measured(data=str(micro.val), limit=1).losses
    with pytest.raises(DataError, match="(?s)task.name=sft does not do .*; `task=dpo` measures which answers of pairs"):
        measured(data=str(pairs), task=TaskName.sft)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b", "label": false}\n')
    with pytest.raises(DataError, match="label is false, .*; `task=kto` measures answers that are good or bad"):
        measured(data=str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError, match="it is no pair of answers"):
        measured(data=str(micro.val), task=TaskName.dpo)
    with pytest.raises(ConfigError, match="`task=dpo`: the rows of the run are none that dpo learns from; name others"):
        measured(task=TaskName.dpo)
    with pytest.raises(ConfigError, match="`task=dpo` says how rows are measured, and `data=none` has none"):
        measured(data="none", choices="bundled", task=TaskName.dpo)


def test_a_row_with_a_conversation_and_a_pair_is_measured_as_what_the_run_has_learnt(by_token, micro, pairs, tmp_path):
    prompt = {"role": "user", "content": "say red"}
    said = {name: [prompt, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps(said | {"messages": said["chosen"]}) + "\n")
    preferring = saved(by_token, micro, tmp_path / "preferring", {"task": {"name": "simpo"}, "data": data_of(pairs)})
    answering = saved(by_token, micro, tmp_path / "answering", {"data": data_of(micro.val)})

    def measured(run, **settings) -> tuple[set[str], bool]:
        found = evaluate(EvaluateSettings(checkpoint=run, data=str(both), **settings))
        return {row.lesson for row in found.preferences}, bool(found.losses)

    assert measured(preferring) == ({"simpo"}, False)
    assert measured(answering) == (set(), True)
    assert measured(answering, task=TaskName.dpo) == ({"dpo"}, False)


def test_other_rows_are_measured_by_the_last_objective_of_the_run_that_learns_from_such(
    by_token, micro, pairs, tmp_path
):
    config = {"task": {"name": "simpo", "gamma": 0.5}, "data": data_of(pairs, judge_path=str(pairs))}
    run = saved(by_token, micro, tmp_path, config)
    own = evaluate(EvaluateSettings(checkpoint=run))
    assert {row.lesson for row in own.preferences} == {"simpo"}
    named = evaluate(EvaluateSettings(checkpoint=run, data=str(pairs)))
    judging = evaluate(EvaluateSettings(checkpoint=run, data="judge"))
    assert named.preferences == own.preferences and sorted(map(repr, judging.preferences)) == sorted(
        map(repr, own.preferences)
    )
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text('no row\n{"prompt": "say red", "good": "red", "rejected": "blue"}\n')
    config["data"] |= {"columns": {"chosen": "good"}, "on_bad_row": "drop"}
    phases = {"phases": {"prefer": {"start": "0", "data": config.pop("data")}}}
    other = saved(by_token, micro, tmp_path / "other", config | {"data": data_of(micro.val), "phase": phases})
    found = evaluate(EvaluateSettings(checkpoint=other, data=str(renamed)))
    assert [(row.lesson, row.pairs) for row in found.preferences] == [("simpo", 1), ("simpo", 1)]
    default = evaluate(EvaluateSettings(checkpoint=run, task=TaskName.dpo))
    assert {row.lesson for row in default.preferences} == {"dpo"}
    subject = subject_of(by_token, micro, TaskName.simpo, gamma=0.5)
    expected = preference_figures(subject, rows_of(subject, pairs), "simpo")
    assert [row.on_loss for row in own.preferences] == pytest.approx([row.on_loss for row in expected], rel=1e-5)


def test_an_oracle_has_the_expert_of_each_pair(micro, pairs):
    model = mixture(micro, "oracle", domains=["words", "math", "code"])
    subject = subject_of(model, micro, TaskName.dpo)
    found = preference_figures(subject, rows_of(subject, pairs), "dpo")
    for row in found[:2]:
        with of_domain(model, row.domain):
            answers = dumb_answers(model, subject.tokenizer, row.domain)
        margins = [0.1 * (sum(c) - sum(oc) - sum(r) + sum(orr)) for oc, orr, c, r in answers]
        assert row.on_margin == pytest.approx(sum(margins) / len(margins), rel=1e-4)


def test_routers_that_were_taught_domains_are_asked_on_pairs_too(micro, pairs, tmp_path):
    taught = mixture(micro, "top_k", router_target="domain", domains=["math", "code", "words"])
    found = evaluate(EvaluateSettings(checkpoint=saved(taught, micro, tmp_path), data=str(pairs), max_length=LENGTH))
    assert found.targets is not None and found.preferences
    rows = {share.row for share in found.target_choices}
    assert rows == set(PAIR_DOMAINS) and not found.losses


def test_every_objective_that_compares_answers_compares_them_from_what_two_models_say(by_token, micro, pairs):
    of_pairs = [task for task, traits in OBJECTIVES.items() if traits.rows is RowKind.pairs]
    assert of_pairs == [TaskName.dpo, TaskName.orpo, TaskName.simpo, TaskName.reward]
    compared = [task for task in of_pairs if isinstance(objective_of(TaskConfig(name=task)), ComparesAnswers)]
    assert compared == of_pairs[:3], "a reward model has no answers of two models to compare"
    for task in compared:
        subject = subject_of(by_token, micro, task)
        objective, rows = subject.objective, rows_of(subject, pairs)
        figures = row_figures(subject, rows)
        for indices, batch in subject.batches(rows.rows):
            with batch_info(injected(by_token), batch, rows.domains):
                losses = objective.losses(by_token, batch)
            assert figures["on_loss"][tensor(indices)].tolist() == pytest.approx(losses.values.tolist(), abs=1e-5)


def test_a_reward_model_is_measured_as_its_run_was(train, pairs):
    rows = (f"data.path={pairs}", f"data.val_path={pairs}", "data.batch_size=2")
    run = train("phase=joint", "task=reward", "trainer.max_steps=2", "optim.lr=0.02", *rows)
    assert run.code == 0, run.err
    found = {row.domain: row for row in evaluate(EvaluateSettings(checkpoint=str(run.run))).preferences}
    with (run.run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
    for domain in PAIR_DOMAINS:
        for figure, name in (("loss", "loss"), ("margin", "reward_margin"), ("accuracy", "reward_accuracy")):
            value = getattr(found[domain], f"on_{figure}")
            assert value == pytest.approx(float(logged[f"val/{domain}/{name}"]), rel=1e-3, abs=1e-6)
        assert found[domain].off_loss != found[domain].on_loss, "the head stays where the adapters are off"


def test_the_figures_are_those_that_the_run_logged(sft_dpo_run):
    found = evaluate(EvaluateSettings(checkpoint=str(sft_dpo_run)))
    with (sft_dpo_run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["val/loss"]][-1]
    by_domain = {row.domain: row for row in found.preferences}
    for domain in PAIR_DOMAINS:
        row = by_domain[domain]
        assert row.on_loss == pytest.approx(float(logged[f"val/{domain}/loss"]), rel=1e-4)
        assert row.on_margin == pytest.approx(float(logged[f"val/{domain}/reward_margin"]), rel=1e-4)
        assert row.on_accuracy == pytest.approx(float(logged[f"val/{domain}/reward_accuracy"]))
        assert row.on_margin != row.off_margin == 0
    assert by_domain[ALL_PAIRS].on_loss == pytest.approx(float(logged["val/loss"]), rel=1e-4)
    assert [row.domain for row in found.losses[:3]] == list(DOMAINS)


def test_tables_of_preferences_keep_to_eighty_columns(by_token, micro, pairs):
    subject = subject_of(by_token, micro, TaskName.simpo)
    rows = preference_figures(subject, rows_of(subject, pairs), "simpo")
    text = StringIO()
    Console(file=text, width=80).print(evaluation_tables(Evaluation(settings={}, preferences=rows)))
    lines = text.getvalue().splitlines()
    assert "Preferences by simpo: accuracy in %" in (line.strip() for line in lines)
    for row in rows:
        assert sum(f"│ {row.domain} " in line for line in lines) == 2
        assert any(f"{row.on_margin:+.3f} ±{row.on_margin_stderr:.3f}" in line for line in lines)
