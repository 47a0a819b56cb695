"""Losses of each domain: those of a loop over single rows, whatever the batch, with the adapters on and off."""

import csv
import json
import math
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe
from lmoe.config.evaluate import EvaluateSettings
from lmoe.errors import CheckpointError, ConfigError, DataError
from lmoe.evaluate.evaluate import evaluate
from lmoe.evaluate.losses import ALL_TOKENS, MEAN, domain_losses, perplexity
from lmoe.evaluate.rows import evaluation_rows, row_notes
from lmoe.evaluate.subject import Subject, longest
from lmoe.evaluate.val_loss import validation_rows
from lmoe.injection.record import injected
from lmoe.injection.tracing import domain
from lmoe.pretrain.bpe import TURN_END
from tests.evaluate.dumb_likelihood import chat, token_loglikelihoods
from tests.micro import DOMAINS
from tests.tiny_models import randomise


@pytest.fixture(scope="module")
def subject(finished_run) -> Subject:
    model, tokenizer = lmoe.load(finished_run)
    return Subject(model=model, tokenizer=tokenizer, batch_size=4, max_length=48)


@pytest.fixture(scope="module")
def data(subject, finished_run):
    settings = EvaluateSettings(checkpoint=str(finished_run))
    moe = injected(subject.model).moe
    return evaluation_rows(settings, finished_run, subject.tokenizer, moe, max_length=48)[0]


@pytest.fixture(scope="module")
def losses(subject, data):
    return {row.domain: row for row in domain_losses(subject, data)}


def dumb_losses(model, tokenizer, folder) -> dict[str, tuple[float, int]]:
    """Domain -> sum of the losses of the answers and their turn ends, and number of tokens."""
    found = {}
    for name in DOMAINS:
        tokens = []
        for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines():
            question, answer = (turn["content"] for turn in json.loads(line)["messages"])
            text, first, last = chat(tokenizer, question, answer)
            tokens += token_loglikelihoods(
                model, tokenizer, text, first, last + len(TURN_END), add_special_tokens=False
            )
        found[name] = (-sum(tokens), len(tokens))
    return found


def test_the_losses_are_those_of_a_loop_over_single_rows(subject, losses, micro):
    dumb = dumb_losses(subject.model, subject.tokenizer, micro.val)
    for name, (total, count) in dumb.items():
        assert losses[name].label_tokens == count
        assert losses[name].on_loss == pytest.approx(total / count, rel=1e-5)
    everything = sum(total for total, _ in dumb.values()) / sum(count for _, count in dumb.values())
    assert losses[ALL_TOKENS].on_loss == pytest.approx(everything, rel=1e-5)
    mean = sum(total / count for total, count in dumb.values()) / len(dumb)
    assert losses[MEAN].on_loss == pytest.approx(mean, rel=1e-5)


def test_the_adapters_off_give_the_losses_of_the_bare_backbone(subject, losses, micro):
    bare = AutoModelForCausalLM.from_pretrained(micro.model)
    for name, (total, count) in dumb_losses(bare, subject.tokenizer, micro.val).items():
        assert losses[name].off_loss == pytest.approx(total / count, rel=1e-5)
        assert abs(losses[name].off_loss - losses[name].on_loss) > 1e-4


