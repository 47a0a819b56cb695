"""A mixture as one adapter a domain: what the adapters are, what a head chooses, and the price that is stated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe
from lmoe.adapter.place import adapter_folder
from lmoe.errors import CheckpointError
from lmoe.evaluate.subject import Subject
from lmoe.evaluate.training_rows import first_training_rows
from lmoe.evaluate.val_loss import validation_rows
from lmoe.export.per_domain import PRICE_FILE, export_per_domain
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.peft.expert_branches import mean_branches
from lmoe.peft.reader import read_expert
from lmoe.peft.router_head import HEAD_FILE
from tests.micro import DOMAINS
from tests.tiny_models import randomise


@pytest.fixture(scope="module")
def moved(finished_run, tmp_path_factory) -> Path:
    """A run whose experts are far from their start, as after a long training."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("moved") / "run"))
    model, tokenizer = lmoe.load(run)
    base = str(model.name_or_path)
    randomise(model, std=0.2)
    shutil.rmtree(run / "adapter")
    lmoe.save(model, run / "adapter", tokenizer=tokenizer, base_model=base)
    return run


@pytest.fixture(scope="module")
def exported(moved, tmp_path_factory):
    """The folder of adapters with a head, and what was said of them."""
    output = tmp_path_factory.mktemp("out") / "domains"
    return output, export_per_domain(moved, output, head=True)


def nats(model, rows, domain: str) -> float:
    """Mean loss of the label tokens of a domain's rows, row by row."""
    total, count = 0.0, 0
    for row in rows.rows:
        if rows.domains[row.domain] != domain:
            continue
        ids = row.input_ids.long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        wanted = row.is_label[1:]
        total += float(cross_entropy(logits[:-1][wanted], ids[1:][wanted], reduction="sum"))
        count += int(wanted.sum())
    return total / count


def test_the_price_of_each_domain_is_what_transformers_and_peft_measure(moved, exported):
    output, done = exported
    model, tokenizer = lmoe.load(moved)
    rows = validation_rows(None, moved, model, tokenizer)
    assert [price.name for price in done.prices] == list(done.folders) == sorted(DOMAINS)
    for price in done.prices:
        base = AutoModelForCausalLM.from_pretrained(model.name_or_path)
        alone = PeftModel.from_pretrained(base, done.folders[price.name]).eval()
        assert price.adapter == pytest.approx(nats(alone, rows, price.name), abs=1e-4)
        assert price.exact == pytest.approx(nats(model, rows, price.name), abs=1e-4)
        assert abs(price.adapter - price.exact) > 1e-3, "routers that choose for each token are not their mean"
    written = json.loads((output / PRICE_FILE).read_text())
    assert [row["adapter"] for row in written] == [price.adapter for price in done.prices]


def test_an_adapter_is_the_blend_by_the_mean_weights_of_the_domain_s_training_tokens(moved, exported, micro):
    _, done = exported
    model, _ = lmoe.load(moved)
    record = injected(model)
    tokenizer = AutoTokenizer.from_pretrained(adapter_folder(moved))
    subject = Subject(model=model, tokenizer=tokenizer, batch_size=1, max_length=48)
    rows, sums, tokens = first_training_rows(moved, subject, 100), {}, 0
    for _, batch in subject.batches(rows.rows):
        if rows.domains[int(batch["domain_ids"][0, 0])] != DOMAINS[0]:
            continue
        valid = batch["valid_mask"]
        with torch.no_grad(), batch_info(record, batch, rows.domains), record.trace.recording(valid):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        tokens += int(valid.sum())
        for site, routing in record.trace.routing.items():
            weights = routing.routing_weights.double()
            for place in valid[0].nonzero().flatten().tolist():
                sums[site] = sums.get(site, 0) + weights[0, place]
    branches = mean_branches(model, {site: total / tokens for site, total in sums.items()})
    found = read_expert(done.folders[DOMAINS[0]])
    assert len(branches) == len(found.branches)
    for path, branch in branches.items():
        mine = branch.scaling * (branch.lora_B @ branch.lora_A)
        theirs = found.branches[path].scaling * (found.branches[path].lora_B @ found.branches[path].lora_A)
        torch.testing.assert_close(theirs, mine.to(theirs.dtype), rtol=1e-4, atol=1e-5)


def test_a_mixture_whose_weights_are_the_same_at_every_token_costs_nothing(train, tmp_path):
    done = train("moe=uniform", "phase=adapters", run="same")
    assert done.code == 0, done.err
    found = export_per_domain(done.run, tmp_path / "domains")
    assert found.prices and all(price.adapter == pytest.approx(price.exact, abs=1e-5) for price in found.prices)
    assert found.prices[0].routed is None and not (tmp_path / "domains" / HEAD_FILE).exists()


def test_a_blend_with_the_head_gives_each_row_the_adapter_that_the_price_counts(moved, exported):
    output, done = exported
    model, tokenizer = lmoe.load(moved)
    rows = validation_rows(None, moved, model, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    blend = lmoe.Blend(base, done.folders, router="encoder", head=output)
    right: dict[str, list[bool]] = {name: [] for name in done.folders}
    for row in rows.rows:
        prompt = row.input_ids[: int(row.is_label.int().argmax())].long()[None]
        base.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
        (weights,) = blend.weights
        name = rows.domains[row.domain]
        right[name].append(weights[name] == 1.0)
    for price in done.prices:
        assert price.chosen == pytest.approx(sum(right[price.name]) / len(right[price.name]))


def test_a_lower_rank_is_written_and_its_error_said(moved, tmp_path):
    done = export_per_domain(moved, tmp_path / "low", rank=2, data="none")
    assert done.prices == [] and all(0 < error < 1 for error in done.errors.values())
    config = json.loads((done.folders[DOMAINS[0]] / "adapter_config.json").read_text())
    assert config["r"] == 2


def test_what_this_is_not_for_is_refused_and_nothing_is_left(train, micro, tmp_path):
    done = train("moe=sequence", "moe.router_scope=model", "phase=joint", run="whole")
    assert done.code == 0, done.err
    with pytest.raises(CheckpointError, match="exported exactly"):
        export_per_domain(done.run, tmp_path / "out")
    rows = [f"data.path={micro.train / 'code.jsonl'}", f"data.val_path={micro.val / 'code.jsonl'}"]
    one = train("phase=joint", *rows, run="one")
    assert one.code == 0, one.err
    with pytest.raises(CheckpointError, match="the training rows are all of the domain"):
        export_per_domain(one.run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_taught_clusters_gets_an_adapter_for_each_of_them(train, tmp_path):
    clusters = ("moe.router_target=cluster", "data.clusters=3", "injection.num_experts=3")
    done = train("phase=joint", *clusters, run="clusters")
    assert done.code == 0, done.err
    found = export_per_domain(done.run, tmp_path / "out", head=True)
    assert list(found.folders) == ["cluster0", "cluster1", "cluster2"]
    assert sum(price.rows for price in found.prices) == 9, "the validation rows, each in its nearest cluster"
    assert all(price.routed is not None for price in found.prices)
