"""Losses of preferences beside those of TRL, on one model and batch: their values, and the gradient of every weight.

OURS and THEIRS map the name of an objective to a function (model, reference_model, pairs) -> loss. TRL tokenises, pads
and reads the pairs with its own trainers, ours are the objectives of a run. Where TRL defines something else, a test
of its own says what.
"""

import copy
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

import lmoe
from lmoe.backbones.weight_files import base_parameter_name
from lmoe.config.run import TaskConfig
from lmoe.data.encoded import EncodedRow
from lmoe.objectives.objective import Batch, objective_of
from lmoe.objectives.preference import Answers
from lmoe.ops.preference_losses import preference_loss
from lmoe.vocabulary import PreferenceLoss, TaskName
from tests.public_packages import importable
from tests.reference.dumb_preferences import answer_log_probabilities, mean, total
from tests.tiny_models import VOCAB, tiny_model

BETA, SMOOTHING = 0.5, 0.2
SIMPO_BETA, SIMPO_GAMMA = 2.0, 0.7
ODDS_RATIO_WEIGHT = 0.3
GOOD_WEIGHT, BAD_WEIGHT = 1.33, 0.8
PAD, END = 0, 2
WORDS = ["<pad>", "<s>", "</s>", *(f"w{word}" for word in range(3, VOCAB))]


class Pair(NamedTuple):
    """Token ids of a prompt and two answers, which close with the end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


Objective = Callable[[PreTrainedModel, PreTrainedModel, list[Pair]], Tensor]

PAIRS = [
    Pair([5, 6, 7, 8], [9, 10, END], [11, END]),
    Pair([20, 21], [22, END], [23, 24, 25, 26, END]),
    Pair([30, 31, 32], [33, 34, 35, 36, END], [37, 38, 39, END]),
]
SHORT_PROMPTS = [  # ORPO is the same in TRL where no token of a prompt has one before it and chosen answers are as long
    Pair([5], [9, 10, END], [11, END]),
    Pair([20], [22, 21, END], [23, 24, 25, 26, END]),
]


# Ours: the objectives; what follows first is read by the slow reference


def reward(model: nn.Module, reference: nn.Module, prompt: list[int], answer: list[int], read=total) -> Tensor:
    """log p - log p_ref of an answer, or of one of its tokens with read=mean."""
    with torch.no_grad():
        before = read(answer_log_probabilities(reference, prompt, answer))
    return read(answer_log_probabilities(model, prompt, answer)) - before


def margins(model: nn.Module, reference: nn.Module, pairs: list[Pair], read=total) -> Tensor:
    """(B,) how much more the chosen answers have gained."""
    gained = [
        reward(model, reference, pair.prompt, pair.chosen, read)
        - reward(model, reference, pair.prompt, pair.rejected, read)
        for pair in pairs
    ]
    return torch.stack(gained)


def mean_of_token(model: nn.Module, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """(B,) twice, mean log p of a token of the chosen and of the rejected answers."""
    chosen = [mean(answer_log_probabilities(model, pair.prompt, pair.chosen)) for pair in pairs]
    rejected = [mean(answer_log_probabilities(model, pair.prompt, pair.rejected)) for pair in pairs]
    return torch.stack(chosen), torch.stack(rejected)


def answers(pairs: list[Pair]) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """Prompts, answers, and which are good: first the chosen, then the rejected."""
    prompts = [pair.prompt for pair in pairs] * 2
    return prompts, [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)], good_of(pairs)


def good_of(pairs: list[Pair]) -> Tensor:
    """(2B,) bool."""
    return torch.tensor([True] * len(pairs) + [False] * len(pairs))


def mismatched_rewards(model: nn.Module, reference: nn.Module, pairs: list[Pair]) -> Tensor:
    """(2B,) of each prompt with the answer before its own, the first with the last."""
    prompts, given, _ = answers(pairs)
    others = [given[-1], *given[:-1]]
    return torch.stack([reward(model, reference, p, answer) for p, answer in zip(prompts, others, strict=True)])


def sequence(pair: Pair, answer: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens of prompt and answer, and which of them are learnt."""
    labels = [False] * len(pair.prompt) + [True] * len(answer)
    return torch.tensor(pair.prompt + answer, dtype=torch.int32), torch.tensor(labels)


