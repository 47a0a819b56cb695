"""What a run of the micro backbone leaves (the real default is in tests/test_end_to_end.py)."""

import json
import shutil

import pytest
import torch

import lmoe
from lmoe.config.evaluate import EvaluateSettings
from lmoe.config.run import RunConfig
from lmoe.evaluate.evaluate import evaluate
from lmoe.generate.conversation import prompt_ids
from lmoe.injection.roles import adapter_parameters
from lmoe.pretrain.bpe import CHAT_TEMPLATE
from tests.metric_names import names, rows, undocumented
from tests.micro import saved_config


def test_the_first_row_is_the_backbone_before_any_step(finished_run):
    first, *_, last = rows(finished_run)
    assert first["step"] == 0
    assert {"val/loss", "val/code/loss", "val/math/loss", "val/words/loss", "init/logit_change"} <= first.keys()
    assert "train/loss" not in first
    assert last["step"] == 6
    assert last["val/loss"] < first["val/loss"]


def test_warmed_up_routers_start_with_a_small_change_of_the_logits(finished_run, train):
    """lora_B is not zero where routers train first, and zero where all train from the start."""
    assert 0 < rows(finished_run)[0]["init/logit_change"] < 0.5
    assert rows(train("phase=joint", "trainer.max_steps=1").run)[0]["init/logit_change"] == 0


def test_promised_metrics_are_logged_at_each_step(finished_run):
    by_step = {int(row["step"]): row for row in rows(finished_run)}
    assert sorted(by_step) == list(range(7))
    site = "model.layers.0.mlp.gate_proj"
    promised = {
        "train/loss",
        "train/load_balancing_loss",
        "train/router_z_loss",
        "throughput/tokens",
        "throughput/tokens_per_second",
    }
    promised |= {f"routing/{name}" for name in ("entropy", "cv", "max_vio", "dead", "effective")}
    promised |= {f"routing/{site}/load/{expert}" for expert in range(4)}
    for step in range(1, 7):
        assert promised <= by_step[step].keys()
        assert sum(by_step[step][f"routing/{site}/load/{e}"] for e in range(4)) == pytest.approx(1)
    assert {"lr/router", "grad_norm/router"} <= by_step[1].keys()
    assert {"lr/lora", "grad_norm/lora", "lr/attn_lora", "grad_norm/attn_lora"} <= by_step[6].keys()
    assert "lr/lora" not in by_step[1]
    assert "lr/router" not in by_step[6]


def test_every_logged_name_is_documented(finished_run):
    logged = names(finished_run)
    assert len(logged) > 50
    assert undocumented(logged) == []


def test_checkpoints_load_without_running_code_and_hold_no_base_weights(finished_run, micro):
    model = micro.parts().model
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint = torch.load(finished_run / "checkpoints" / name, weights_only=True)
        assert checkpoint["state_dict"].keys() == {f"model.{n}" for n in adapter_parameters(model)}
        assert checkpoint["lmoe_phase"] == "experts"
    assert (finished_run / "checkpoints" / "last.ckpt").stat().st_size < 4 * 9472 * 4 + 200_000


def test_the_saved_config_is_complete_and_reads_back(finished_run):
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.load(finished_run / "config.yaml"))
    )
    assert isinstance(config, RunConfig)
    assert config.trainer.max_steps == 6
    assert saved_config(finished_run)["injection"]["num_experts"] == 4


def test_the_provenance_names_versions_seed_and_data(finished_run, micro):
    (record,) = json.loads((finished_run / "provenance.json").read_text())
    assert record["seed"] == 0
    assert {str(micro.train / f"{d}.jsonl") for d in ("code", "math", "words")} <= record["data"].keys()
    assert record["versions"]["torch"] == torch.__version__
    assert record["backbone"]["name"] == str(micro.model)
    assert record["backbone"]["fingerprint"]


def test_the_table_shows_every_domain_expert_and_the_next_command(train):
    done = train()
    assert done.code == 0, done.text
    for words in ("code", "math", "words", "mean over domains", "dead at", "lmoe generate --checkpoint run"):
        assert words in done.text
    assert "--prompt 'code 100: say eight'" in done.text, "a prompt of the run's own validation rows"
    assert "lmoe evaluate --checkpoint run" in done.text and "--format peft-experts" in done.text
    assert "resume=" not in done.text
    assert "phase router_warmup: steps 1 to 2 train router" in done.text
    assert "phase experts: steps 3 to 6 train attn_lora, lora" in done.text


