"""The head of a reward model: what it reads, on whichever side the padding is, and where it cannot go."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lmoe
from lmoe.adapter.folder import save_adapter
from lmoe.errors import BackboneError, CheckpointError, ConfigError, InjectionError, RoutingError
from lmoe.export.merge import merge_adapters, merge_average
from lmoe.export.native_plan import native_plan
from lmoe.grow.without_expert import write_without_expert
from lmoe.injection.backbone_state import backbone_state
from lmoe.injection.roles import parameter_roles, role_table
from lmoe.peft.adapter import save_peft
from lmoe.peft.experts import save_peft_experts
from lmoe.peft.reader import read_header
from lmoe.vocabulary import BackbonePrecision, Role
from tests.adapter.conftest import BASE
from tests.tiny_models import randomise, tiny_model, tokens

HEAD = "reward_head.weight"
LENGTHS = (5, 2, 7)
FAMILIES = ("qwen3", "gpt2", "gemma3", "granite", "olmoe", "qwen3_5_text")


def reward_model(family: str = "qwen3", injection: dict | None = None, moe: dict | None = None):
    model = tiny_model(family)
    lmoe.inject(model, injection or {}, moe or {}, reward_head=True)
    randomise(model, std=0.1)
    return model


def test_a_parameter_that_the_model_holds_itself_is_the_backbones_beside_a_reward_head():
    model = tiny_model()
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    lmoe.inject(model, reward_head=True)
    roles = parameter_roles(model)
    assert (roles["scale"], roles[HEAD]) == (Role.backbone, Role.reward_head)


def padded(texts: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (B, T)."""
    longest = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_reward_is_the_head_times_the_last_hidden_state_whichever_side_is_padded(family):
    """Gpt2 has absolute positions, Granite scales its logits, Qwen3.5 has linear attention, Gemma 3 a vision tower."""
    model = reward_model(family)
    texts = [tokens(1, length, seed=length)[0] for length in LENGTHS]
    alone = [model(text[None], output_hidden_states=True).hidden_states[-1][0, -1] for text in texts]
    expected = torch.stack([(h.double() * model.get_parameter(HEAD)[0].double()).sum() for h in alone])
    assert expected.std() > 0.01
    for left in (False, True):
        scores = lmoe.reward(model, *padded(texts, left=left))
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_reward_is_float32_whatever_autocast_says_and_where_the_model_was_cast():
    model, ids = reward_model(), tokens()
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        h = model(ids, output_hidden_states=True).hidden_states[-1][:, -1]
        score = lmoe.reward(model, ids, torch.ones_like(ids))
    assert torch.equal(score, (h.float() @ model.get_parameter(HEAD).T).squeeze(1))
    assert lmoe.reward(model.to(torch.bfloat16), ids, torch.ones_like(ids)).dtype == torch.float32


def test_gradients_reach_head_experts_and_routers():
    model, ids = reward_model(), tokens()
    lmoe.reward(model, ids, torch.ones_like(ids)).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {HEAD, "model.layers.0.mlp.up_proj.router.weight", "model.layers.0.mlp.up_proj.lora_A"} <= reached


def test_the_head_has_a_role_of_its_own_and_is_no_part_of_the_base():
    model = reward_model()
    assert (Role.reward_head, 32, 32) in role_table(model)
    assert backbone_state(model).keys() == tiny_model().state_dict().keys()


@torch.no_grad()
def test_the_head_comes_back_by_save_load_attach_and_save_pretrained(trained, tmp_path):
    model, ids = tiny_model(vocab_size=300), tokens()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    lmoe.inject(model, reward_head=True)
    randomise(model)
    score = lmoe.reward(model, ids, torch.ones_like(ids))
    lmoe.save(model, tmp_path / "adapter", tokenizer=trained.tokenizer)
    model.save_pretrained(tmp_path / "whole")
    trained.tokenizer.save_pretrained(tmp_path / "whole")
    attached = type(model).from_pretrained(tmp_path / "base")
    lmoe.attach(attached, tmp_path / "adapter")
    for again in (lmoe.load(tmp_path / "adapter")[0], lmoe.load(tmp_path / "whole")[0], attached):
        assert torch.equal(lmoe.reward(again, ids, torch.ones_like(ids)), score)


