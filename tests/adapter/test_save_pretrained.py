"""save_pretrained of a model with experts, and what transformers.Trainer saves of it, come back whole."""

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lmoe
from lmoe.adapter.save_pretrained import PACKED
from lmoe.errors import BlendError, CheckpointError, InjectionError
from tests.peft_experts import write_peft
from tests.tiny_models import randomise, tiny_model, tokens

STRATEGIES = [
    ("qwen3", "mixture_lora"),
    ("qwen3", "dense_lora"),
    ("qwen3", "moe_expert_lora"),
    ("qwen3_moe", "native_moe_expert_lora"),
    ("mixtral", "native_moe_expert_lora"),
]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def injected_model(family: str = "qwen3", strategy: str = "mixture_lora", **changes):
    model = tiny_model(family, **changes)
    lmoe.inject(model, injection={"strategy": strategy})
    randomise(model)
    return model


def loaded(folder: Path, tokenizer):
    """The model in a folder that holds no tokenizer yet."""
    tokenizer.save_pretrained(folder)
    return lmoe.load(folder)[0]


@pytest.mark.parametrize(("family", "strategy"), STRATEGIES)
def test_the_base_comes_back_by_from_pretrained_and_the_whole_by_load(family, strategy, trained, tmp_path, recwarn):
    model = injected_model(family, strategy)
    model.save_pretrained(tmp_path / "whole")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(logits(base), logits(tiny_model(family)))
    assert torch.equal(logits(loaded(tmp_path / "whole", trained.tokenizer)), logits(model))
    assert not torch.equal(logits(base), logits(model))
    lmoe.attach(base, tmp_path / "whole")
    assert torch.equal(logits(base), logits(model))


def test_a_folder_that_was_moved_is_loaded_with_the_base_in_it(trained, tmp_path):
    base = tiny_model(vocab_size=300)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lmoe.inject(model)
    model.save_pretrained(tmp_path / "whole")
    trained.tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "base").rename(tmp_path / "gone")
    assert torch.equal(logits(lmoe.load((tmp_path / "whole").rename(tmp_path / "moved"))[0]), logits(model))


def test_what_a_phase_has_trained_of_the_base_comes_back_too(trained, tmp_path):
    model = tiny_model()
    lmoe.inject(model, trained_base=["base_ffn"])
    randomise(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(loaded(tmp_path / "whole", trained.tokenizer)), logits(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself_and_not_the_model_that_it_was_made_of(copied, trained, tmp_path):
    model = injected_model()
    twin, before = copied(model), logits(model)
    assert torch.equal(logits(twin), before)
    randomise(model, seed=9)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits(loaded(tmp_path / "twin", trained.tokenizer)), before)


def test_a_model_that_nobody_holds_is_freed_at_once():
    model = tiny_model()
    lmoe.inject(model)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(InjectionError, match="keep it in a variable"):
        injected_model().save_pretrained("never")


def test_a_state_dict_that_was_gathered_is_what_is_written(trained, tmp_path):
    model = injected_model()
    state, before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits(model)
    randomise(model, seed=9)
    model.save_pretrained(tmp_path / "whole", state_dict=state)
    assert torch.equal(logits(loaded(tmp_path / "whole", trained.tokenizer)), before)


def test_the_weights_file_alone_fills_an_injected_model_by_load_state_dict(tmp_path):
    model, other = injected_model(), tiny_model(seed=1)
    model.save_pretrained(tmp_path / "whole")
    lmoe.inject(other)
    stored = load_file(tmp_path / "whole" / "model.safetensors")
    assert other.load_state_dict(stored) == ([], []) and PACKED in stored
    assert torch.equal(logits(other), logits(model))


def test_a_weights_file_of_another_injection_is_refused(tmp_path):
    model = injected_model()
    model.save_pretrained(tmp_path / "whole")
    other = injected_model(strategy="dense_lora")
    before = logits(other)
    with pytest.raises(CheckpointError, match="keys missing"):
        other.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    assert torch.equal(logits(other), before)


def test_a_blend_says_what_to_call_and_a_folded_or_closed_one_is_saved(tmp_path):
    base = tiny_model()
    with lmoe.Blend(base, {"x": write_peft(base, tmp_path / "x")}) as blend:
        with pytest.raises(BlendError, match=r"blend\.save_merged\(folder\)"):
            base.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        blend.fold()
        folded = logits(base)
        base.save_pretrained(tmp_path / "folded")
    base.save_pretrained(tmp_path / "closed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded")), folded)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "closed")), logits(tiny_model()))


class _Rows(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = tokens(1, 6, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "max_steps": 4,
    }
    return TrainingArguments(**(settings | changes))


def test_transformers_trainer_saves_resumes_and_takes_back_its_best_model(trained, tmp_path):
    def trainer(folder: Path, model, **changes) -> Trainer:
        return Trainer(model=model, args=arguments(folder, **changes), train_dataset=_Rows(), eval_dataset=_Rows())

    whole = trainer(tmp_path / "a", injected_model())
    whole.train()
    whole.save_model(str(tmp_path / "final"))
    assert torch.equal(logits(loaded(tmp_path / "final", trained.tokenizer)), logits(whole.model))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(base), logits(tiny_model()))

    resumed = trainer(tmp_path / "a", injected_model(seed=0))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model), logits(whole.model))

    best = trainer(
        tmp_path / "b",
        injected_model(),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first one, so that the last is not what is left
    )
    best.train()
    first = loaded(tmp_path / "b" / "checkpoint-2", trained.tokenizer)
    assert best.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-2")
    assert torch.equal(logits(best.model), logits(first))
    assert not torch.equal(logits(best.model), logits(whole.model))