def as_rows(pairs: list[Pair]) -> list[EncodedRow]:
    """Pairs, as training reads them."""
    found = []
    for pair in pairs:
        (chosen, learnt), (rejected, other) = sequence(pair, pair.chosen), sequence(pair, pair.rejected)
        row = EncodedRow(torch.cat([chosen, rejected]), torch.cat([learnt, other]), 0, second=len(chosen))
        found.append(row)
    return found


def as_answers(pairs: list[Pair]) -> list[EncodedRow]:
    """The chosen answers, and then the rejected ones."""
    chosen = [EncodedRow(*sequence(pair, pair.chosen), 0) for pair in pairs]
    return chosen + [EncodedRow(*sequence(pair, pair.rejected), 0, good=False) for pair in pairs]


def whole(task: TaskConfig, rows_of: Callable[[list[Pair]], list[EncodedRow]] = as_rows) -> Objective:
    """The objective of a run, whose reference is another model."""

    def loss(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
        objective = objective_of(task)

        def of_reference(_model: PreTrainedModel, batch: Batch) -> Answers:
            with torch.no_grad():
                return objective.answers(reference, batch)

        objective.reference_answers = of_reference
        batch = objective.collate(pad_token_id=PAD, max_length=64, packed=False)(rows_of(pairs))
        found = objective.losses(model, batch)
        assert found.counted.all()
        return found.values.mean()

    return loss


def our_reward_model(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    def score(ids: list[int]) -> Tensor:
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])[0]

    gained = [score(pair.prompt + pair.chosen) - score(pair.prompt + pair.rejected) for pair in pairs]
    return preference_loss(torch.stack(gained), beta=1.0).mean()


OURS: dict[str, Objective] = {
    "dpo": whole(TaskConfig(name=TaskName.dpo, beta=BETA)),
    "smoothed dpo": whole(TaskConfig(name=TaskName.dpo, beta=BETA, label_smoothing=SMOOTHING)),
    "hinge": whole(TaskConfig(name=TaskName.dpo, beta=BETA, loss_type=PreferenceLoss.hinge)),
    "ipo": whole(TaskConfig(name=TaskName.dpo, beta=BETA, loss_type=PreferenceLoss.ipo)),
    "simpo": whole(TaskConfig(name=TaskName.simpo, beta=SIMPO_BETA, gamma=SIMPO_GAMMA)),
    "orpo": whole(TaskConfig(name=TaskName.orpo, beta=ODDS_RATIO_WEIGHT)),
    "kto": whole(TaskConfig(name=TaskName.kto, beta=BETA, good_weight=GOOD_WEIGHT, bad_weight=BAD_WEIGHT), as_answers),
    "reward model": our_reward_model,
}


# Theirs: one batch through the trainer that a user of TRL would take


def tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, so that TRL makes the token ids of the pairs again."""
    words = Tokenizer(models.WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def rows(pairs: list[Pair]) -> Dataset:
    """The pairs as text."""

    def text(tokens: list[int]) -> str:
        return " ".join(WORDS[token] for token in tokens)

    return Dataset.from_list(
        [
            {"prompt": text(pair.prompt) + " ", "chosen": text(pair.chosen), "rejected": text(pair.rejected)}
            for pair in pairs
        ]
    )


def loss_of_trl(trainer_class, config_class, pairs: list[Pair], settings: dict, **models_of_trainer) -> Tensor:
    """The loss of all pairs in one batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = config_class(
            output_dir=os.environ["TRL_OUTPUT"],
            per_device_train_batch_size=2 * len(pairs),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = trainer_class(
            args=arguments, train_dataset=rows(pairs), processing_class=tokenizer(), **models_of_trainer
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        return trainer.compute_loss(trainer.model, batch)


def trl_dpo(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair], **settings) -> Tensor:
    from trl import DPOConfig, DPOTrainer

    return loss_of_trl(DPOTrainer, DPOConfig, pairs, {"beta": BETA, **settings}, model=model, ref_model=reference)


def trl_hinge(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    return trl_dpo(model, reference, pairs, loss_type=["hinge"])


def trl_ipo(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    return trl_dpo(model, reference, pairs, loss_type=["ipo"])


def trl_smoothed_dpo(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    """Its loss type aot, which sorts a batch: of one pair it is the smoothed loss, which its sigmoid is not."""
    settings = {"loss_type": ["aot"], "label_smoothing": SMOOTHING}
    losses = [trl_dpo(copy.copy(model), copy.deepcopy(reference), [pair], **settings) for pair in pairs]
    return torch.stack(losses).mean()


def trl_simpo(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": SIMPO_BETA, "simpo_gamma": SIMPO_GAMMA}
    return loss_of_trl(CPOTrainer, CPOConfig, pairs, settings, model=model)


def trl_orpo(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return loss_of_trl(ORPOTrainer, ORPOConfig, pairs, {"beta": ODDS_RATIO_WEIGHT}, model=model)


def trl_kto(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    from trl import KTOConfig, KTOTrainer

    settings = {"beta": BETA, "desirable_weight": GOOD_WEIGHT, "undesirable_weight": BAD_WEIGHT}
    return loss_of_trl(KTOTrainer, KTOConfig, pairs, settings, model=model, ref_model=reference)


def trl_reward_model(model: PreTrainedModel, reference: PreTrainedModel, pairs: list[Pair]) -> Tensor:
    from trl import RewardConfig, RewardTrainer

    return loss_of_trl(RewardTrainer, RewardConfig, pairs, {}, model=model)


THEIRS: dict[str, Objective] = {
    "dpo": trl_dpo,
    "smoothed dpo": trl_smoothed_dpo,
    "hinge": trl_hinge,
    "ipo": trl_ipo,
    "simpo": trl_simpo,
    "orpo": trl_orpo,
    "kto": trl_kto,
    "reward model": trl_reward_model,
}


# The comparison


@pytest.fixture(scope="module", autouse=True)
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TRL can be imported, and leaves nothing behind."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        patch.setenv("TRL_OUTPUT", str(tmp_path_factory.mktemp("output")))
        patch.syspath_prepend(importable("trl", tmp_path_factory.mktemp("trl")))
        yield
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
            del sys.modules[name]


def policy_and_reference(name: str = "dpo") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model that has moved away from its frozen reference."""
    reference = tiny_model("llama")
    if name == "reward model":
        config = copy.deepcopy(reference.config)
        config.num_labels = 1
        reference = LlamaForSequenceClassification(config).eval()
    model = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return model, reference.requires_grad_(False)


def gradients(loss: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    """Of every weight, by name."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(name: str, pairs: list[Pair], model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Both losses and their gradients."""
    ours = OURS[name](model, reference, pairs)
    of_ours = gradients(ours, model)
    for_trl, reference_for_trl = copy.deepcopy(model), copy.deepcopy(reference)
    theirs = THEIRS[name](for_trl, reference_for_trl, pairs)
    of_theirs = gradients(theirs, for_trl)
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5)
    assert len(of_ours) == len(of_theirs) > 10 and max(float(values.abs().max()) for values in of_ours.values()) > 0.01
    for weight, values in of_ours.items():
        torch.testing.assert_close(values, of_theirs[weight], rtol=1e-5, atol=1e-5, msg=lambda m, w=weight: f"{w}: {m}")


def test_both_sides_name_the_same_objectives():
    assert list(OURS) == list(THEIRS)


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("orpo", "kto")])
def test_the_loss_and_the_gradient_of_every_weight_are_those_of_trl(name):
    assert_same(name, PAIRS, *policy_and_reference(name))


def test_orpo_is_that_of_trl_where_prompts_have_one_token_and_chosen_answers_one_length():
    assert_same("orpo", SHORT_PROMPTS, *policy_and_reference())


def test_orpo_of_trl_learns_the_prompts_too_and_weighs_each_token_of_the_batch_alike():
    """Its cross-entropy is the mean over prompts and chosen answers of the batch, ours the mean of answers' means."""
    model, reference = policy_and_reference()
    ours = OURS["orpo"](model, reference, PAIRS)
    theirs = THEIRS["orpo"](copy.deepcopy(model), reference, PAIRS)
    tokens = [
        log_p
        for pair in PAIRS
        for log_p in answer_log_probabilities(model, pair.prompt[:1], pair.prompt[1:] + pair.chosen)
    ]
    chosen, _ = mean_of_token(model, PAIRS)
    difference = -mean(tokens) + chosen.mean()
    assert abs(float(difference.detach())) > 0.01
    torch.testing.assert_close(theirs - ours.float(), difference.float(), rtol=1e-5, atol=1e-5)


def test_ipo_of_trl_is_not_that_of_whole_answers():
    model, reference = policy_and_reference()
    whole = preference_loss(margins(model, reference, PAIRS), beta=BETA, loss_type=PreferenceLoss.ipo).mean()
    theirs = THEIRS["ipo"](copy.deepcopy(model), copy.deepcopy(reference), PAIRS)
    assert abs(float(whole.detach()) - float(theirs.detach())) > 0.05


def test_the_sigmoid_loss_of_trl_knows_no_label_smoothing():
    model, reference = policy_and_reference()
    plain, smoothed = (
        trl_dpo(copy.deepcopy(model), copy.deepcopy(reference), PAIRS, **settings)
        for settings in ({}, {"label_smoothing": SMOOTHING})
    )
    assert torch.equal(plain, smoothed)


def test_kto_is_that_of_trl_with_a_baseline_and_with_one_that_is_cut_at_0():
    """A model and its reference that change places turn the sign of the mean round."""
    model, reference = policy_and_reference()
    means = []
    for policy, base in ((model, reference), (reference, model)):
        policy.requires_grad_(True)
        base.requires_grad_(False)
        means.append(float(mismatched_rewards(policy, base, PAIRS).mean().detach()))
        assert_same("kto", PAIRS, policy, base)
    assert min(means) < -0.1 and max(means) > 0.1


def test_a_reward_model_with_adapters_at_their_start_is_that_of_trl():
    """Of whose weights it then has the gradients as well, though a run would train the adapters."""
    model, reference = policy_and_reference("reward model")
    ours = LlamaForCausalLM(model.config).eval()
    ours.model.load_state_dict(model.model.state_dict())
    lmoe.inject(ours, {"strategy": "dense_lora"}, reward_head=True)
    ours.requires_grad_(True)
    with torch.no_grad():
        ours.get_parameter("reward_head.weight").copy_(model.score.weight)
    pairs = []
    for prompt, chosen, rejected in PAIRS:
        ids = torch.tensor(prompt + chosen + prompt + rejected, dtype=torch.int32)
        second = len(prompt + chosen)
        is_label = torch.ones(len(ids), dtype=torch.bool)
        is_label[: len(prompt)] = is_label[second : second + len(prompt)] = False
        pairs.append(EncodedRow(ids, is_label, 0, second=second))
    objective = objective_of(TaskConfig(name=TaskName.reward))
    losses = objective.losses(ours, objective.collate(pad_token_id=PAD, max_length=64, packed=False)(pairs))
    weights = {base_parameter_name(name): p for name, p in ours.named_parameters()}
    weights["score.weight"] = weights.pop("reward_head.weight")
    theirs = THEIRS["reward model"](model, reference, PAIRS)
    torch.testing.assert_close(losses.values.mean(), theirs, rtol=1e-5, atol=1e-5)
    of_theirs = gradients(theirs, model)
    of_ours = torch.autograd.grad(losses.values.mean(), [weights[name] for name in of_theirs])
    for found, (name, expected) in zip(of_ours, of_theirs.items(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda m, w=name: f"{w}: {m}")
