"""The adapter format: saving and loading is the identity; what does not fit is refused and changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lmoe
from lmoe.adapter.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_bytes,
    adapter_tensors,
    load_adapter,
    read_adapter_config,
    save_adapter,
)
from lmoe.errors import CheckpointError, InjectionError, LmoeError
from lmoe.injection.backbone_state import backbone_state
from lmoe.injection.record import injected
from lmoe.injection.roles import adapter_parameters
from tests.adapter.conftest import BASE, INJECTION
from tests.tiny_models import randomise, tiny_model, tokens

FIXTURES = Path(__file__).parent / "fixtures"


def fresh(folder: Path, **base):
    """The base, injected as the folder says, with untrained adapters."""
    config = read_adapter_config(folder)
    model = tiny_model(**base)
    torch.manual_seed(99)
    lmoe.inject(model, config.injection, config.moe, reward_head=config.reward_head)
    return model, config


def edit(folder: Path, change) -> None:
    """Change lmoe_config.json by a function of its content."""
    path = folder / CONFIG_FILE
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def refused(folder: Path, text: str) -> None:
    """Loading fails with the text and leaves every tensor as it was."""
    model, config = fresh(folder)
    before = {name: tensor.clone() for name, tensor in adapter_tensors(model).items()}
    with pytest.raises(CheckpointError, match=text):
        load_adapter(model, folder, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(model).items())


def load_into_fresh(folder: Path) -> None:
    model, config = fresh(folder)
    load_adapter(model, folder, config)


# --- identities


def test_saving_and_loading_is_the_identity_bitwise(model, adapter):
    twin, config = fresh(adapter)
    load_adapter(twin, adapter, config)
    loaded = adapter_parameters(twin)
    assert loaded.keys() == adapter_parameters(model).keys()
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(loaded[name], parameter) and loaded[name].requires_grad
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)


def test_saving_twice_gives_the_same_bytes(model, adapter, tmp_path):
    again = save_adapter(model, tmp_path / "again", BASE)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (again / name).read_bytes() == (adapter / name).read_bytes()
    save_adapter(model, adapter, BASE)
    assert (again / WEIGHTS_FILE).read_bytes() == (adapter / WEIGHTS_FILE).read_bytes()
    assert sorted(path.name for path in adapter.iterdir()) == [WEIGHTS_FILE, CONFIG_FILE]


def test_both_files_can_be_read_by_whom_the_umask_lets(adapter):
    modes = {(adapter / name).stat().st_mode for name in (CONFIG_FILE, WEIGHTS_FILE)}
    (adapter / "other").write_text("")
    assert modes == {(adapter / "other").stat().st_mode}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_are_float32_whatever_the_model_was_made(model, tmp_path, dtype):
    save_adapter(model.to(dtype), tmp_path / "half", BASE)
    stored = load_file(tmp_path / "half" / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    own = adapter_tensors(model)
    assert all(torch.equal(tensor, own[name].float()) for name, tensor in stored.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_loads_on_its_base_in_another_type(adapter, dtype):
    config, model = read_adapter_config(adapter), tiny_model().to(dtype)
    lmoe.inject(model, config.injection, config.moe)
    load_adapter(model, adapter, config)
    stored = load_file(adapter / WEIGHTS_FILE)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in adapter_tensors(model).items())


def test_the_base_that_a_phase_has_trained_is_one_that_the_adapter_knows(tmp_path):
    model = tiny_model()
    lmoe.inject(model, injection=INJECTION, trained_base=["base_ffn"])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.5)
    folder = save_adapter(model, tmp_path / "trained", BASE)
    config, kept = read_adapter_config(folder), backbone_state(model)
    left, found, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    left.load_state_dict(kept)
    for base in (left, found, other):
        lmoe.inject(base, config.injection, config.moe, trained_base=config.trained_base)
    for base in (left, found):
        load_adapter(base, folder, config)
        assert torch.equal(base(tokens()).logits, model(tokens()).logits)
    with pytest.raises(CheckpointError, match="trained on another base"):
        load_adapter(other, folder, config)


@pytest.mark.parametrize(
    "change",
    [
        {"rounded": []},
        {"rounded": {"as_float16": 3}},
        {"after_training": {"rounded": {}}},
        {"after_training": "x"},
        {"beside": "yes"},
    ],
)
def test_fields_about_the_base_that_cannot_be_are_refused(adapter, change):
    edit(adapter, lambda raw: raw["base_model"].update(change))
    with pytest.raises(CheckpointError, match="base_model"):
        read_adapter_config(adapter)


def test_keys_are_those_of_the_format(adapter):
    expected = set()
    for layer in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            path = f"model.layers.{layer}.mlp.{name}"
            expected |= {f"{path}.router.weight"}
            expected |= {f"{path}.experts.{e}.lora_{m}" for e in range(3) for m in "AB"}
        expected |= {f"model.layers.{layer}.self_attn.{n}_proj.lora_{m}" for n in "qv" for m in "AB"}
    stored = load_file(adapter / WEIGHTS_FILE)
    assert stored.keys() == expected
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert stored["model.layers.0.mlp.gate_proj.experts.1.lora_A"].shape == (2, 32)
    assert stored["model.layers.0.mlp.gate_proj.experts.1.lora_B"].shape == (48, 2)
    assert stored["model.layers.0.mlp.gate_proj.router.weight"].shape == (3, 32)
    config = json.loads((adapter / CONFIG_FILE).read_text())
    assert list(config) == ["format_version", "base_model", "injection", "moe", "trained_base"]
    assert config["base_model"].keys() >= {"name", "fingerprint"}
    assert config["injection"]["num_experts"] == 3 and config["moe"]["router"] == "top_k"


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_adapter_of_each_format_version_that_was_stored_once_loads_forever(version):
    """Made by tests/adapter/make_format_1.py on 2026-11-22, make_format_2.py and make_format_3.py on 2026-11-28; the
    logits beside each are those of the model then, and so is the reward."""
    fixture = FIXTURES / f"format_{version}"
    assert {path.name for path in fixture.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "base.safetensors", "logits.json"}
    assert json.loads((fixture / CONFIG_FILE).read_text())["format_version"] == version
    config = read_adapter_config(fixture)
    model = tiny_model(**json.loads((fixture / "logits.json").read_text())["base"])
    difference = model.load_state_dict(load_file(fixture / "base.safetensors"), strict=False)
    assert difference.missing_keys == ["lm_head.weight"] and not difference.unexpected_keys  # tied to the embedding
    lmoe.inject(model, config.injection, config.moe, reward_head=config.reward_head)
    load_adapter(model, fixture, config)
    assert adapter_bytes(model) == (fixture / WEIGHTS_FILE).read_bytes()  # what is written of it has not changed
    recorded = json.loads((fixture / "logits.json").read_text())
    logits = model(torch.tensor([recorded["tokens"]])).logits[0, -1, :8]
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"]), atol=1e-4, rtol=1e-4)
    assert ("reward" in recorded) == (version == 3)
    if "reward" in recorded:
        ids = torch.tensor([recorded["tokens"]])
        score = lmoe.reward(model, ids, torch.ones_like(ids))
        torch.testing.assert_close(score, torch.tensor(recorded["reward"]), atol=1e-4, rtol=1e-4)


# --- refusals of the weights


def test_a_missing_weights_file_is_named(adapter):
    (adapter / WEIGHTS_FILE).unlink()
    refused(adapter, f"{WEIGHTS_FILE}: cannot be read")


@pytest.mark.parametrize("keep", [0, 4, 100, -50])
def test_a_torn_weights_file_is_refused(adapter, keep):
    content = (adapter / WEIGHTS_FILE).read_bytes()
    (adapter / WEIGHTS_FILE).write_bytes(content[:keep])
    refused(adapter, f"{WEIGHTS_FILE}: cannot be read")


def test_a_pickle_in_place_of_the_weights_is_never_opened(adapter):
    torch.save({"x": torch.zeros(1)}, adapter / WEIGHTS_FILE)
    refused(adapter, f"{WEIGHTS_FILE}: cannot be read")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.experts.2.lora_B"), r"1 keys missing, first .*experts\.2\.lora_B"),
        (lambda t: t.update({"model.extra.lora_A": torch.zeros(1)}), "1 unknown keys, first model.extra.lora_A"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.router.weight": torch.zeros(3, 31)}),
            r"router.weight has shape \(3, 31\), expected \(3, 32\)",
        ),
    ],
    ids=["missing", "unknown", "misshapen"],
)
def test_keys_that_do_not_fit_are_named(adapter, change, text):
    tensors = load_file(adapter / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS_FILE)
    refused(adapter, text)


def test_another_base_is_refused_by_its_fingerprint(adapter):
    model, config = fresh(adapter, seed=1)
    with pytest.raises(CheckpointError, match=r"trained on another base \(some/base, fingerprint"):
        load_adapter(model, adapter, config)


# --- refusals of the config


def test_a_folder_without_config_is_no_adapter(tmp_path):
    with pytest.raises(CheckpointError, match=f"no {CONFIG_FILE}, so this is no lmoe adapter"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "cannot be read"),
        (b'{"format_version": 1, ', "cannot be read"),
        (b'{"format_version": 1\xff}', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[1]", "must hold an object, holds list"),
        (b'{"format_version": 4}', "format_version is 4; this lmoe reads 1, 2 and 3"),
        (b'{"format_version": true}', "format_version is True; this lmoe reads 1, 2 and 3"),
        (b"{}", "format_version is None; this lmoe reads 1, 2 and 3"),
        (b'{"format_version": 1, "injection": {}}', "base_model, moe missing"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, content, text):
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["base_model"].update(precision="float99"),
        lambda c: c["base_model"].update(name=7),
        lambda c: c["base_model"].update(revision=["main"]),
        lambda c: c["base_model"].pop("fingerprint"),
        lambda c: c["base_model"].update(fingerprint=None),
    ],
)
def test_a_base_model_that_says_too_little_is_refused(adapter, change):
    edit(adapter, change)
    with pytest.raises(CheckpointError, match="base_model needs a"):
        read_adapter_config(adapter)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("code", "must be a list of names"),
        (["../x"], "must be a list of names"),
        (["a", "A"], "names an expert twice"),
        (["a", "b"], "2 expert_names for 3 experts"),
    ],
)
def test_names_of_experts_that_cannot_be_are_refused(adapter, names, text):
    edit(adapter, lambda c: c.update(expert_names=names))
    with pytest.raises(CheckpointError, match=text):
        load_into_fresh(adapter)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", ["q_proj", "${injection.lora_r}"]])
def test_an_interpolation_in_a_config_is_refused(adapter, value):
    edit(adapter, lambda c: c["injection"].update(target_keywords=value))
    with pytest.raises(CheckpointError, match="is an interpolation; an adapter holds plain values"):
        read_adapter_config(adapter)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(format_version="a" * 5000),
        lambda c: c.update(trained_base=["a" * 5000]),
        lambda c: c.update(trained_base=[["a" * 5000]]),
        lambda c: c.update(expert_names=["a" * 5000]),
        lambda c: c["base_model"].update(name="a" * 5000),
        lambda c: c["injection"].update({"a" * 5000: 1}),
        lambda c: c["injection"].update(strategy="a" * 5000),
        lambda c: c["moe"].update(router=["a" * 5000]),
        lambda c: c["moe"].update(domains=["${" + "a" * 5000]),
    ],
)
def test_a_message_about_a_config_never_shows_a_long_value_whole(adapter, change):
    edit(adapter, change)
    with pytest.raises(LmoeError, match=f"{CONFIG_FILE}.*(.|\n)*aaa") as found:
        lmoe.attach(tiny_model(), adapter)
    assert len(str(found.value)) < 1200


def test_a_tensor_with_an_endless_name_is_refused_without_showing_it(adapter):
    save_file({"a" * 5000: torch.zeros(1)}, adapter / WEIGHTS_FILE)
    refused(adapter, f"{WEIGHTS_FILE}: a tensor's name has 5,000 characters, must have at most 1,000: a{{59}}…$")


def test_every_flipped_bit_of_a_config_loads_or_is_one_of_our_errors(adapter):
    """A flipped bit may make another valid number; it must never make a traceback of another library."""
    from lmoe.config.defaults import injection_section, moe_section
    from lmoe.errors import LmoeError

    content = (adapter / CONFIG_FILE).read_bytes()
    refusals = 0
    for position in range(0, len(content), 23):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (adapter / CONFIG_FILE).write_bytes(bytes(flipped))
        try:
            config = read_adapter_config(adapter)
            injection_section(config.injection)
            moe_section(config.moe)
        except LmoeError:
            refusals += 1
    assert refusals > len(content) // 23 // 2


# --- saving


def test_a_model_without_experts_cannot_be_saved(tmp_path):
    with pytest.raises(InjectionError, match="carries no experts"):
        save_adapter(tiny_model(), tmp_path, BASE)


def test_a_folder_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_adapter(model, tmp_path / "file" / "adapter", BASE)


def test_the_version_in_the_file_is_the_oldest_that_can_say_it(adapter):
    """An older lmoe reads version 1: without a router of the whole model, nothing of one stands in the file."""
    raw = json.loads((adapter / CONFIG_FILE).read_text())
    assert raw["format_version"] == 1
    assert not raw["moe"].keys() & {"router_layer", "prompt_experts", "decide", "router_target", "router_target_coef"}


OF_MODEL = {"router": "sequence", "router_scope": "model"}


def test_a_router_of_the_whole_model_is_saved_and_loaded_bit_by_bit_as_version_2(tmp_path):
    model = tiny_model()
    lmoe.inject(model, INJECTION, OF_MODEL | {"prompt_experts": True, "decide": "turn", "router_bias": True})
    randomise(model, std=0.5)
    folder = save_adapter(model, tmp_path / "adapter", BASE)
    stored = load_file(folder / WEIGHTS_FILE)
    of_router = {name: tuple(tensor.shape) for name, tensor in stored.items() if "router" in name}
    assert of_router == {"router.weight": (3, 32), "router.bias": (3,)}
    raw = json.loads((folder / CONFIG_FILE).read_text())
    assert (raw["format_version"], raw["moe"]["prompt_experts"], raw["moe"]["decide"]) == (2, True, "turn")
    twin, config = fresh(folder)
    load_adapter(twin, folder, config)
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    assert injected(twin).fingerprint == injected(model).fingerprint
    edit(folder, lambda raw: raw["moe"].update(router_scope="linear", prompt_experts=False, decide="first"))
    with pytest.raises(CheckpointError, match="12 keys missing, first model.layers.0.mlp.down_proj.router"):
        load_into_fresh(folder)


def test_a_reward_head_makes_version_3_and_takes_nothing_but_its_own_key(model, adapter, tmp_path):
    twin = tiny_model()
    lmoe.inject(twin, INJECTION, reward_head=True)
    randomise(twin)
    folder = save_adapter(twin, tmp_path / "rewards", BASE)
    raw, plain = (json.loads((place / CONFIG_FILE).read_text()) for place in (folder, adapter))
    assert (raw.pop("format_version"), raw.pop("reward_head"), plain.pop("format_version")) == (3, True, 1)
    assert raw | {"moe": {}} == plain | {"moe": {}} and raw["moe"].items() >= plain["moe"].items()
    stored, others = load_file(folder / WEIGHTS_FILE), load_file(adapter / WEIGHTS_FILE)
    assert stored.pop("reward_head.weight").shape == (1, 32)
    assert stored.keys() == others.keys() and all(torch.equal(stored[name], others[name]) for name in others)
    again, config = fresh(folder)
    load_adapter(again, folder, config)
    ids, mask = tokens(), torch.ones_like(tokens())
    assert torch.equal(lmoe.reward(again, ids, mask), lmoe.reward(twin, ids, mask))
    assert injected(again).fingerprint == injected(model).fingerprint


def test_a_reward_head_that_is_said_and_not_there_or_there_and_not_said_is_refused(tmp_path):
    model = tiny_model()
    lmoe.inject(model, INJECTION, reward_head=True)
    folder = save_adapter(model, tmp_path / "rewards", BASE)
    edit(folder, lambda raw: raw.update(reward_head=False))
    refused(folder, "1 unknown keys, first reward_head.weight")
    edit(folder, lambda raw: raw.update(reward_head=True))
    stored = load_file(folder / WEIGHTS_FILE)
    del stored["reward_head.weight"]
    save_file(stored, folder / WEIGHTS_FILE)
    refused(folder, "1 keys missing, first reward_head.weight")
    edit(folder, lambda raw: raw.update(reward_head="yes"))
    with pytest.raises(CheckpointError, match="reward_head is 'yes', must be true or false"):
        read_adapter_config(folder)


def test_what_the_injection_resolved_is_stored(adapter):
    assert read_adapter_config(adapter).injection.items() >= INJECTION.items()


def test_an_adapter_of_a_run_cut_short_is_used_with_the_temperature_that_it_had_reached(tmp_path):
    model = tiny_model()
    lmoe.inject(model, moe={"temperature": 1.0, "temperature_end": 3.0})
    injected(model).context.temperature = 1.75
    lmoe.save(model, tmp_path, base_model="anything")
    saved = json.loads((tmp_path / "lmoe_config.json").read_text())["moe"]
    assert (saved["temperature"], saved["temperature_end"]) == (1.75, None)
    other = tiny_model()
    lmoe.inject(other, moe=saved)
    assert injected(other).context.temperature == 1.75
