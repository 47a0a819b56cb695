"""Experts leave a mixture as adapters, as one merged model, or one of them leaves it; the logits prove it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.adapter.folder import WEIGHTS_FILE
from lmoe.errors import CheckpointError, LmoeError
from lmoe.export.export import export_merged, export_peft, export_peft_experts, export_without_expert
from lmoe.generate import speaker
from lmoe.generate.generate import Sampling
from lmoe.generate.speaker import stored_template
from lmoe.peft.experts import save_peft_experts
from lmoe.serve.prompts import Prompts
from lmoe.vocabulary import BackbonePrecision, TrainOn
from tests.full_disk import files_of_at_most
from tests.micro import write_rows
from tests.tiny_models import randomise, tiny_model, tokens

ORACLE = {"router": "oracle", "domains": ["a", "b", "c"]}
EXPERTS = {
    "plain": ("qwen3", {}),
    "rsLoRA, ranks by layer, and another rank on attention": (
        "qwen3",
        {"use_rslora": True, "lora_r": 16, "lora_r_by_layer": [2, 4], "attn_lora": {"lora_r": 3, "lora_alpha": 5.0}},
    ),
    "a shared expert": ("qwen3", {"shared_lora_r": 3}),
    "a shared lora_A": ("qwen3", {"shared_lora_A": True}),
    "a start that is taken off": ("qwen3", {"init_lora": "svd"}),
    "Conv1D": ("gpt2", {}),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_each_expert_is_a_peft_adapter_with_the_logits_of_the_mixture_that_it_decides_alone(case, tmp_path):
    family, injection = EXPERTS[case]
    model, ids = tiny_model(family), tokens()
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3} | injection, ORACLE)
    randomise(model, std=0.2)
    folders = save_peft_experts(model, tmp_path, base_model=family)
    assert list(folders) == ["expert0", "expert1", "expert2"]
    for name, domain in zip(folders, "abc", strict=True):
        with torch.no_grad():
            with lmoe.trace(model, attention_mask=torch.ones_like(ids), domains=[domain] * 2):
                expected = model(ids).logits
            found = PeftModel.from_pretrained(tiny_model(family), folders[name]).eval()(ids).logits
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


def test_exported_experts_come_back_as_a_mixture_with_the_same_experts(tmp_path):
    model = tiny_model()
    injection = {"lora_r": 4, "num_experts": 2, "attn_lora": {"enabled": False}}
    lmoe.inject(model, injection)
    randomise(model)
    folders = save_peft_experts(model, tmp_path, base_model="x")
    again = tiny_model()
    lmoe.inject(again, injection)
    lmoe.import_experts(again, folders)
    before, after = dict(model.named_parameters()), dict(again.named_parameters())
    factors = [name for name in before if name.endswith(("lora_A", "lora_B"))]
    assert len(factors) == 12 and all(torch.equal(before[name], after[name]) for name in factors)


@pytest.mark.parametrize("train_on", TrainOn)
def test_a_blend_decides_by_the_turns_of_a_conversation_that_its_run_decided_by(trained, train_on, tmp_path):
    """With train_on=last or all the earlier answers are a part of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    injection = {"lora_r": 4, "num_experts": 3, "top_k": 2, "attn_lora": {"enabled": False}}
    lmoe.inject(model, injection, {"router": "sequence", "router_scope": "model", "decide": "turn"})
    randomise(model, std=0.3)
    run, experts = tmp_path / "run", tmp_path / "experts"
    lmoe.save(model, run / "adapter", tokenizer=trained.tokenizer)
    (run / "config.yaml").write_text(f"seed: 0\ndata: {{train_on: {train_on}}}\n")
    folders = {name: str(folder) for name, folder in export_peft_experts(run, experts).items()}
    blend = speaker.blended(
        str(trained.base), folders, None, router="encoder", precision=BackbonePrecision.float32, head=str(experts)
    )
    of_run = speaker.trained(str(run), base_model=None, domain=None)
    assert blend.train_on is Prompts.of(blend).train_on is of_run.train_on is train_on
    turns = [
        {"role": "user", "content": "say hello"},
        {"role": "assistant", "content": "hello to you and all"},
        {"role": "user", "content": "a = b"},
    ]
    said = [logits_of(one, turns) for one in (of_run, blend)]
    torch.testing.assert_close(said[1], said[0], atol=1e-4, rtol=1e-4)
    blend.train_on = TrainOn.last if train_on is TrainOn.assistant else TrainOn.assistant
    assert not torch.allclose(logits_of(blend, turns), said[0], atol=1e-2)


