"""A mixture as one adapter a domain: what the adapters are, what a head chooses, and the price that is stated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lmoe
from lmoe.adapter.place import adapter_folder
from lmoe.cli.main import app
from lmoe.data.domains import dealt_anew
from lmoe.errors import CheckpointError, ConfigError, DataError
from lmoe.evaluate.subject import Subject
from lmoe.evaluate.training_rows import first_training_rows, learnt_answers
from lmoe.evaluate.val_loss import validation_rows
from lmoe.export.per_domain import PRICE_FILE, adapter_names, export_per_domain
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.peft.expert_branches import mean_branches
from lmoe.peft.reader import read_expert
from lmoe.peft.router_head import HEAD_FILE
from lmoe.rules.experts_from import NAME
from lmoe.vocabulary import TrainOn
from tests.full_disk import files_of_at_most
from tests.micro import DOMAINS, WORDS
from tests.pair_rows import write_pairs
from tests.tiny_models import randomise, tiny_model, tokens


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


def with_config(run: Path, place: Path, **changes) -> Path:
    """A copy of a run whose config.yaml says something else of its data, or of what it has learnt."""
    copy = Path(shutil.copytree(run, place))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    data = config["data"] | changes.pop("data", {})
    (copy / "config.yaml").write_text(yaml.safe_dump(config | changes | {"data": data}))
    return copy


def write_rows(file: Path, domains: tuple[str, ...], count: int = 2) -> str:
    rows = [
        {"domain": name, "prompt": f"{WORDS[place]} {number}", "response": WORDS[number]}
        for place, name in enumerate(domains)
        for number in range(count)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


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
    assert blend.train_on is TrainOn.assistant
    right: dict[str, list[bool]] = {name: [] for name in done.folders}
    for row in rows.rows:
        prompt = row.input_ids[: int(row.is_label.int().argmax())].long()[None]
        base.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
        (weights,) = blend.weights
        name = rows.domains[row.domain]
        right[name].append(weights[name] == 1.0)
    for price in done.prices:
        assert price.chosen == pytest.approx(sum(right[price.name]) / len(right[price.name]))


def test_the_head_reads_the_prompts_of_conversations_as_the_rows_of_its_run_have_them(moved, tmp_path):
    run = with_config(moved, tmp_path / "run", data={"train_on": "last"})
    done = export_per_domain(run, tmp_path / "domains", head=True, data="none")
    base = AutoModelForCausalLM.from_pretrained(lmoe.load(run)[0].name_or_path)
    assert lmoe.Blend(base, done.folders, router="encoder", head=tmp_path / "domains").train_on is TrainOn.last


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


def test_a_run_that_was_taught_clusters_gets_an_adapter_for_each_of_them(train, tmp_path, monkeypatch):
    clusters = ("moe.router_target=cluster", "data.clusters=3", "injection.num_experts=3")
    done = train("phase=joint", *clusters, run="clusters")
    assert done.code == 0, done.err
    found = export_per_domain(done.run, tmp_path / "out", head=True)
    assert list(found.folders) == ["cluster0", "cluster1", "cluster2"]
    assert sum(price.rows for price in found.prices) == 9, "the validation rows, each in its nearest cluster"
    assert all(price.routed is not None for price in found.prices)
    monkeypatch.setattr("lmoe.export.per_domain.TRAINING_ROWS", 1)
    fewest = export_per_domain(done.run, tmp_path / "fewest", data="none")
    assert list(fewest.folders) == list(found.folders), "rows of each cluster, however rare it is in its domains"
    alone = shutil.copytree(done.run / "adapter", tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"clusters\.safetensors of its run is not beside the adapter"):
        export_per_domain(alone, tmp_path / "none", data="none")


@pytest.mark.parametrize(
    ("domains", "names"),
    [
        (("code", "größe", "x."), ("code", "domain1", "x.")),
        (("Code", "code"), ("Code", "domain1")),
        (("a b", "a_b", "domain0"), ("domain0_1", "a_b", "domain0")),
        (("Domain0", "a b", 'a"b'), ("Domain0", "domain1", "domain2")),
        ((".", "..", "../x"), ("domain0", "domain1", "domain2")),
        (("Price.json", "router_head.safetensors", "x"), ("domain0", "domain1", "x")),
    ],
)
def test_every_adapter_has_a_name_that_no_other_adapter_and_no_file_has_even_but_for_case(domains, names):
    assert adapter_names(domains) == names
    assert all(NAME.fullmatch(name) for name in names)


def test_what_an_odd_domain_costs_is_said_by_the_name_of_the_domain(moved, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ('größe "q"', "price.json", "words"))
    run = with_config(moved, tmp_path / "run", data={"path": rows, "val_path": rows})
    done = CliRunner().invoke(
        app, ["export", "--checkpoint", str(run), "--format", "prompt-router", "--output", str(tmp_path / "o")]
    )
    assert done.exit_code == 0, done.output
    said = done.output
    assert f'PEFT adapter of größe "q" in {tmp_path / "o" / "domain0"}' in said
    for price in json.loads((tmp_path / "o" / PRICE_FILE).read_text()):
        assert any(line.startswith(price["domain"]) and f"{price['adapter']:.4f}" in line for line in said.splitlines())
    base = AutoModelForCausalLM.from_pretrained(lmoe.load(run)[0].name_or_path)
    places = {name: tmp_path / "o" / name for name in ("domain0", "domain1", "words")}
    lmoe.Blend(base, places, router="encoder", head=tmp_path / "o")


@pytest.mark.parametrize("rank", [0, -1, True, 1.5])
def test_a_rank_that_cannot_be_and_a_folder_in_use_are_refused_before_anything_is_loaded(
    moved, tmp_path, monkeypatch, rank
):
    monkeypatch.setattr("lmoe.export.per_domain.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="must be a whole number from 1 on"):
        export_per_domain(moved, tmp_path / "out", rank=rank)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        export_per_domain(moved, tmp_path)


def test_a_rank_above_what_there_is_cuts_nothing(moved, tmp_path):
    done = export_per_domain(moved, tmp_path / "high", rank=1000, data="none")
    assert all(error == pytest.approx(0, abs=1e-12) for error in done.errors.values())


def test_rows_without_an_adapter_are_named_and_refused_where_there_are_no_others(moved, tmp_path):
    said: list[str] = []
    some = write_rows(tmp_path / "some.jsonl", ("code", "law"))
    (price,) = export_per_domain(moved, tmp_path / "some", data=some, say=said.append).prices
    assert price.domain == "code" and price.rows == 2
    assert "not measured: 2 rows of law, which no adapter is of" in said
    assert "no price of math, words: there is no row to measure it on" in said
    other = write_rows(tmp_path / "other.jsonl", ("law",))
    with pytest.raises(DataError, match="are of law, and the adapters of code, math, words: give `data` rows"):
        export_per_domain(moved, tmp_path / "out", data=other)
    assert not (tmp_path / "out").exists()


def test_training_rows_that_are_gone_are_named_with_what_they_are_for(moved, tmp_path):
    run = with_config(moved, tmp_path / "run", data={"path": str(tmp_path / "gone.jsonl")})
    with pytest.raises(DataError, match=r"which tell the mean weights, cannot be read: data\.path=.*gone\.jsonl"):
        export_per_domain(run, tmp_path / "out", data="none")
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_its_own_says_whose_rows_its_weights_are_of(moved, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lmoe.export.per_domain.learnt_answers", lambda _, subject: learnt_answers(moved, subject))
    alone = shutil.copytree(moved / "adapter", tmp_path / "alone")
    export_per_domain(alone, tmp_path / "out", data="none", say=said.append)
    assert said[0].startswith("an adapter on its own") and "bundled rows" in said[0]


def test_of_a_run_that_learnt_from_pairs_the_chosen_answers_tell_weights_and_price(moved, tmp_path):
    for part, first in (("train", 0), ("val", 100)):
        write_pairs(tmp_path / part, rows=3, first=first)
    rows = {"path": str(tmp_path / "train"), "val_path": str(tmp_path / "val")}
    run = with_config(moved, tmp_path / "run", data=rows, task={"name": "dpo"})
    done = export_per_domain(run, tmp_path / "out", head=True)
    assert [(price.domain, price.rows) for price in done.prices] == [("code", 3), ("math", 3)]


def test_only_domains_that_the_run_has_learnt_get_an_adapter(moved, tmp_path):
    run = with_config(moved, tmp_path / "run", data={"domains": ["code", "words"]})
    done = export_per_domain(run, tmp_path / "out")
    assert list(done.folders) == [price.domain for price in done.prices] == ["code", "words"]


def test_domains_that_were_dealt_anew_are_those_of_training_and_of_measuring(moved, tmp_path):
    run = with_config(moved, tmp_path / "run", data={"permute_domains": True})
    model, tokenizer = lmoe.load(run)
    subject = Subject(model=model, tokenizer=tokenizer, batch_size=1, max_length=48)
    found, own = (learnt_answers(place, subject) for place in (run, moved))
    assert torch.equal(found.rows.domains, dealt_anew(own.rows).domains)
    assert not torch.equal(found.rows.domains, own.rows.domains)


def test_a_disk_that_fills_up_leaves_nothing_and_is_said_of_the_folder_that_was_asked_for(moved, tmp_path):
    with files_of_at_most(4_000), pytest.raises(CheckpointError) as caught:
        export_per_domain(moved, tmp_path / "out", data="none", head=True)
    assert str(caught.value) == f"{tmp_path / 'out'} cannot be written: File too large; nothing is left of it"
    assert not any(tmp_path.iterdir())


NO_BALANCE = {"load_balance": {"type": "none"}}
MIXTURES = {
    "top_k": ({}, {}),
    "weights as the router gives them": ({}, {"scale": "raw"}),
    "weights of length one": ({}, {"scale": "unit"}),
    "temperature": ({}, {"temperature": 0.3}),
    "top_p": ({}, {"router": "top_p"}),
    "relu": ({}, {"router": "relu"} | NO_BALANCE),
    "sigmoid": ({}, {"router": "sigmoid"}),
    "soft": ({}, {"router": "soft"}),
    "noisy_top_k": ({}, {"router": "noisy_top_k"}),
    "one router a block": ({}, {"router_scope": "block"}),
    "other numbers of experts by layer": ({"num_experts": 4, "num_experts_by_layer": [2, 4]}, {}),
    "other ranks by layer": ({"lora_r_by_layer": [2, 4], "use_rslora": True}, {}),
    "a start that is taken off": ({"init_lora": "svd"}, {}),
    "one A for all experts": ({"shared_lora_A": True}, {}),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_the_weights_that_are_recorded_are_those_by_which_the_branches_act(case):
    """Of one token the mean blend is the mixture, whatever the router, the scale and the experts."""
    model = tiny_model("llama")
    injection, moe = MIXTURES[case]
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3, "shared_lora_r": 2} | injection, moe)
    randomise(model)
    record, ids = injected(model), tokens(1, 5)[:, :1]
    with torch.no_grad(), record.trace.recording(torch.ones_like(ids, dtype=torch.bool)):
        expected = model(input_ids=ids).logits
    weights = {site: routing.routing_weights.reshape(-1) for site, routing in record.trace.routing.items()}
    assert weights
    branches = mean_branches(model, weights)
    bare = tiny_model("llama")
    for path, branch in branches.items():
        bare.get_submodule(path).weight.data += branch.scaling * branch.lora_B @ branch.lora_A
    with torch.no_grad():
        found = bare(input_ids=ids).logits
        plain = tiny_model("llama")(input_ids=ids).logits
    assert (plain - expected).abs().max() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
