"""The card that lmoe writes: the hub's library reads it, and it says what is known and what is not."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import lmoe
from lmoe.config.data import DataConfig
from lmoe.export.export import export_merged, export_peft_experts
from lmoe.export.native_moe import export_native_moe
from lmoe.files.resources import resource_dir
from lmoe.hub.contents import contents_of, public_base
from lmoe.hub.description import DataSource, data_sources
from lmoe.hub.licences import BundledRows, base_licence, bundled_licences
from lmoe.hub.push import PushSettings, prepared
from lmoe.report.markdown import plain, table
from tests.tiny_models import randomise

NAME = "maria/experts"
SQL = resource_dir("data/sft/train") / "sql.jsonl"


def sha(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_of(place, **changes) -> ModelCard:
    return ModelCard(prepared(PushSettings(checkpoint=str(place), name=NAME, **changes)).card)


def test_the_front_matter_is_what_the_hub_reads(finished_run):
    data = card_of(finished_run, base_model="maria/base").data.to_dict()
    assert data == {
        "library_name": "lmoe",
        "pipeline_tag": "text-generation",
        "tags": ["lmoe", "lora", "mixture-of-experts"],
        "base_model": "maria/base",
        "base_model_relation": "adapter",
    }
    assert "base_model" not in card_of(finished_run).data.to_dict(), "a folder is no name on the hub"


def test_a_card_says_how_the_run_went_and_how_to_use_it(finished_run):
    text = card_of(finished_run, revision="v2").text
    summary = json.loads((finished_run / "report" / "summary.json").read_text())
    for domain in summary["domains"]:
        assert f"| {domain} | {summary['before'][domain]:.3f} | {summary['after'][domain]:.3f} |" in text
    assert "| router | top_k by linear, top_k 2 |" in text
    assert "| phase router_warmup | from step 1, trains router |" in text
    assert "| phase experts | from step 3, trains lora, attn_lora |" in text
    assert "| steps | 6 |" in text
    revision = json.loads((finished_run / "provenance.json").read_text())[-1]["git"]["revision"]
    assert f"commit {revision[:12]}" in text and re.search(r"torch \d", text)
    assert f'lmoe.load("{NAME}", base_model="DIRECTORY_OR_HUB_NAME_OF_THE_BASE", revision="v2")' in text
    assert "* Base: unknown." in text


@pytest.mark.parametrize(
    ("moe", "rows"),
    [
        (
            {"router_target": "domain", "domains": ["code", "math"], "prompt_experts": True},
            {
                "routers are taught": "the domain of a row: code, math",
                "experts act on": "prompts and answers",
                "in a conversation decides": "the first prompt for all that follows",
            },
        ),
        (
            {"router_target": "cluster", "domains": ["cluster0", "cluster1"], "decide": "turn"},
            {
                "routers are taught": "2 clusters of prompts",
                "experts act on": "answers",
                "in a conversation decides": "each prompt for the answer to it",
            },
        ),
    ],
)
def test_the_card_says_what_one_router_of_the_model_was_taught_and_where_experts_act(trained, tmp_path, moe, rows):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    one = {"router": "sequence", "router_scope": "model"}
    lmoe.inject(model, injection={"lora_r": 4, "num_experts": 3}, moe=one | moe)
    lmoe.save(model, tmp_path / "adapter", tokenizer=trained.tokenizer)
    text = card_of(tmp_path / "adapter").text
    assert "| router | sequence by model, top_k 2 |" in text and "own, of its block or of the whole model" in text
    for name, value in rows.items():
        assert f"| {name} | {value} |" in text
    others = card_of(trained.run).text
    assert not any(f"| {name} |" in others for name in rows)


def test_the_card_of_a_run_with_preferences_says_what_each_phase_learns_and_in_what_unit(sft_dpo_run, finished_run):
    text = card_of(sft_dpo_run).text
    assert "| phase joint | from step 1, trains router, lora, attn_lora; learns by sft |" in text
    assert "trains lora, router; learns by dpo beta=0.1 loss_type=sigmoid reference=base |" in text
    assert "Validation loss (loss per pair), of phase prefer on its rows." in text and "nats" not in text
    for domain in ("code", "math"):
        assert f"| {domain} | 0.693 | " in text
    assert "| words | 0" not in text and "| words.jsonl | own file or folder | unknown |" in text
    plain_run = card_of(finished_run).text
    assert "Validation loss (nats per label token)." in plain_run and "learns by" not in plain_run


def test_rows_of_a_phase_are_named_as_those_of_the_run():
    read = {"somebody/rows": "1" * 64, "somebody/pairs": "2" * 64, str(SQL): sha(SQL)}
    found = data_sources(DataConfig(domains=["code"]), read, [DataConfig(path="somebody/pairs", domains=["code"])])
    assert found == (DataSource(name="rows"), DataSource(name="somebody/pairs", on_hub=True))


def test_an_adapter_on_its_own_says_what_it_is_and_that_its_rows_are_unknown(trained):
    text = card_of(trained.adapter).text
    assert "| experts at each site | 3 |" in text and "Rows that it has learnt: unknown" in text
    assert "## Results" not in text and "pictures/" not in text


def test_the_card_of_a_reward_model_has_code_that_scores_an_answer_and_none_that_asks_for_one(trained, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, injection={"lora_r": 4, "num_experts": 3}, reward_head=True)
    folder = tmp_path / "scores"
    lmoe.save(model, folder, tokenizer=trained.tokenizer)
    card = card_of(folder)
    data = card.data.to_dict()
    assert (data["pipeline_tag"], data["tags"][-1]) == ("text-classification", "reward-model")
    assert "a head that scores answers" in card.text and "generate" not in card.text
    code = card.text.partition("```python")[2].partition("```")[0]
    names = {}
    exec(code.replace(NAME, str(folder)).replace("DIRECTORY_OR_HUB_NAME_OF_THE_BASE", str(trained.base)), names)
    assert names["score"].shape == (1,)
    text = card_of(trained.run).text
    assert "generate" in text and "lmoe.reward" not in text


def test_an_expert_exported_inside_its_run_says_how_that_was_trained(own_run):
    export_peft_experts(own_run, own_run / "peft-experts")
    place = own_run / "peft-experts" / "expert0"
    card = card_of(place)
    assert card.data.to_dict()["library_name"] == "peft" and "| steps | 6 |" in card.text
    whole = ": that of the whole run, which this was exported from."
    assert whole in card.text and whole not in card_of(own_run).text, "one expert has other losses than all of them"


def test_an_exported_model_says_how_it_was_trained_until_somebody_changes_it(micro, own_run, tmp_path):
    """Also far from its run, which is known by the digest of its adapter."""
    model = AutoModelForCausalLM.from_pretrained(micro.model)
    lmoe.inject(model, {"strategy": "moe_expert_lora", "lora_r": 4})
    randomise(model, std=0.1)
    shutil.rmtree(own_run / "adapter")
    lmoe.save(model, own_run / "adapter", base_model=str(micro.model))
    folder = export_native_moe(own_run, tmp_path / "out")
    pushed = prepared(PushSettings(checkpoint=str(folder), name=NAME))
    assert pushed.warnings() == [] and str(tmp_path) not in pushed.card and str(micro.model) not in pushed.card
    assert "Base: model (a folder of whoever trained it)." in pushed.card
    assert "| strategy | moe_expert_lora" in pushed.card and "| steps | 6 |" in pushed.card
    assert "| domain | adapters off | after |" in pushed.card
    data = card_of(folder, base_model="maria/base").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("maria/base", "finetune")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    changed = prepared(PushSettings(checkpoint=str(folder), name=NAME))
    (warning,) = changed.warnings()
    assert "is not as it was exported: config.json has been changed since" in warning
    assert "| steps |" not in changed.card and "Base: model" in changed.card


def test_the_average_of_experts_does_not_claim_what_the_run_has_measured(own_run, tmp_path):
    export_merged(own_run, tmp_path / "average", average=True, data="none")
    text = card_of(tmp_path / "average").text
    assert "| steps |" not in text and "adapters off" not in text


def test_bundled_rows_have_their_licences_and_own_files_their_names_alone(tmp_path):
    own = tmp_path / "secret place" / "mine.jsonl"
    read = {str(SQL): sha(SQL), str(own): "0" * 64, "somebody/rows": "1" * 64}
    found = data_sources(DataConfig(path="somebody/rows"), read)
    assert found == (
        DataSource(name="sql", licence="BSD-3-Clause", bundled=True),
        DataSource(name="mine.jsonl"),
        DataSource(name="somebody/rows", on_hub=True),
    )
    assert data_sources(DataConfig(domains=["code"]), {str(SQL): sha(SQL)}) == ()


def test_every_bundled_domain_has_a_licence():
    files = [file for folder in ("sft", "preference") for file in (resource_dir("data") / folder / "train").iterdir()]
    assert len(files) == 8 + 4
    assert bundled_licences().keys() == {BundledRows(file.parents[1].name, file.stem) for file in files}


def test_pairs_of_answers_are_not_taken_for_instructions_of_the_same_domain():
    files = [resource_dir("data") / folder / "train" / "general.jsonl" for folder in ("sft", "preference")]
    assert data_sources(DataConfig(path="bundled_preference"), {str(file): sha(file) for file in files}) == (
        DataSource(name="general", licence="CC BY-SA 3.0", bundled=True),
        DataSource(name="preference/general", licence="Apache-2.0", bundled=True),
    )


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: gemma\n---\n", "gemma"),
        ("---\nlicense: [1\n---\n", None),
        ("no front matter", None),
        (None, None),
    ],
)
def test_the_licence_of_a_base_is_what_its_card_states(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert base_licence(str(tmp_path)) == licence
    assert base_licence("tiny") == "cc-by-sa-4.0"


def test_a_base_goes_by_a_name_that_others_can_find(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    places = {"tiny": "tiny", "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B", "models/own": "", "/models/own": "", "~/own": ""}
    assert {place: public_base(place) for place in places} == places
    sent = contents_of(trained.adapter).files["lmoe_config.json"]
    assert isinstance(sent, bytes) and json.loads(sent)["base_model"]["name"] == ""
    own = json.loads((trained.adapter / "lmoe_config.json").read_text())
    assert json.loads(sent)["base_model"] | {"name": str(trained.base)} == own["base_model"]


def test_a_base_that_was_a_folder_when_it_was_saved_is_no_name_on_the_hub_anywhere(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.base.parents[1])
    lmoe.save(trained.model, tmp_path / "own", base_model=f"{trained.base.parent.name}/{trained.base.name}")
    monkeypatch.chdir(tmp_path)
    found = contents_of(tmp_path / "own")
    assert (found.base, found.base_place) == ("", str(trained.base))
    assert "huggingface.co" not in card_of(tmp_path / "own").text
    assert str(lmoe.load(tmp_path / "own")[0].name_or_path) == str(trained.base)


@pytest.mark.parametrize("own", ["run_id", "provenance.json"])
def test_a_config_of_something_else_around_an_exported_folder_is_no_run(tmp_path, own):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "config.yaml").write_text("site: mine\n")
    assert contents_of(tmp_path / "peft").run is None
    (tmp_path / own).write_text("")
    assert contents_of(tmp_path / "peft").run == tmp_path


def test_names_stay_text_in_a_table():
    assert plain("a|b\n<script> `x` my_name") == r"a\|b \<script\> \`x\` my_name"
    assert plain("&lt; ~~x~~ $y$") == r"\&lt; \~\~x\~\~ \$y\$"
    assert table(["a", "b"], [["x", "1"], ["y", ""]]) == ["| a | b |", "|---|---:|", "| x | 1 |", "| y | |"]