def logits_of(one: speaker.Speaker, turns: list[dict[str, str]]) -> torch.Tensor:
    """(V,) of the second token of an answer."""
    logits = []
    hook = one.model.register_forward_hook(lambda _module, _args, output: logits.append(output.logits[0, -1]))
    one.answer(turns, Sampling(max_new_tokens=2), lambda piece: None)
    hook.remove()
    return logits[-1]


def test_an_expert_taken_out_leaves_bit_by_bit_what_the_mask_computes(trained, tmp_path):
    """Expert 1 of 0, 1, 2; then the names close up."""
    folder = export_without_expert(trained.run, tmp_path / "less", "1")
    raw = json.loads((folder / "lmoe_config.json").read_text())
    assert raw["injection"]["num_experts"] == 2
    model, tokenizer = lmoe.load(folder)
    assert tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    whole = trained.model.eval()
    with torch.no_grad(), lmoe.masked_experts(whole, [1]):
        assert torch.equal(model(tokens()).logits, whole(tokens()).logits)
    with pytest.raises(CheckpointError, match="has 2 experts, and its router needs 2: none can be taken out"):
        export_without_expert(folder, tmp_path / "none", "0")
    with pytest.raises(CheckpointError, match="has no expert '3'; it has 0 to 2"):
        export_without_expert(trained.run, tmp_path / "none", "3")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("domains", "expert", "left"), [("abc", "1", "ac"), ("ab", "0", None), ("ab", "1", None), ("ab", "2", "ab")]
)
def test_an_expert_taken_out_leaves_the_others_to_their_targets(trained, tmp_path, domains, expert, left):
    """Of two targets the first has experts 0 and 2: without 0 or 1, expert 2 would be of the second."""
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    taught = OF_MODEL | {"router_target": "domain", "domains": list(domains)}
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3, "top_k": 1}, taught)
    old = lmoe.save(model, tmp_path / "old", tokenizer=trained.tokenizer)
    if left is None:
        with pytest.raises(
            CheckpointError, match=r"3 experts for the 2 targets .* The last one \(2\) can be taken out"
        ):
            export_without_expert(old, tmp_path / "less", expert)
        assert not (tmp_path / "less").exists()
        return
    raw = json.loads((export_without_expert(old, tmp_path / "less", expert) / "lmoe_config.json").read_text())
    assert (raw["injection"]["num_experts"], raw["moe"]["domains"]) == (2, list(left))


def test_growing_and_taking_the_new_expert_out_again_gives_the_old_weights_byte_by_byte(trained, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 4})
    lmoe.import_experts(model, trained.run)
    lmoe.save(model, tmp_path / "grown", tokenizer=trained.tokenizer)
    folder = export_without_expert(tmp_path / "grown", tmp_path / "back", "3")
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in trained.adapter.iterdir())
    for name in (WEIGHTS_FILE, "lmoe_config.json"):
        assert (folder / name).read_bytes() == (trained.adapter / name).read_bytes()


OF_MODEL = {"router": "sequence", "router_scope": "model", "prompt_experts": True}


def test_a_router_of_the_whole_model_grows_loses_an_expert_and_comes_back_byte_by_byte(trained, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3}, OF_MODEL)
    randomise(model, std=0.5)
    old = lmoe.save(model, tmp_path / "old", tokenizer=trained.tokenizer)
    grown = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(grown, {"lora_r": 4, "num_experts": 4}, OF_MODEL)
    lmoe.import_experts(grown, old)
    assert torch.equal(grown.router.weight[:3], model.router.weight)
    assert (grown.router.weight[3] - model.router.weight.mean(0)).abs().max() < 0.05
    ids = tokens()
    with torch.no_grad(), lmoe.masked_experts(grown, [3]):
        assert torch.equal(grown(ids).logits, model(ids).logits)
    lmoe.save(grown, tmp_path / "grown", tokenizer=trained.tokenizer)
    back = export_without_expert(tmp_path / "grown", tmp_path / "back", "3")
    for name in (WEIGHTS_FILE, "lmoe_config.json"):
        assert (back / name).read_bytes() == (old / name).read_bytes()
    other = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(other, {"lora_r": 4, "num_experts": 4}, OF_MODEL | {"router_layer": 1})
    with pytest.raises(CheckpointError, match="other settings; set moe.router_layer=-1"):
        lmoe.import_experts(other, old)
    kept = json.loads((lmoe.save(other, tmp_path / "other") / "lmoe_config.json").read_text())
    assert kept["moe"]["router_layer"] == 1, "a number, as it was before shares"


def dense(trained, injection: dict, folder: Path):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"strategy": "dense_lora", "lora_r": 4} | injection)
    randomise(model, std=0.2)
    lmoe.save(model, folder, tokenizer=trained.tokenizer)
    return model.eval()


