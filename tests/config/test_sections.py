"""Sections from plain dicts, as lmoe.inject takes them; and the pre-training's own problems."""

import subprocess
import sys
from pathlib import Path

import pytest

from lmoe.config.defaults import injection_section, moe_section
from lmoe.config.optim import RoleOptimConfig
from lmoe.config.pretrain import PretrainConfig
from lmoe.errors import ConfigError
from lmoe.pretrain.rules import pretrain_problems
from lmoe.vocabulary import LoadBalanceType, RouterKind


def test_keys_left_out_take_the_values_of_conf():
    injection, moe = injection_section({"num_experts": 8}), moe_section({})
    assert (injection.num_experts, injection.lora_r, injection.attn_lora.enabled) == (8, 16, True)
    assert (moe.router, moe.router_z_loss_coef) == (RouterKind.top_k, 0.001)
    assert (moe.load_balance.type, moe.load_balance.aux_loss_coef) == (LoadBalanceType.aux_loss, 0.01)


def test_unknown_keys_of_a_section_are_all_named_with_the_near_ones():
    with pytest.raises(ConfigError) as caught:
        injection_section({"num_expert": 8, "lora_rank": 4, "attn_lora": {"enable": False}})
    assert len(caught.value.problems) == 3
    assert "injection.num_expert: no such key; did you mean num_experts?" in caught.value.problems
    assert "injection.attn_lora.enable: no such key; did you mean enabled?" in caught.value.problems


@pytest.mark.parametrize("given", [{"num_experts": "many"}, {"strategy": "mixture"}, {"attn_lora": 3}])
def test_a_wrong_type_in_a_section_is_a_config_error(given):
    with pytest.raises(ConfigError, match="injection"):
        injection_section(given)


def test_config_and_rules_import_neither_torch_nor_lightning():
    """What makes dry_run=config fast."""
    package = Path(__file__).resolve().parents[2] / "lmoe"
    files = [file for room in ("config", "rules", "files") for file in sorted((package / room).glob("[!_]*.py"))]
    assert len(files) >= 30
    modules = [f"lmoe.{file.parent.name}.{file.stem}" for file in files]
    modules += ["lmoe", "lmoe.errors", "lmoe.vocabulary", "lmoe.cli.train", "lmoe.cli.main"]
    code = (
        f"import sys, importlib\nfor name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'wandb', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def pretrain_config(tmp_path: Path) -> PretrainConfig:
    config = PretrainConfig()
    config.corpus.path = str(tmp_path)
    return config


def test_the_default_pretraining_is_valid(tmp_path):
    assert pretrain_problems(pretrain_config(tmp_path)) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("corpus", "path", "/nowhere/corpus", "corpus.path=/nowhere/corpus: no such folder or file"),
        ("corpus", "path", None, "corpus.path is required"),
        ("corpus", "chats_path", "/nowhere/chats", "corpus.chats_path=/nowhere/chats"),
        ("corpus", "chats_exclude", "/", "corpus.chats_exclude has no effect"),
        ("corpus", "chats_share", 1.0, "corpus.chats_share is 1.0"),
        ("corpus", "held_out_share", 0.5, "corpus.held_out_share is 0.5"),
        ("corpus", "sequence_length", 4096, "corpus.sequence_length=4096 is beyond model.max_position_embeddings=2048"),
        ("corpus", "sequence_length", 0, "corpus.sequence_length is 0"),
        ("corpus", "batch_size", 0, "corpus.batch_size is 0"),
        ("model", "num_attention_heads", 3, "model.num_attention_heads=3 must be a multiple"),
        ("model", "vocab_size", 100, "model.vocab_size is 100"),
        ("model", "num_hidden_layers", 0, "model.num_hidden_layers is 0"),
        ("model", "hidden_size", 0, "model.hidden_size is 0"),
        ("trainer", "gradient_checkpointing", True, "trainer.gradient_checkpointing has no effect"),
        ("trainer", "max_epochs", 2.0, "trainer.max_epochs has no effect in pretrain; set trainer.max_steps"),
        ("trainer", "stop_on_collapse", True, "trainer.stop_on_collapse has no effect"),
        ("trainer", "max_steps", 0, "trainer.max_steps is 0"),
        ("checkpoint", "save_base", True, "checkpoint.save_base has no effect"),
        ("checkpoint", "every_n_steps", -1, "checkpoint.every_n_steps is -1"),
        ("optim", "roles", {"lora": RoleOptimConfig(lr=1e-3)}, "optim.roles has no effect"),
        ("optim", "lr", 0.0, "optim.lr is 0.0"),
    ],
)
def test_a_bad_value_of_a_pretraining_gives_one_line(tmp_path, section, key, value, said):
    config = pretrain_config(tmp_path)
    setattr(getattr(config, section), key, value)
    (problem,) = pretrain_problems(config)
    assert said in problem
