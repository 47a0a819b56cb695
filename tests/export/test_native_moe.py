"""A trained mixture is written as one of Transformers' own: the same logits where lmoe is not imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe
from lmoe.adapter.folder import CONFIG_FILE
from lmoe.errors import CheckpointError, ConfigError
from lmoe.export.native_classes import BY_FAMILY, native_config
from lmoe.export.native_moe import export_native_moe, write_native_moe
from lmoe.export.native_plan import native_plan
from lmoe.files.export_record import EXPORT_FILE, ExportRecord, sha256
from lmoe.injection.record import sites
from lmoe.layers.expert_ffn import ExpertFFN
from lmoe.vocabulary import BackbonePrecision
from tests.export.plain_models import answers
from tests.full_disk import files_of_at_most
from tests.tiny_models import NATIVE_FAMILIES, randomise, tiny_model, tokens

EXPERTS = {"strategy": "moe_expert_lora", "num_experts": 3, "lora_r": 4}
NATIVE = {"strategy": "native_moe_expert_lora", "lora_r": 4}
ONE_LAYER = EXPERTS | {"layer_indices": [1]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 3}
CASES = {
    **{f"{family} becomes a mixture": (family, EXPERTS, {"temperature": 1.7}, {}) for family in BY_FAMILY},
    **{f"{family}, one layer with experts": (family, ONE_LAYER, {}, {}) for family in BY_FAMILY},
    **{f"{family} keeps its class": (family, NATIVE, {}, {}) for family in NATIVE_FAMILIES},
    "native experts, one fused tensor": ("qwen3_moe", NATIVE | {"target_keywords": ["down_proj"]}, {}, {}),
    "all experts for every token": ("qwen3", EXPERTS, {"router": "soft"}, {}),
    "noise that only training adds": ("qwen3", EXPERTS, {"router": "noisy_top_k"}, {}),
    "one expert a token": ("qwen3", EXPERTS | {"top_k": 1}, {}, {}),
    "copies that were trained": ("llama", EXPERTS | {"share_base": False}, {}, {}),
    "branches that fade": ("llama", EXPERTS, {}, {}),
    "branches on one Linear": ("llama", EXPERTS | {"target_keywords": ["up_proj"]}, {}, {}),
    "DoRA on attention, biases, tied embeddings": (
        *("qwen3", EXPERTS | {"attn_lora": {"use_dora": True}}, {}),
        {"attention_bias": True, "tie_word_embeddings": True},
    ),
    "windows in some layers": ("qwen2", EXPERTS, {}, SLIDING | {"max_window_layers": 1}),
    "windows in all layers": ("qwen3", EXPERTS, {}, SLIDING | {"max_window_layers": 0}),
    "a window": ("mistral", EXPERTS, {}, {"sliding_window": 3}),
    "rope of Llama 3": ("llama", EXPERTS, {}, {"rope_parameters": LLAMA3}),
}


def trained_model(case: str):
    """The model of a case, away from its start."""
    family, injection, moe, changes = CASES[case]
    model = tiny_model(family, **changes)
    lmoe.inject(model, injection, moe)
    randomise(model, std=0.15)
    generator = torch.Generator().manual_seed(3)
    for _, site in sites(model):
        if isinstance(site, ExpertFFN) and site.base_copies is not None:
            for copies in site.base_copies.values():
                copies.weight.data += 0.1 * torch.randn(copies.weight.shape, generator=generator)
        if isinstance(site, ExpertFFN) and case == "branches that fade":
            site.up_proj.fade = torch.tensor([0.0, 0.5, 2.0])
            site.down_proj.fade = 0.25
    return model.eval()


def record(precision: str = "float32") -> ExportRecord:
    return ExportRecord(format="native-moe", run="../run", adapter="", base={}, precision=precision, files={})


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The folder of all cases, what lmoe computes, and what plain Transformers computes in a process of its own."""
    folder, expected = tmp_path_factory.mktemp("exported"), {}
    torch.save(ids := tokens(2, 9), folder / "ids.pt")
    for number, case in enumerate(CASES):
        model = trained_model(case)
        plan = native_plan(model, BackbonePrecision.float32)
        place = folder / str(number)
        write_native_moe(model, trained.tokenizer, plan, place, record(), largest=60_000 if number % 2 else 10**9)
        expected[case] = answers(model, ids)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = [sys.executable, Path(__file__).with_name("plain_models.py"), folder]
    done = subprocess.run(script, env=alone, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt")
    return folder, expected, {case: found[str(number)] for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_computes_what_was_trained(exported, case):
    _, expected, found = exported
    assert expected[case]["logits"].std() > 0.1
    torch.testing.assert_close(found[case]["logits"], expected[case]["logits"], atol=5e-5, rtol=1e-4)
    assert torch.equal(found[case]["tokens"], expected[case]["tokens"])


def test_the_experts_act_in_every_case(exported):
    """Else the bare base would pass for the mixture."""
    _, expected, _ = exported
    ids = tokens(2, 9)
    for case, (family, _, _, changes) in CASES.items():
        with torch.no_grad():
            bare = tiny_model(family, **changes)(ids, attention_mask=torch.ones_like(ids)).logits
        assert (bare - expected[case]["logits"]).abs().max() > 1e-3, case


def test_each_family_becomes_the_class_of_the_table(exported):
    _, _, found = exported
    kinds = {family: found[f"{family} becomes a mixture"]["class"] for family in BY_FAMILY}
    assert kinds == {
        "llama": "MixtralForCausalLM",
        "mistral": "MixtralForCausalLM",
        "ministral": "MixtralForCausalLM",
        "qwen2": "Qwen2MoeForCausalLM",
        "qwen3": "Qwen3MoeForCausalLM",
        "qwen3_5_text": "Qwen3_5MoeForCausalLM",
        "olmo2": "FlexOlmoForCausalLM",
        "granite": "GraniteMoeForCausalLM",
    }


def test_a_folder_is_whole_and_says_what_it_is_of(exported):
    folder, _, _ = exported
    sharded = 0
    for place in (path for path in folder.iterdir() if path.is_dir()):
        content = json.loads((place / EXPORT_FILE).read_text())
        assert content["format_version"] == 1 and content["run"] == "../run"
        left = {path.name for path in place.iterdir()} - {EXPORT_FILE}
        assert left == set(content["files"]) >= {"config.json", "generation_config.json", "tokenizer.json"}
        assert all(sha256(place / name) == digest for name, digest in content["files"].items())
        sharded += "model.safetensors.index.json" in left
        assert "chat_template" not in content and AutoTokenizer.from_pretrained(place).chat_template
    assert sharded == len(CASES) // 2
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_key_that_the_base_does_not_read_does_not_begin_to_act():
    """Mixtral would take it for a window, and Llama has none."""
    config = tiny_model("llama", sliding_window=3).config
    made, problems = native_config(BY_FAMILY["llama"], config, num_experts=2, top_k=1, dense=[])
    assert config.sliding_window == 3 and made.sliding_window is None and not problems


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """An adapter of three experts on the base of `trained`, in a run."""
    folder = tmp_path_factory.mktemp("native") / "run"
    save_adapter(trained, folder, EXPERTS, {})
    return folder


def save_adapter(trained, folder: Path, injection: dict, moe: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.base)
    lmoe.inject(model, injection, moe)
    randomise(model, std=0.1)
    lmoe.save(model, folder / "adapter", tokenizer=trained.tokenizer)


ORACLE = {"router": "oracle", "domains": ["a", "b", "c"], "load_balance": {"type": "none"}, "router_z_loss_coef": 0}
NO_BALANCE = {"load_balance": {"type": "none"}}
REFUSED = {
    "top_p": (EXPERTS, {"router": "top_p"}, ["moe.router=top_p gives tokens different numbers of experts"]),
    "sigmoid": (EXPERTS, {"router": "sigmoid"}, ["moe.router=sigmoid scores experts otherwise"]),
    "sequence": (EXPERTS, {"router": "sequence"}, ["moe.router=sequence decides once for a prompt"]),
    "prompt_hash": (EXPERTS, {"router": "prompt_hash"}, ["moe.router=prompt_hash decides once for a prompt"]),
    "uniform": (EXPERTS, {"router": "uniform"}, ["moe.router=uniform is a baseline"]),
    "random": (EXPERTS, {"router": "random"}, ["moe.router=random is a baseline"]),
    "oracle": (EXPERTS, ORACLE, ["moe.router=oracle goes by the domain of a row"]),
    "a bias, a selection bias, other numbers of experts": (
        {"strategy": "moe_expert_lora", "lora_r": 4, "num_experts_by_layer": [2, 4]},
        {"router_bias": True, "load_balance": {"type": "aux_loss_free", "bias_update_rate": 0.001}},
        ["moe.router_bias=true", "aux_loss_free chooses by a bias", "num_experts_by_layer=[2, 4]", "3 problems"],
    ),
    "mixture_lora": ({"lora_r": 4}, {}, ["injection=mixture_lora has branches", "`export_peft_experts`"]),
    "dense_lora": ({"lora_r": 4, "strategy": "dense_lora"}, {}, ["has no experts; merge it with `export_merged`"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_at_once_and_before_the_base_is_loaded(trained, tmp_path, monkeypatch, case):
    injection, moe, reasons = REFUSED[case]
    if "router" in moe and case != "oracle":
        moe = {**moe, **({} if case in ("top_p", "sigmoid", "sequence") else NO_BALANCE)}
    save_adapter(trained, tmp_path / "run", injection, moe)
    monkeypatch.setattr("lmoe.export.native_moe.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError) as caught:
        export_native_moe(tmp_path / "run", tmp_path / "out")
    for reason in reasons:
        assert reason in str(caught.value)
    if "moe_expert_lora" in injection.values():
        assert "train with" in str(caught.value) and "`lmoe.load` runs it" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("phi3", {}, "model_type=phi3: no mixture of Transformers' own is such a model"),
        ("smollm3", {}, "model_type=smollm3: no mixture"),
        ("llama", {"mlp_bias": True}, "has no place for these weights of the base: model.layers.0.mlp.down_proj.bias"),
        ("llama", {"attention_bias": True}, "no place for these weights of the base: model.layers.0.self_attn.k_proj"),
        ("qwen3", SLIDING | {"max_window_layers": 1}, "full_attention in some layers and sliding_attention in others"),
    ],
)
def test_a_base_that_no_class_is_exactly_is_refused_by_its_config(
    trained, tmp_path, monkeypatch, family, changes, reason
):
    base = tiny_model(family, **changes)
    base.save_pretrained(tmp_path / "base")
    trained.tokenizer.save_pretrained(tmp_path / "base")
    lmoe.inject(base, EXPERTS, {"router": "top_p"})
    lmoe.save(base, tmp_path / "run", base_model=str(tmp_path / "base"))
    for weights in (tmp_path / "base").glob("*.safetensors"):
        weights.unlink()  # the config is enough
    with pytest.raises(ConfigError) as caught:
        export_native_moe(tmp_path / "run", tmp_path / "out")
    assert reason in str(caught.value)
    assert "moe.router=top_p gives tokens different numbers" in str(caught.value)  # beside the other


def test_settings_that_somebody_has_written_into_an_adapter_are_refused_like_those_that_were_trained(run, tmp_path):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    content = json.loads((adapter / CONFIG_FILE).read_text())
    content["moe"]["norm_topk_prob"] = False
    content["injection"]["shared_lora_r"] = 2
    (adapter / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        export_native_moe(adapter, tmp_path / "out")
    assert "moe.scale=raw: the weights must sum to 1; train with moe.scale=sum_to_one" in str(caught.value)
    assert "injection.shared_lora_r=2 is an expert that is always on" in str(caught.value)


def test_a_quantised_base_is_refused_with_the_precision_that_is_needed_and_its_price(trained, run, tmp_path):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    content = json.loads((adapter / CONFIG_FILE).read_text())
    content["base_model"]["precision"] = "nf4"
    (adapter / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"quantised \(nf4\).*backbone.precision=bfloat16, 0\.00 GB of weights,"):
        export_native_moe(adapter, tmp_path / "out")


def test_an_offloaded_base_is_refused_by_name(trained):
    model = trained_model("one expert a token")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"embed_tokens are offloaded .*: load the base in one place, which takes"):
        native_plan(model, BackbonePrecision.float32)


def test_the_price_is_said_before_anything_is_read_or_written(run, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("lmoe.export.native_moe.load", lambda *_, **__: pytest.fail("\n".join(said)))
    with pytest.raises(pytest.fail.Exception, match=r"Qwen3MoeForCausalLM: [\d,]+ parameters, 0\.00 GB in float32"):
        export_native_moe(run, tmp_path / "out", say=said.append)
    assert "each of 2 layers holds 3 copies of its FFN" in said[0]
    monkeypatch.setattr("shutil.disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(CheckpointError, match=r"and 0\.00 GB are free there; name a folder on another disk"):
        export_native_moe(run, tmp_path / "out")


def test_rounding_is_said_and_float32_has_none(run, tmp_path):
    said: list[str] = []
    export_native_moe(run, tmp_path / "half", precision=BackbonePrecision.bfloat16, say=said.append)
    assert said[-1].startswith("rounding to bfloat16 took ") and "% of what training has changed" in said[-1]
    halves = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype is torch.bfloat16
    said.clear()
    export_native_moe(run, tmp_path / "whole", say=said.append)
    assert len(said) == 1 and "rounding" not in said[0]
    with pytest.raises(ConfigError, match="`precision=nf4`: weights are written in float32, bfloat16 or float16"):
        export_native_moe(run, tmp_path / "out", precision=BackbonePrecision.nf4)


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_fills_up_leaves_nothing_under_the_name_or_beside_it(run, tmp_path, exists):
    if exists:
        (tmp_path / "out").mkdir()
    with files_of_at_most(100_000), pytest.raises(CheckpointError, match=r"out cannot be written: File too large"):
        export_native_moe(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if exists else [])
    assert not exists or not any((tmp_path / "out").iterdir())
    export_native_moe(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_an_interruption_leaves_nothing_and_a_folder_in_use_is_refused(run, tmp_path, monkeypatch):
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lmoe.export.shards.os.fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_native_moe(run, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        export_native_moe(run, tmp_path)


def test_a_model_that_was_exported_and_changed_is_noticed_when_it_is_loaded_as_a_base(run, tmp_path):
    from lmoe.backbones.load import load_model
    from lmoe.config.backbone import BackboneConfig

    place = export_native_moe(run, tmp_path / "out")
    load_model(BackboneConfig(model_name=str(place)))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    with pytest.warns(UserWarning, match="is not as lmoe has exported it: config.json has been changed since"):
        load_model(BackboneConfig(model_name=str(place)))
