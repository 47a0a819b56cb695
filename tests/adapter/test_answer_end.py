"""Answers end where training ended a turn, also where that is not the base's eos token, and exports say so."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

import lmoe
from lmoe.adapter.answer_end import end_tokens
from lmoe.adapter.load import load
from lmoe.cli.main import app
from lmoe.export.export import export_merged, export_peft, export_peft_experts, export_without_expert
from lmoe.generate.conversation import prompt_ids
from lmoe.generate.generate import Sampling, continue_ids
from lmoe.generate.speaker import blended
from lmoe.pretrain.bpe import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, train_bpe
from lmoe.vocabulary import BackbonePrecision
from tests.conftest import TEXTS
from tests.peft_experts import write_peft
from tests.tiny_models import tiny_model

VOCAB, CONTEXT, EOS, END = 300, 96, 0, 3
OTHER_TEMPLATE = CHAT_TEMPLATE.replace("im_start", "im_begin")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base that always says <|im_end|>, and whose eos token is <|endoftext|>, as with Qwen's bases."""
    folder = tmp_path_factory.mktemp("answer_end") / "base"
    model = tiny_model(vocab_size=VOCAB, max_position_embeddings=CONTEXT, eos_token_id=EOS, bos_token_id=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[END] = 1.0
    model.save_pretrained(folder)
    tokenizer = train_bpe(TEXTS, VOCAB, CONTEXT)
    tokenizer.eos_token = END_OF_TEXT
    assert tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END]) == [EOS, END]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(base) -> dict[str, Path]:
    """An adapter by strategy, untrained, with the tokenizer of the base and a template of its own."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = OTHER_TEMPLATE
    made = {}
    for strategy in ("dense_lora", "mixture_lora"):
        model = AutoModelForCausalLM.from_pretrained(base)
        lmoe.inject(model, injection={"strategy": strategy, "lora_r": 2})
        made[strategy] = lmoe.save(model, base.parent / strategy, tokenizer=tokenizer)
    return made


def new_tokens(model) -> list[int]:
    ids = torch.tensor([[10, 11, 12]])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    return found[0, 3:].tolist()


def test_without_its_adapter_the_base_runs_on(base):
    assert new_tokens(AutoModelForCausalLM.from_pretrained(base)) == [END] * 5


def test_a_loaded_adapter_stops_in_model_generate_and_in_lmoe_generate(adapters):
    model, tokenizer = load(adapters["mixture_lora"])
    assert new_tokens(model) == [END]
    assert continue_ids(model, tokenizer, prompt_ids(tokenizer, "hello"), Sampling()).tolist() == [END]


def test_an_attached_adapter_stops_too(base, adapters):
    model = AutoModelForCausalLM.from_pretrained(base)
    lmoe.attach(model, adapters["mixture_lora"])
    assert new_tokens(model) == [END]


def test_a_model_and_a_tokenizer_from_anywhere_stop_where_the_template_ends_a_turn(base):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert continue_ids(model, tokenizer, prompt_ids(tokenizer, "hello"), Sampling()).tolist() == [END]
    assert model.generation_config.eos_token_id == EOS
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "other": CHAT_TEMPLATE}
    assert end_tokens(model, tokenizer) == [EOS, END]
    tokenizer.chat_template = None
    assert end_tokens(model, tokenizer) == [EOS]


def test_a_config_that_says_all_of_it_stays_as_it_was(trained):
    model, _ = load(trained.adapter)
    assert model.generation_config.eos_token_id == trained.tokenizer.eos_token_id


def test_every_export_carries_the_end_and_the_template_of_the_run(base, adapters, tmp_path):
    export_peft(adapters["dense_lora"], tmp_path / "peft")
    export_merged(adapters["dense_lora"], tmp_path / "merged")
    export_merged(adapters["mixture_lora"], tmp_path / "average", average=True, data="none")
    experts = export_peft_experts(adapters["mixture_lora"], tmp_path / "experts")
    assert len(experts) == 4
    for folder in (*(tmp_path / name for name in ("peft", "merged", "average")), *experts.values()):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [EOS, END]
        assert (folder / "chat_template.jinja").read_text("utf-8") == OTHER_TEMPLATE
    assert new_tokens(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == [END]
    less = export_without_expert(adapters["mixture_lora"], tmp_path / "less", "1")
    model, tokenizer = load(less)
    assert new_tokens(model) == [END] and tokenizer.chat_template == OTHER_TEMPLATE


def speaker(base: Path, experts: dict[str, Path]):
    places = {name: str(place) for name, place in experts.items()}
    return blended(str(base), places, None, router="weighted", precision=BackbonePrecision.float32, device="cpu")


def with_template(place: Path, folder: Path, template: str | None) -> Path:
    shutil.copytree(place, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def test_a_blend_stops_and_speaks_by_the_template_beside_its_experts(base, adapters, tmp_path):
    bare = with_template(adapters["dense_lora"], tmp_path / "bare", None)
    for experts, template in (
        ({"x": adapters["dense_lora"], "y": bare}, OTHER_TEMPLATE),
        ({"x": bare}, CHAT_TEMPLATE),
        ({}, CHAT_TEMPLATE),
    ):
        with warnings.catch_warnings(action="error"):
            spoken = speaker(base, experts)
        assert spoken.tokenizer.chat_template == template
        assert new_tokens(spoken.model) == [END]


def test_experts_that_were_trained_with_different_templates_are_named(base, adapters, tmp_path):
    other = with_template(adapters["dense_lora"], tmp_path / "other", CHAT_TEMPLATE.replace("im_start", "begin"))
    with pytest.warns(UserWarning, match="different chat templates: x, z; y; all are asked with the base's own"):
        spoken = speaker(base, {"x": adapters["dense_lora"], "y": other, "z": adapters["dense_lora"]})
    assert spoken.tokenizer.chat_template == CHAT_TEMPLATE


@pytest.mark.parametrize("format", ["peft", "merged"])
def test_an_exported_blend_carries_the_end(base, format, tmp_path):
    expert = write_peft(AutoModelForCausalLM.from_pretrained(base), tmp_path / "expert")
    given = ["export", "--model", str(base), "--experts", f"x={expert}", "--format", format]
    done = CliRunner().invoke(app, [*given, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [EOS, END]


def test_a_blend_saved_from_python_carries_the_end_and_leaves_the_model_as_it_was(base, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with lmoe.Blend(model, {"x": write_peft(model, tmp_path / "expert")}) as blend:
        blend.save_merged(tmp_path / "merged", tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [EOS, END]
    assert model.generation_config.eos_token_id == EOS