def test_the_losses_are_those_that_the_run_logged(losses, finished_run):
    with (finished_run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    for name in DOMAINS:
        assert losses[name].off_loss == pytest.approx(float(rows[0][f"val/{name}/loss"]), rel=1e-5)
        assert losses[name].on_loss == pytest.approx(float(rows[-1][f"val/{name}/loss"]), rel=1e-5)
    assert losses[ALL_TOKENS].on_loss == pytest.approx(float(rows[-1]["val/loss"]), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_nothing(subject, data, losses, batch_size):
    for row in domain_losses(replace(subject, batch_size=batch_size), data):
        assert row.on_loss == pytest.approx(losses[row.domain].on_loss, rel=1e-5)


def test_perplexity_is_the_exponential_of_the_loss(losses):
    for row in losses.values():
        assert row.on_perplexity == math.exp(row.on_loss)
        assert row.off_perplexity == math.exp(row.off_loss)
    assert perplexity(1e4) == math.inf


def test_an_oracle_goes_by_the_domain_of_each_row_whatever_the_order_of_its_experts(micro, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    names = list(DOMAINS[::-1])
    lmoe.inject(model, {"num_experts": 3, "lora_r": 4}, {"router": "oracle", "domains": names})
    randomise(model, std=0.2)
    tokenizer = AutoTokenizer.from_pretrained(micro.model)
    lmoe.save(model, tmp_path / "oracle", tokenizer=tokenizer, base_model=str(micro.model))
    found = evaluate(EvaluateSettings(checkpoint=str(tmp_path / "oracle"), data=str(micro.val), max_length=48))
    for row in found.losses[:3]:
        with domain(model, row.domain):
            total, count = dumb_losses(model, tokenizer, micro.val)[row.domain]
        assert row.on_loss == pytest.approx(total / count, rel=1e-5)
    (tmp_path / "law.jsonl").write_text('{"prompt": "a", "response": "b", "domain": "law"}\n')
    with pytest.raises(DataError, match="no expert for the domain 'law' of these rows; it has"):
        evaluate(EvaluateSettings(checkpoint=str(tmp_path / "oracle"), data=str(tmp_path / "law.jsonl")))
    with pytest.raises(ConfigError, match="questions of `choices` and `tasks` have none; name one"):
        evaluate(EvaluateSettings(checkpoint=str(tmp_path / "oracle"), choices="bundled"))


def test_a_run_that_split_its_rows_is_measured_on_the_share_it_kept(micro, own_run, subject):
    config = (own_run / "config.yaml").read_text("utf-8")
    assert f"val_path: {micro.val}" in config
    (own_run / "config.yaml").write_text(config.replace(f"val_path: {micro.val}", "val_path: null"))
    parts = micro.parts("data.val_path=null")
    moe = injected(subject.model).moe
    found, _ = evaluation_rows(
        EvaluateSettings(checkpoint=str(own_run)), own_run, subject.tokenizer, moe, max_length=48
    )
    assert [row.input_ids.tolist() for row in found.rows] == [row.input_ids.tolist() for row in parts.prepared.val]
    assert found.rows.domains.tolist() == parts.prepared.val.domains.tolist()


@pytest.mark.parametrize("val", ["val_path", "held out"])
def test_a_run_on_some_domains_is_measured_on_its_own_rows_of_them_and_on_all_other_rows(micro, own_run, subject, val):
    file, here = own_run / "config.yaml", f"val_path: {micro.val}"
    text = file.read_text("utf-8")
    assert here in text and "domains: null" in text
    wanted = ["data.domains=[code,math]", *(["data.val_path=null"] if val == "held out" else [])]
    text = text.replace(here, "val_path: null") if val == "held out" else text
    before, _, behind = text.partition("\ndata:")
    file.write_text(f"{before}\ndata:{behind.replace('domains: null', 'domains: [code, math]', 1)}")
    moe = injected(subject.model).moe

    def rows(**settings):
        settings = EvaluateSettings(checkpoint=str(own_run), **settings)
        return evaluation_rows(settings, own_run, subject.tokenizer, moe, max_length=48)[0]

    found, expected = rows(), micro.parts(*wanted).prepared.val
    assert [row.input_ids.tolist() for row in found.rows] == [row.input_ids.tolist() for row in expected]
    assert found.domains == ["code", "math"] and found.rows.domains.tolist() == expected.domains.tolist()
    assert rows(data=str(micro.val)).domains == sorted(DOMAINS) != found.domains
    own = validation_rows(None, own_run, subject.model, subject.tokenizer)
    assert own.rows.digests.equal(found.rows.digests) and own.domains == found.domains
    assert validation_rows(str(micro.val), own_run, subject.model, subject.tokenizer).domains == sorted(DOMAINS)


def test_a_run_with_a_prefix_is_measured_with_it_on_whatever_rows(micro, own_run, subject):
    file = own_run / "config.yaml"
    text = file.read_text("utf-8")
    assert text.count("prompt_prefix: null") == 1
    file.write_text(text.replace("prompt_prefix: null", "prompt_prefix: '[{domain}] '"))
    expected = micro.parts("data.prompt_prefix='[{domain}] '").prepared.val.digests
    moe = injected(subject.model).moe
    for path in (None, str(micro.val)):
        settings = EvaluateSettings(checkpoint=str(own_run), data=path)
        found, _ = evaluation_rows(settings, own_run, subject.tokenizer, moe, max_length=48)
        assert found.rows.digests.equal(expected)
        assert validation_rows(path, own_run, subject.model, subject.tokenizer).rows.digests.equal(expected)
    assert not micro.parts().prepared.val.digests.equal(expected)


def test_other_rows_are_read_as_the_run_reads_its_own_by_an_export_too(own_run, subject, tmp_path):
    file, rows = own_run / "config.yaml", tmp_path / "rows.jsonl"
    text = file.read_text("utf-8")
    changed = {
        "columns: {}": "columns: {prompt: question, response: reply}",
        "max_length: 48": "max_length: 20",
        "train_on: assistant": "train_on: all",
        "on_bad_row: error": "on_bad_row: drop",
    }
    for old, new in changed.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)
    records = [{"question": "say red", "reply": "red " * 30}, {"question": "say blue"}]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = validation_rows(str(rows), own_run, subject.model, subject.tokenizer).rows
    assert found.lengths.tolist() == [20] and found.label_counts.tolist() == [19]
    settings = EvaluateSettings(checkpoint=str(own_run), data=str(rows))
    moe = injected(subject.model).moe
    expected, _ = evaluation_rows(settings, own_run, subject.tokenizer, moe, max_length=20)
    assert found.digests.equal(expected.rows.digests) and found.label_counts.equal(expected.rows.label_counts)


def test_a_run_on_false_domains_is_measured_on_those_that_it_had_whatever_the_limit(micro, own_run, subject):
    file, few = own_run / "config.yaml", "data.val_rows_per_domain=3"
    text = file.read_text("utf-8")
    for old, new in (("permute_domains: false", "permute_domains: true"), ("per_domain: 0", "per_domain: 3")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    file.write_text(text)
    moe = injected(subject.model).moe

    def rows(**settings):
        settings = EvaluateSettings(checkpoint=str(own_run), **settings)
        return evaluation_rows(settings, own_run, subject.tokenizer, moe, max_length=48)[0]

    def pairs(rows):
        return [*zip(rows.digests.tolist(), rows.domains.tolist(), strict=True)]

    found, true = micro.parts(few, "data.permute_domains=true").prepared.val, micro.parts(few).prepared.val
    assert pairs(rows().rows) == pairs(found) != pairs(true)
    assert {*pairs(rows(limit=1).rows)} < {*pairs(found)} and rows(limit=1).rows.domains.bincount().tolist() == [1] * 3
    assert pairs(rows(data=str(micro.val), limit=3).rows) == pairs(true)
    file.write_text(text.replace("judge_path: null", f"judge_path: {micro.val}"))
    assert {*pairs(rows(data="judge", limit=1).rows)} < {*pairs(rows(data="judge").rows)}
    assert any("permute_domains" in note for note in row_notes(rows(), 48))
    assert not row_notes(rows(data=str(micro.val)), 48)


def test_a_run_whose_rows_are_gone_says_how_to_name_others(own_run, micro):
    config = (own_run / "config.yaml").read_text("utf-8")
    (own_run / "config.yaml").write_text(config.replace(str(micro.val), "/gone/val"))
    with pytest.raises(
        DataError, match="cannot be used, name others with `data`: data.val_path=/gone/val: no such file"
    ):
        evaluate(EvaluateSettings(checkpoint=str(own_run)))
    (own_run / "config.yaml").write_text("data: {path: '${oc.env:HOME}'}\n")
    with pytest.raises(
        CheckpointError, match="config.yaml: data.path is .*an interpolation; .*move adapter/ out of the run"
    ):
        evaluate(EvaluateSettings(checkpoint=str(own_run)))


def test_the_longest_row_stays_within_the_context(subject):
    assert longest(None, 1000, subject.model) == 128
    assert longest(None, 64, subject.model) == 64
    with pytest.raises(ConfigError, match="`max_length=129` is beyond the backbone's context of 128 tokens"):
        longest(129, 64, subject.model)