def test_the_base_is_stored_when_asked(train, micro):
    from transformers import AutoModelForCausalLM

    done = train("checkpoint.save_base=true", "trainer.max_steps=2")
    assert done.code == 0, done.text
    original = AutoModelForCausalLM.from_pretrained(micro.model).state_dict()
    stored = AutoModelForCausalLM.from_pretrained(done.run / "base").state_dict()
    assert original.keys() == stored.keys()
    assert all(torch.equal(original[name], stored[name]) for name in original)


def test_the_chat_template_of_a_run_is_that_of_its_adapter_and_of_its_evaluation(train, micro, tmp_path):
    own = "{#- mine -#}" + CHAT_TEMPLATE.replace("message['role'] +", "message['role'] + '!' +")
    file = tmp_path / "my.jinja"
    file.write_text(own, encoding="utf-8")
    done = train(f"data.chat_template={file}", "trainer.max_steps=2")
    assert done.code == 0, done.text
    saved = done.run / "adapter" / "chat_template.jinja"
    assert saved.read_bytes() == file.read_bytes()

    def first_prompt() -> str:
        settings = EvaluateSettings(checkpoint=str(done.run), samples=1, max_new_tokens=1, limit=1)
        return evaluate(settings).samples[0].prompt

    _, tokenizer = lmoe.load(done.run)
    assert tokenizer.decode(prompt_ids(tokenizer, "red")[0]).startswith("<|im_start|>user!\nred")
    assert first_prompt().startswith("<|im_start|>user!\n")
    # The file may change or go after the run.
    file.write_text(CHAT_TEMPLATE.replace("'\\n'", "'?'"), encoding="utf-8")
    assert first_prompt().startswith("<|im_start|>user!\n")
    file.unlink()
    assert first_prompt().startswith("<|im_start|>user!\n")
    # An older lmoe saved the base's template with the adapter, and its runs are evaluated by the file that they name.
    shutil.copy(micro.model / "chat_template.jinja", saved)
    assert first_prompt().startswith("<|im_start|>user\n")
    file.write_text(own, encoding="utf-8")
    assert first_prompt().startswith("<|im_start|>user!\n")


def test_early_stopping_ends_the_run_and_still_leaves_everything(train):
    done = train(
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=1",
        "++callbacks.early_stopping.min_delta=100",
        "trainer.val_every_n_steps=1",
    )
    assert done.code == 0, done.text
    assert max(row["step"] for row in rows(done.run)) < 6
    assert (done.run / "adapter" / "adapter.safetensors").exists()


def test_logger_none_and_csv_leave_metrics_csv_and_no_wandb(train, finished_run):
    assert saved_config(finished_run)["logger"]["kind"] == "none"
    done = train("logger=csv", "trainer.max_steps=2")
    assert done.code == 0, done.text
    for run in (finished_run, done.run):
        assert (run / "metrics.csv").exists()
        assert not (run / "wandb").exists()


def test_settings_of_the_template_are_saved_with_the_adapter_and_hold_in_its_evaluation(train, tmp_path):
    own = CHAT_TEMPLATE.replace("message['role'] +", "message['role'] + (mark or '') +")
    file = tmp_path / "my.jinja"
    file.write_text(own, encoding="utf-8")
    done = train(f"data.chat_template={file}", "data.template_kwargs={mark:'!'}", "trainer.max_steps=2")
    assert done.code == 0, done.text
    assert saved_config(done.run)["data"]["template_kwargs"] == {"mark": "!"}
    _, tokenizer = lmoe.load(done.run)
    assert tokenizer.decode(prompt_ids(tokenizer, "red")[0]).startswith("<|im_start|>user!\nred")

    def prompt(**more: str) -> str:
        settings = EvaluateSettings(checkpoint=str(done.run), samples=1, max_new_tokens=1, limit=1, **more)
        return evaluate(settings).samples[0].prompt

    assert prompt().startswith("<|im_start|>user!\n")
    assert prompt(chat_template=str(file)).startswith("<|im_start|>user!\n")
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")  # which reads no mark
    assert prompt(chat_template=str(file)).startswith("<|im_start|>user\n")


def test_a_setting_that_the_template_does_not_read_ends_a_run_before_it_begins(train):
    done = train("data.template_kwargs={enable_thinking:false}")
    assert done.code == 1
    assert "data.template_kwargs.enable_thinking: the chat template does not read enable_thinking" in done.text