@pytest.mark.parametrize(
    "injection", [{}, {"target_keywords": [], "attn_lora": {"use_dora": True}}], ids=["LoRA", "DoRA"]
)
def test_dense_lora_merges_into_a_model_of_hugging_face_with_the_same_logits(trained, injection, tmp_path):
    model = dense(trained, injection, tmp_path / "adapter")
    merged = export_merged(tmp_path / "adapter", tmp_path / "merged")
    assert merged.loss_before is None
    found = AutoModelForCausalLM.from_pretrained(merged.folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(tokens()).logits, model(tokens()).logits, atol=5e-5, rtol=1e-5)


def test_a_disk_that_fills_up_leaves_nothing_of_a_merged_model_or_an_adapter(trained, tmp_path):
    dense(trained, {}, tmp_path / "adapter")
    for export, size in ((export_merged, 40_000), (export_peft, 4_000)):
        with files_of_at_most(size), pytest.raises(CheckpointError, match=r"cannot be written: .*"):
            export(tmp_path / "adapter", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_mixture_is_not_merged_and_the_alternatives_are_named(trained, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"(?s)chooses experts for each token.*`export_peft_experts`.*`average=True`"
    ):
        export_merged(trained.run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_average_is_merged_when_asked_and_its_cost_is_measured(trained, tmp_path):
    """Under a router that weighs every expert alike the average of the experts is the mixture."""
    write_rows(tmp_path / "rows", rows=2, first=0)
    other = export_merged(trained.run, tmp_path / "other", average=True, data=str(tmp_path / "rows"))
    assert other.loss_before != pytest.approx(other.loss_after, abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 3, "shared_lora_r": 2}, {"router": "uniform"})
    randomise(model, std=0.2)
    lmoe.save(model, tmp_path / "uniform", tokenizer=trained.tokenizer)
    same = export_merged(tmp_path / "uniform", tmp_path / "same", average=True, data=str(tmp_path / "rows"))
    assert same.loss_after == pytest.approx(same.loss_before, abs=1e-4)


def test_names_of_experts_are_those_of_their_folders(trained, tmp_path):
    folders = export_peft_experts(trained.run, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(folders) == {"expert0", "expert1", "expert2"}
    dense(trained, {}, tmp_path / "dense")
    with pytest.raises(CheckpointError, match="injection=dense_lora has no experts that are adapters"):
        export_peft_experts(tmp_path / "dense", tmp_path / "none")


def test_files_from_elsewhere_are_not_taken_along(trained, tmp_path):
    adapter, secret = shutil.copytree(trained.adapter, tmp_path / "adapter"), tmp_path / "secret"
    secret.write_text("key")
    (adapter / "notes.txt").symlink_to(secret)
    (adapter / "merges.txt").unlink(missing_ok=True)
    (adapter / "merges.txt").symlink_to(secret)
    folder = export_without_expert(adapter, tmp_path / "less", "1")
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "notes.txt").exists() and not (folder / "merges.txt").exists()


@pytest.mark.parametrize("target", ["secret", "chat_template.jinja"])
def test_a_template_that_is_a_link_to_somewhere_else_is_neither_used_nor_written_out(trained, tmp_path, target):
    adapter, secret = shutil.copytree(trained.adapter, tmp_path / "adapter"), tmp_path / "secret"
    secret.write_text("a key of mine")
    template = adapter / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.symlink_to(tmp_path / "adapter" / target if target.endswith("jinja") else secret)
    for act in (lmoe.load, stored_template, lambda place: export_peft_experts(place, tmp_path / "out")):
        with pytest.raises(LmoeError, match="chat_template.jinja is a link to .*put the file in its place"):
            act(adapter)
    assert not any((tmp_path / "out").rglob("*"))
    folder = export_without_expert(adapter, tmp_path / "less", "1")
    assert not (folder / "chat_template.jinja").exists()


def test_links_of_the_cache_of_the_hub_are_files_of_their_folder(trained, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234" / "adapter", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in trained.adapter.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    _, tokenizer = lmoe.load(snapshot)
    assert tokenizer.chat_template == trained.tokenizer.chat_template
    assert (export_without_expert(snapshot, tmp_path / "less", "1") / "tokenizer.json").exists()


def test_a_config_that_cannot_be_is_named_where_no_model_is_loaded(trained, tmp_path):
    adapter = shutil.copytree(trained.adapter, tmp_path / "adapter")
    content = json.loads((adapter / "lmoe_config.json").read_text())
    content["moe"]["temperature"] = []
    (adapter / "lmoe_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"adapter/lmoe_config\.json: moe\.temperature is \[\], must be a number"):
        export_without_expert(adapter, tmp_path / "less", "1")
