"""Read one expert: what a file says is kept to the letter, and what it must not do it cannot."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmoe
from lmoe.errors import CheckpointError
from lmoe.peft import reader as peft_reader
from lmoe.peft.expert_file import check_fits
from lmoe.peft.reader import expert_folder, read_expert
from tests.peft_experts import write_peft
from tests.tiny_models import randomise, tiny_model, tokens

A, B = (f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight" for half in "AB")
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def base():
    return tiny_model()


@pytest.fixture
def adapter(tmp_path) -> Path:
    """One branch (32 in, 48 out, rank 4), written by hand."""
    folder = tmp_path / "adapter"
    write(folder, {A: torch.ones(4, 32), B: torch.ones(48, 4)})
    return folder


def write(folder: Path, tensors: dict | None = None, **config) -> Path:
    folder.mkdir(exist_ok=True)
    known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "some/base", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path | str, *words: str, model=None) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_expert(folder, model)
    for word in words:
        assert word in str(caught.value), caught.value


def test_an_expert_has_its_branches_its_base_and_its_scaling(adapter):
    expert = read_expert(adapter)
    assert expert.base_model == "some/base" and expert.fingerprint is None
    assert list(expert.branches) == [PATH]
    assert expert.branches[PATH].scaling == 2.0
    assert expert.branches[PATH].lora_A.shape == (4, 32) and expert.branches[PATH].lora_B.shape == (48, 4)


def test_what_peft_writes_fits_its_base(base, tmp_path):
    expert = read_expert(write_peft(base, tmp_path / "expert"), base)
    assert len(expert.branches) == 14
    check_fits(expert, base)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"up_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.1.mlp.up_proj": 2, "p_proj": 2, "mlp.up_proj": 4, "up_proj": 40}}, 1.0),
        ({"alpha_pattern": {rf"layers\.({'|'.join(map(str, range(64)))})\.mlp\.(gate_proj|up_proj)": 2}}, 0.5),
        ({"alpha_pattern": {"|".join(["k_proj", *(f"{letter}_proj" for letter in "abcdefghij"), "up_proj"]): 2}}, 0.5),
        ({"alpha_pattern": {r"layers\.(1|2|3|4|5|6|7|8|9|10|11)\.mlp.*": 2}}, 2.0),
        ({"r": 99, "rank_pattern": {".*up_proj": 4}}, 2.0),
        ({"lora_alpha": 0.5}, 0.125),
    ],
)
def test_the_scaling_is_pefts(adapter, config, scaling):
    write(adapter, **config)
    assert read_expert(adapter).branches[PATH].scaling == scaling


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'", "only LORA"]),
        ({"use_dora": True}, ["use_dora", "merge_and_unload"]),
        ({"bias": "all"}, ["bias is 'all'", "bias=none"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save is set"]),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, ["target_parameters is set", "fused experts"]),
        ({"trainable_token_indices": [1]}, ["trainable_token_indices is set"]),
        ({"layer_replication": [[0, 2]]}, ["layer_replication is set"]),
        ({"lora_bias": True}, ["lora_bias is set"]),
        ({"alora_invocation_tokens": [1]}, ["alora_invocation_tokens is set"]),
        ({"use_qalora": True}, ["use_qalora is set"]),
        ({"arrow_config": {"top_k": 2}}, ["arrow_config is set", "router=arrow"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights is 'pissa'", "path_initial_model"]),
        ({"some_new_thing": {"a": 1}}, ["'some_new_thing' is an option that this version does not know"]),
        ({"_target_": "os.system"}, ["'_target_' is an option that this version does not know"]),
        ({"r": 5}, ["model.layers.0.mlp.up_proj should have rank 5, and its tensors have 4"]),
        ({"r": "4"}, ["r must be a number up to 1e9, is '4'"]),
        ({"lora_alpha": 1e99}, ["lora_alpha must be a number up to 1e9"]),
        ({"alpha_pattern": {"(a+)+": 1}}, ["'(a+)+' is no simple pattern"]),
        ({"alpha_pattern": {".*.*.*up": 1}}, ["is no simple pattern"]),
        ({"alpha_pattern": {f".*{number}": 1 for number in range(20)}}, ["is no simple pattern"]),
        ({"alpha_pattern": {"a?" * 100 + "a" * 100: 1}}, ["is no simple pattern"]),
        ({"alpha_pattern": {"(a|aa)" * 50: 1}}, ["is no simple pattern"]),
        ({"alpha_pattern": {"(a|a|b|c|d|e|f|g|h|i)" * 9: 1}}, ["is no simple pattern"]),
        ({"alpha_pattern": {"(.|a)" * 9: 1}}, ["is no simple pattern"]),
        ({"rank_pattern": {"(": 1}}, ["'(' is no pattern"]),
        ({"rank_pattern": [1]}, ["rank_pattern must map patterns to numbers, is list"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_no_plain_lora_is_refused_with_a_reason(adapter, config, words):
    refused(write(adapter, **config), *words)


def test_options_that_change_nothing_are_read_over(adapter):
    write(
        adapter, task_type="CAUSAL_LM", lora_dropout=0.1, init_lora_weights="gaussian", use_dora=False, peft_version="9"
    )
    assert read_expert(adapter).branches


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({A: torch.ones(4, 32)}, ["up_proj has lora_A and lacks the other half"]),
        ({A: torch.ones(4, 32), B: torch.ones(48, 3)}, ["lora_A (4, 32) and lora_B (48, 3) are not (R, D) and (O, R)"]),
        ({A: torch.ones(4, 32, 1), B: torch.ones(48, 4)}, ["are not (R, D) and (O, R)"]),
        ({A: torch.ones(0, 32), B: torch.ones(48, 0)}, ["are not (R, D) and (O, R)"]),
        ({}, ["holds no lora_A and lora_B"]),
        ({A: torch.ones(4, 32, dtype=torch.int8), B: torch.ones(48, 4)}, ["has type I8", "F32"]),
        ({A: torch.full((4, 32), torch.nan), B: torch.ones(48, 4)}, ["holds NaN or infinity"]),
        ({"lm_head.lora_A.weight": torch.ones(4, 32)}, ["does not begin with base_model.model."]),
        (
            {"base_model.model.embed.lora_embedding_A": torch.ones(4, 32)},
            ["LoRA of an embedding; only Linears can be blended"],
        ),
        (
            {"base_model.model.a.lora_magnitude_vector.weight": torch.ones(4)},
            ["is no part of a LoRA on a Linear"],
        ),
        (
            {A: torch.ones(9000, 1), B: torch.ones(1, 9000)},
            ["has rank 9,000; at most 8,192 is read"],
        ),
    ],
    ids=range(11),
)
def test_tensors_that_are_no_branches_are_refused(tmp_path, tensors, words):
    refused(write(tmp_path / "adapter", tensors), *words)


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc/passwd", "a..b", "model.__class__ ", "a;b", "${oc.env:HOME}", "a" * 300]
)
def test_names_that_are_no_module_paths_are_refused_and_open_nothing(tmp_path, name):
    tensors = {f"base_model.model.{name}.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    refused(write(tmp_path / "adapter", tensors), "names no module")


def test_shapes_are_compared_with_the_model_before_any_tensor_is_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_reader, "finite_tensors", lambda *_: pytest.fail("tensors were read"))
    shapes = {A: torch.ones(4, 33), B: torch.ones(48, 4)}
    refused(write(tmp_path / "a", shapes), "trained for 33 in, 48 out; here it has 32 in, 48 out", model=base)
    elsewhere = {key.replace("up_proj", "up_prj"): value for key, value in shapes.items()}
    refused(
        write(tmp_path / "b", elsewhere),
        "no model.layers.0.mlp.up_prj",
        "nearest is",
        "trained on some/base",
        model=base,
    )
    norm = {key.replace("up_proj", "act_fn"): value for key, value in shapes.items()}
    refused(write(tmp_path / "c", norm), "act_fn is a SiLUActivation here", model=base)


def test_a_header_that_claims_ten_gigabytes_is_refused_before_anything_is_allocated(adapter):
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(struct.pack("<Q", 10_000_000_000) + b"{}")
    refused(adapter, "claims a header of 10,000,000,000 bytes in a file of 10")
    with open(weights, "r+b") as file:  # a file that has so many bytes, on paper
        file.truncate(10_000_000_100)
    refused(adapter, "claims a header of 10,000,000,000 bytes")


def test_shapes_beyond_the_file_are_refused(adapter):
    header = json.dumps({A: {"dtype": "F32", "shape": [4, 1 << 50], "data_offsets": [0, 1 << 54]}}).encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(adapter, "cannot be read")


@pytest.mark.parametrize("content", [b"", b"1234", struct.pack("<Q", 4) + b"nope", b"\xff" * 64])
def test_torn_weights_are_refused(adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused(adapter, "adapter_model.safetensors")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/must-not-exist"),))


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    folder = write(tmp_path / "adapter")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    refused(folder, "a pickle can run any code", "safe_serialization=True")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", ["must hold an object, holds list"]),
        ("{", ["cannot be read"]),
        ('{"r": NaN}', ["NaN is no finite number"]),
        ("[" * 100_000, ["cannot be read"]),
        (" " * 4_000_001, ["4,000,001 bytes; a config has at most 4,000,000"]),
    ],
    ids=["list", "torn", "nan", "deep", "large"],
)
def test_configs_that_are_none_are_refused(adapter, content, words):
    (adapter / "adapter_config.json").write_text(content)
    refused(adapter, *words)


def test_a_config_that_is_no_file_is_refused(adapter):
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_config.json").mkdir()
    refused(adapter, "is no ordinary file")


def test_a_local_directory_never_asks_the_network_and_a_hub_name_asks_for_five_files(adapter, tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(adapter)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    read_expert(adapter)
    read_expert(str(adapter))
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither adapter_config.json nor lmoe_config.json")
    for name in ("./nothing", "/nothing/there", "a/b/c", "../x", "name", tmp_path / "a/b"):
        refused(name, "no such directory")
    assert not asked
    assert read_expert("some/adapter").branches
    files = ["adapter.safetensors", "adapter_config.json", "adapter_model.safetensors", "centroid.safetensors"]
    assert asked == [("some/adapter", [*files, "lmoe_config.json"])]


def test_without_network_a_hub_name_is_one_clear_message():
    refused("some/adapter", "some/adapter: no such directory, and the hub does not give it")


def test_lmoe_adapters_say_which_base_they_are_for_and_only_dense_lora_is_an_expert(base, tmp_path):
    model = tiny_model()
    lmoe.inject(model, injection={"strategy": "dense_lora", "lora_r": 2, "use_rslora": True})
    lmoe.save(model, tmp_path / "dense", base_model="some/base")
    expert = read_expert(tmp_path / "dense", base)
    assert expert.base_model == "some/base" and len(expert.branches) == 10
    assert {round(branch.scaling**2) for branch in expert.branches.values()} == {32 * 32 // 2}
    refused(tmp_path / "dense", "trained on another base, fingerprint", model=tiny_model(seed=1))

    mixture, dora = tiny_model(), tiny_model()
    lmoe.inject(mixture)
    lmoe.save(mixture, tmp_path / "mixture")
    refused(tmp_path / "mixture", "injection=mixture_lora chooses its experts by itself; `lmoe.load` runs it")
    lmoe.inject(dora, injection={"strategy": "dense_lora", "attn_lora": {"use_dora": True}})
    lmoe.save(dora, tmp_path / "dora")
    refused(tmp_path / "dora", "DoRA rescales the frozen weight; train with use_dora=false")


def test_reading_changes_no_number(base, tmp_path):
    folder = write_peft(base, tmp_path / "expert")
    stored, expert = load_file(folder / "adapter_model.safetensors"), read_expert(folder)
    assert len(stored) == 28
    for path, branch in expert.branches.items():
        assert torch.equal(branch.lora_A, stored[f"base_model.model.{path}.lora_A.weight"])
        assert torch.equal(branch.lora_B, stored[f"base_model.model.{path}.lora_B.weight"])


@pytest.mark.parametrize(
    "injection",
    [
        {"target_keywords": ["attn.c_proj", "mlp.c_fc"], "attn_lora": {"lora_alpha": 8.0}},
        {"target_keywords": ["mlp.c_fc"], "attn_lora": {"keywords": ["mlp.c_proj"], "lora_alpha": 8.0}},
        {"attn_lora": {"lora_alpha": 8.0}},
    ],
    ids=["a dotted keyword on attention", "a keyword of attn_lora on the FFN", "no keywords"],
)
def test_each_branch_of_an_lmoe_adapter_has_the_scaling_that_it_was_trained_with(injection, tmp_path):
    base, model = tiny_model("gpt2"), tiny_model("gpt2")
    lmoe.inject(model, injection={"strategy": "dense_lora", "lora_r": 2, **injection})
    randomise(model)
    lmoe.save(model, tmp_path / "adapter", base_model="some/base")
    lmoe.Blend(base, {"only": tmp_path / "adapter"})
    with torch.no_grad():
        torch.testing.assert_close(base(tokens()).logits, model.eval()(tokens()).logits, atol=2e-5, rtol=1e-4)


def test_sections_that_are_none_are_one_message(tmp_path):
    model = tiny_model()
    lmoe.inject(model, injection={"strategy": "dense_lora"})
    lmoe.save(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "lmoe_config.json"
    raw = json.loads(file.read_text())
    raw["injection"]["attn_lora"] = [1]
    file.write_text(json.dumps(raw))
    refused(tmp_path / "adapter", "lmoe_config.json", "injection.attn_lora is [1], must be a mapping")


@pytest.mark.parametrize("place", ["~nobody-of-this-name/x", "x" * 3_000])
def test_a_place_that_no_file_system_takes_is_no_expert(place):
    with pytest.raises(CheckpointError):
        expert_folder(place)