def test_a_refused_attach_leaves_no_head(tmp_path):
    folder = save_adapter(reward_model(), tmp_path / "rewards", BASE)
    (folder / "adapter.safetensors").write_bytes(b"torn")
    model = tiny_model()
    with pytest.raises(CheckpointError):
        lmoe.attach(model, folder)
    assert not hasattr(model, "reward_head")


class TestRefused:
    def test_a_model_without_a_head(self):
        model, ids = tiny_model(), tokens()
        with pytest.raises(InjectionError, match="this model carries no experts"):
            lmoe.reward(model, ids, torch.ones_like(ids))
        lmoe.inject(model)
        with pytest.raises(InjectionError, match="this model has no reward head; train one with task=reward"):
            lmoe.reward(model, ids, torch.ones_like(ids))

    def test_a_model_that_shows_no_output_layer_and_one_that_is_compiled(self):
        model, ids = reward_model(), tokens()
        model.compile(backend="eager")
        with pytest.raises(BackboneError, match="rewards are read from the hidden states.*or it is compiled"):
            lmoe.reward(model, ids, torch.ones_like(ids))
        bare = tiny_model()
        bare.get_output_embeddings = lambda: None
        before = [name for name, _ in bare.named_parameters()]
        with pytest.raises(InjectionError, match="a reward head reads what the output layer is given, and the model"):
            lmoe.inject(bare, reward_head=True)
        assert [name for name, _ in bare.named_parameters()] == before

    def test_a_model_with_something_of_that_name(self):
        model = tiny_model()
        model.reward_head = nn.Linear(32, 1)
        with pytest.raises(InjectionError, match="Qwen3ForCausalLM has a reward_head of its own"):
            lmoe.inject(model, reward_head=True)

    @pytest.mark.parametrize(
        ("mask", "prompt", "text"),
        [
            (torch.ones(2, 3), None, r"attention_mask is \(2, 3\), must be \(2, 7\) as input_ids"),
            (torch.tensor([[1] * 7, [0] * 7]), None, "attention_mask keeps no token of a text"),
            (torch.ones(2, 7), torch.ones(2, 3), r"prompt_mask is \(2, 3\), must be \(2, 7\)"),
            (torch.ones(2, 7), torch.ones(2, 7), "prompt_mask is for moe.router=.*; this model has moe.router=top_k"),
        ],
    )
    def test_masks_that_do_not_fit(self, mask, prompt, text):
        with pytest.raises(RoutingError, match=text):
            lmoe.reward(reward_model(), tokens(2, 7), mask, prompt_mask=prompt)

    def test_forms_without_a_place_for_the_head(self, tmp_path):
        dense, mixture = reward_model(injection={"strategy": "dense_lora"}), reward_model()
        said = "this is a reward model, and .* has no place for its head"
        for write in (
            lambda: save_peft(dense, tmp_path / "out", base_model="x"),
            lambda: save_peft_experts(mixture, tmp_path / "out", base_model="x"),
            lambda: merge_adapters(dense),
            lambda: merge_average(mixture),
            lambda: read_header(save_adapter(dense, tmp_path / "adapter", BASE)),
        ):
            with pytest.raises(CheckpointError, match=said):
                write()
        experts = reward_model("mixtral", {"strategy": "native_moe_expert_lora"})
        with pytest.raises(ConfigError, match=said):
            native_plan(experts, BackbonePrecision.float32)
        assert not (tmp_path / "out").exists()

    def test_an_average_where_the_config_is_lost(self, tmp_path):
        folder: Path = save_adapter(reward_model(), tmp_path / "adapter", BASE)
        (folder / "lmoe_config.json").unlink()
        tiny_model().save_pretrained(tmp_path / "base")
        with pytest.raises(CheckpointError, match="what reward_head.weight does cannot be known"):
            lmoe.load(folder, base_model=str(tmp_path / "base"))


@torch.no_grad()
def test_an_adapter_without_one_expert_keeps_the_head(tmp_path):
    folder = save_adapter(reward_model(injection={"num_experts": 3}), tmp_path / "adapter", BASE)
    model = tiny_model()
    lmoe.attach(model, write_without_expert(folder, tmp_path / "fewer", "1"))
    assert model.get_parameter(HEAD).shape == (1, 32)
