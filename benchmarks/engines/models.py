"""Small models of every architecture that is exported, each a folder with a tokenizer of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model  # type: ignore[import-not-found] - an extra
from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lmoe.export.gguf.pre_tokenizer import known_cuts
from lmoe.files.resources import BASES, TINY, resource_dir

EXPERTS, CHOSEN = 4, 2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny_folder() -> Path:
    """The base that ships with lmoe."""
    return resource_dir(BASES[TINY])


def tiny_base() -> PreTrainedModel:
    """The base that ships with lmoe, in float32."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32).eval()


def _sizes(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Sizes of a random model, whose logits are far from flat."""
    return {
        "vocab_size": len(tokenizer) + 5,  # rows without a token
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _random(model_type: str, **settings: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))


def upcycled(_: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Qwen3-MoE whose experts are the tiny base's FFN, each moved by noise, under random routers."""
    base = tiny_base()
    settings = base.config.to_dict()
    settings |= {
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": base.config.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    for name in ("model_type", "architectures", "layer_types"):
        settings.pop(name, None)
    torch.manual_seed(1)
    model = _random("qwen3_moe", **settings)
    state = base.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])
        for layer, block in zip(base.model.layers, model.model.layers, strict=True):
            gate_up = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
            for fused, plain in (
                (block.mlp.experts.gate_up_proj, gate_up),
                (block.mlp.experts.down_proj, layer.mlp.down_proj.weight),
            ):
                fused.copy_(plain + 0.02 * torch.randn(fused.shape))
            block.mlp.gate.weight.normal_(std=0.3)
    return model


def mixtral(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a random Mixtral."""
    experts = {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}
    return _random("mixtral", **_sizes(tokenizer), **experts, sliding_window=None)


def qwen2_moe(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random Qwen2-MoE, with a shared expert and biases away from 0."""
    experts = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
        "norm_topk_prob": False,
    }
    return _with_biases(_random("qwen2_moe", **_sizes(tokenizer), **experts))


def qwen2(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random Qwen2 with biases away from 0 and a stretched rotation."""
    stretched = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    return _with_biases(_random("qwen2", **_sizes(tokenizer), rope_parameters=stretched))


def llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random Llama with the rotation of Llama 3, biases, and heads of another size than hidden / heads."""
    sizes = _sizes(tokenizer) | {"head_dim": 32, "rope_parameters": LLAMA3, "attention_bias": True}
    return _with_biases(_random("llama", **sizes))


def qwen3(_: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Load the tiny base."""
    return tiny_base()


MODELS: dict[str, Callable[[PreTrainedTokenizerBase], PreTrainedModel]] = {
    "Qwen3-MoE out of the tiny base": upcycled,
    "Mixtral, random": mixtral,
    "Qwen2-MoE, random": qwen2_moe,
    "Llama, random": llama,
    "Qwen2, random": qwen2,
    "Qwen3, the tiny base": qwen3,
}
CUTS = {
    "Mixtral, random": ("smollm", False),
    "Qwen2-MoE, random": ("smaug-bpe", False),
    "Llama, random": ("llama-bpe", True),
    "Qwen2, random": ("gpt-2", False),
}
"""How text is cut before merging, of those whose tokenizer is not the tiny base's."""
TOKENS = 2000
WITH_LORA = ("Qwen3, the tiny base", "Llama, random", "Mixtral, random")


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of one of MODELS: the tiny base's, or one of its kind, trained on the bundled rows, that cuts text
    in another way."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    if name not in CUTS:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["ignore_merges"] = CUTS[name][1]
    backend = Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = known_cuts()[CUTS[name]]
    special = [token["content"] for token in content["added_tokens"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rows = [file.read_text(encoding="utf-8") for file in sorted((resource_dir("data/sft") / "val").glob("*.jsonl"))]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(rows, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=None,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


def save_model(name: str, folder: Path) -> PreTrainedModel:
    """One of MODELS in float32, written with its tokenizer."""
    tokenizer = tokenizer_of(name)
    torch.manual_seed(0)
    model = MODELS[name](tokenizer).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def save_lora(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A PEFT adapter with rsLoRA, another rank and another alpha at some places; the base carries it from now on."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"v_proj": 3},
        alpha_pattern={"k_proj": 5},
        init_lora_weights=False,
        target_modules=LINEARS if "mixtral" in base.config.model_type else [*LINEARS, "gate_proj", "down_proj"],
    )
    torch.manual_seed(2)
    model = get_peft_model(base, config)
    model.save_pretrained(str(folder))
    return model.eval()  # type: ignore[return-value]


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)
    return model
