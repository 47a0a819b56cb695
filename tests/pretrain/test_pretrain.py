"""A base from scratch in four steps: weights, tokenizer and card; interrupted, it is the same base."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lmoe.errors import ConfigError, TrainingError
from lmoe.pretrain.progress import PretrainProgress
from lmoe.run.provenance import add_provenance, check_unchanged
from tests.metric_names import rows
from tests.micro import WORDS

SETTINGS = (
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.head_dim=16",
    "model.intermediate_size=48",
    "model.max_position_embeddings=64",
    "corpus.sequence_length=32",
    "corpus.batch_size=2",
    "corpus.held_out_min_bytes=300",
    "trainer.max_steps=4",
    "trainer.compile=false",
    "trainer.precision=32-true",
    "trainer.val_every_n_steps=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "optim.warmup_steps=1",
    "checkpoint.every_n_steps=1",
    "logger=none",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for shift, domain in enumerate(("fables", "letters")):
        words = [WORDS[(i * (shift + 2)) % len(WORDS)] for i in range(60)]
        text = "\n\n".join(" ".join(words[i % 7 :]) for i in range(12))
        (folder / f"{domain}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def pretrain(restored, corpus, tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    from lmoe.cli.pretrain import main

    def command(*overrides: str, run: str | None = None) -> tuple[int, str]:
        place = [*SETTINGS, f"corpus.path={corpus}", f"hydra.run.dir={tmp_path / run}"] if run else []
        keys = {o.split("=")[0] for o in overrides}
        code = main([*(p for p in place if p.split("=")[0] not in keys), *overrides])
        out, err = capsys.readouterr()
        return code, " ".join((out + " " + err).split())

    return command


def test_a_base_comes_with_tokenizer_card_and_figures(pretrain, micro, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, said = pretrain(f"eval_sft={micro.val}", f"corpus.chats_path={micro.train}", run="run")
    assert code == 0, said
    base = tmp_path / "run" / "base"
    card = (base / "README.md").read_text(encoding="utf-8")
    for words in ("bits per byte", "Bits per byte", "gzip -9", "fables", "letters", "chats", "256 tokens", "words"):
        assert words.lower() in card.lower()
    assert (base / "loss_curve.png").stat().st_size > 1000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert str(model.dtype) == "torch.bfloat16"
    assert model.config.vocab_size == len(tokenizer)
    assert "{%- generation -%}" in tokenizer.chat_template
    logged = rows(tmp_path / "run")
    assert {"val/loss", "val/fables/loss", "val/letters/loss"} <= logged[-1].keys()
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]


def test_an_interrupted_pretraining_goes_on_bit_for_bit(pretrain, tmp_path, monkeypatch):
    code, said = pretrain(run="whole")
    assert code == 0, said
    original = PretrainProgress.after_step

    def stopping(self, trainer, module, step):
        original(self, trainer, module, step)
        if trainer.global_step == 3:
            raise TrainingError("the test pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(PretrainProgress, "after_step", stopping)
        assert pretrain(run="broken")[0] == 1
    code, said = pretrain(f"resume={tmp_path / 'broken'}")
    assert code == 0, said
    whole, broken = (tmp_path / run / "base" / "model.safetensors" for run in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")


def test_text_and_chats_that_changed_since_the_start_are_refused(pretrain, corpus, micro, tmp_path):
    texts, chats = shutil.copytree(corpus, tmp_path / "texts"), shutil.copytree(micro.train, tmp_path / "chats")
    given = (f"corpus.path={texts}", f"corpus.chats_path={chats}", "corpus.chats_share=0.9", "trainer.max_steps=1")
    code, said = pretrain(*given, run="run")
    assert code == 0, said
    for file in (texts / "letters.txt", chats / "code.jsonl"):
        content = file.read_bytes()
        file.write_bytes(content[: content.rstrip().rfind(b"\n") + 1])
        code, said = pretrain(f"resume={tmp_path / 'run'}")
        file.write_bytes(content)
        assert code == 1
        assert f"{file} has changed since the run was started" in said


def test_a_pretraining_that_has_recorded_no_text_goes_on(tmp_path):
    """As those of earlier versions."""
    add_provenance(tmp_path, {"data": {}, "rows": [], "backbone": {}})
    check_unchanged(tmp_path, {"en.txt": "1"}, ["en 2"], {})
    add_provenance(tmp_path, {"data": {"en.txt": "1"}, "rows": ["en 2"], "backbone": {}})
    check_unchanged(tmp_path, {"en.txt": "1"}, ["en 2"], {})
    with pytest.raises(ConfigError, match="en.txt has changed since the run was started: it would not be the same run"):
        check_unchanged(tmp_path, {"en.txt": "3"}, ["en 4"], {})


def test_a_base_in_the_home_folder_can_be_fine_tuned(pretrain, train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        code, said = pretrain("model.max_position_embeddings=128", "output='~/elsewhere'", run="run")
    assert code == 0, said
    base = tmp_path / "elsewhere"
    done = train(f"backbone.model_name={base}", "trainer.max_steps=1", "phase=joint", run="tuned")
    assert done.code == 0, done.text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpus.path=/nowhere/corpus", "corpus.path=/nowhere/corpus: no such folder"),
        ("model.hidden_sise=3", "did you mean hidden_size?"),
        ("model.vocab_size=20", "model.vocab_size is 20"),
        ("trainer=ddp", "pretrain works on one device"),
        ("trainer.num_nodes=2", "pretrain works on one device"),
        ("optim.lr=nan", "optim.lr is nan, must be a finite number"),
    ],
)
def test_bad_values_are_told(pretrain, override, said):
    code, text = pretrain(override, run="run")
    assert code == 1
    assert said in text
    assert "Traceback" not in text


def test_a_folder_without_text_is_told(pretrain, tmp_path):
    (tmp_path / "empty").mkdir()
    code, text = pretrain(f"corpus.path={tmp_path / 'empty'}", run="run")
    assert code == 1
    assert "no <domain>.txt" in text


def test_a_text_called_as_the_chats_are_is_told(pretrain, corpus, micro, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    (tmp_path / "texts" / "letters.txt").rename(tmp_path / "texts" / "chats.txt")
    code, text = pretrain(f"corpus.path={tmp_path / 'texts'}", f"corpus.chats_path={micro.train}", run="run")
    assert code == 1
    assert "corpus.chats_path gives the domain 'chats' too" in text


def test_a_missing_corpus_path_is_told(restored, capsys):
    from lmoe.cli.pretrain import main

    assert main(["logger=none"]) == 1
    assert "corpus.path is required" in capsys.readouterr().err
