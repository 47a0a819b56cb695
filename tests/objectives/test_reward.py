"""A reward model: its loss beside a slow one, what trains when, and what a run and its adapter keep of the head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lmoe
from lmoe.adapter.folder import CONFIG_FILE, WEIGHTS_FILE
from lmoe.config.problems import without_effect
from lmoe.config.run import RunConfig
from lmoe.data.encoded import EncodedRow
from lmoe.errors import CheckpointError, TrainingError
from lmoe.estimate.estimate import estimate
from lmoe.generate.speaker import trained
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.ops.labels import IGNORE
from lmoe.rules.phases import has_reward_head, ordered_phases
from lmoe.rules.validate import run_problems
from lmoe.run.parts import Parts
from lmoe.vocabulary import PhaseMode, Role
from tests.composing import compose
from tests.metric_names import rows as metric_rows
from tests.micro import WORDS, Micro
from tests.resume.test_exactness import adapter, losses, stop_after
from tests.training.conftest import randomise

HEAD = "reward_head.weight"
RUN = (
    "task=reward",
    "injection.lora_dropout=0.2",
    "task.dropout=true",
    "phase.phases.experts.start=3",
    "data.batch_size=2",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_every_n_steps=3",
    "checkpoint.every_n_steps=1",
)
SFT_THEN_REWARD = (
    "phase=joint",
    "+phase.phases.rewards={start: '50%', trainable: [lora], mode: add, task: {name: reward}}",
)


def write_pairs(folder: Path, *, count: int, first: int) -> None:
    """Pairs of one domain, of very different lengths; the rejected answer is now the longer one, now the shorter."""
    folder.mkdir()
    lines = []
    for number in range(first, first + count):
        word, other = WORDS[number % len(WORDS)], WORDS[(number + 5) % len(WORDS)]
        row = {"prompt": f"say {word}" + " please" * (number % 3)}
        row |= {"chosen": " ".join([word] * (1 + number % 4)), "rejected": " ".join([other] * (1 + (2 * number) % 5))}
        lines.append(json.dumps(row) + "\n")
    (folder / "words.jsonl").write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[str, str]:
    """Overrides of a run that learns from pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train", count=12, first=0)
    write_pairs(folder / "val", count=5, first=100)
    return f"data.path={folder / 'train'}", f"data.val_path={folder / 'val'}"


@pytest.fixture
def build(micro: Micro, restored, pairs) -> Callable[..., Parts]:
    """Parts of a run, which a training step can be asked of."""

    def parts(*overrides: str) -> Parts:
        built = micro.parts(*pairs, "task=reward", "phase=joint", *overrides)
        built.module.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, world_size=1)
        return built

    return parts


@pytest.fixture(scope="module")
def finished(micro: Micro, pairs, tmp_path_factory) -> Path:
    """A finished run of two phases; beside it, in `broken`, one that failed in the second."""
    from lmoe.cli.train import main
    from tests.conftest import process_state

    base = tmp_path_factory.mktemp("reward")
    with process_state(base) as patch:
        patch.setattr("lmoe.run.finish.write_pictures", lambda summary, metrics, report: {})
        given = [*micro.changed(*pairs, *RUN)]
        assert main([*given, f"hydra.run.dir={base / 'run'}"]) == 0
        with pytest.MonkeyPatch.context() as failing:
            stop_after(failing, 5, TrainingError("the test pulled the plug"))
            assert main([*given, f"hydra.run.dir={base / 'broken'}"]) == 1
    return base / "run"


def dumb_reward(model, row: EncodedRow) -> Tensor:
    """() of one sequence without padding, from the hidden states of all layers that Transformers returns."""
    states = model(input_ids=row.input_ids.long()[None], output_hidden_states=True, use_cache=False).hidden_states
    return (states[-1][0, -1].double() * model.get_parameter(HEAD)[0].double()).sum()


def dumb_loss(model, row: EncodedRow) -> Tensor:
    """-log of the probability that the chosen answer is preferred."""
    chosen, rejected = (dumb_reward(model, answer).exp() for answer in row.pair())
    return -(chosen / (chosen + rejected)).log()


STRATEGIES = {
    "one LoRA, layers computed twice": ("injection=dense_lora", "trainer.gradient_checkpointing=true"),
    "one LoRA": ("injection=dense_lora",),
    "top_k": ("moe=top_k", "moe.router_z_loss_coef=0", "moe.load_balance.type=none"),
    "experts of one FFN": (
        "injection=moe_expert_lora",
        "moe=soft",
        "moe.router_z_loss_coef=0",
        "moe.load_balance.type=none",
    ),
}


@pytest.mark.parametrize("overrides", STRATEGIES.values(), ids=STRATEGIES)
def test_losses_and_gradients_are_those_of_one_unpadded_sequence_after_the_other(build, overrides):
    parts = build(*overrides)
    model, objective = parts.model, parts.module.objective
    randomise(model)
    rows = [parts.prepared.train[place] for place in (0, 3, 7, 10)]
    assert len({len(answer) for row in rows for answer in row.pair()}) > 3
    batch = objective.collate(pad_token_id=0, max_length=48, packed=False)(rows)
    found = objective.losses(model, batch)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert HEAD in names
    gradients = torch.autograd.grad(found.values.sum(), parameters)
    expected = [dumb_loss(model, row) for row in rows]
    torch.testing.assert_close(found.values.double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    for name, ours, theirs in zip(names, gradients, torch.autograd.grad(sum(expected), parameters), strict=True):
        assert ours.abs().max() > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    chosen, rejected = (torch.stack([dumb_reward(model, row.pair()[side]) for row in rows]).float() for side in (0, 1))
    for name, wanted in {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "reward_margin": chosen - rejected,
    }.items():
        torch.testing.assert_close(found.figures[name], wanted.detach(), rtol=1e-4, atol=1e-5)
    assert found.figures["reward_accuracy"].tolist() == (chosen > rejected).float().tolist()


def test_the_first_step_moves_the_head_and_the_experts_and_starts_near_ln_2(build):
    parts = build("seed=3")
    losses, module = [], parts.module
    compute = module.losses
    module.losses = lambda batch: losses.append(compute(batch)) or losses[-1]
    module.training_step(next(iter(parts.datamodule.train_dataloader())), 0).backward()
    del module.losses
    assert losses[0].values.mean().item() == pytest.approx(0.6931, abs=0.3)
    moved = {
        module.roles[n] for n, p in parts.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert moved >= {Role.reward_head, Role.lora}
    assert list(module.groups())[-1] == "reward_head"


def test_a_head_may_train_alone(build):
    parts = build("phase.phases.joint.trainable=[reward_head]")
    parts.module.training_step(next(iter(parts.datamodule.train_dataloader())), 0).backward()
    assert [name for name, p in parts.model.named_parameters() if p.grad is not None] == [HEAD]


def test_a_step_makes_the_logits_of_one_token_in_one_forward(build):
    parts = build()
    given = []
    parts.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: given.append(output.shape[:2])
    )
    parts.module.training_step(next(iter(parts.datamodule.train_dataloader())), 0)
    assert given == [(1, 1)]
    assert parts.module.objective.notes(parts.model) == []


def test_the_head_starts_by_the_seed_and_adapters_start_as_they_do_without_it(build, micro):
    first, again, other = (build(f"seed={seed}").model.get_parameter(HEAD) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and first.shape == (1, 32)
    with_head, without = build().model, micro.parts("phase=joint").model
    own = dict(without.named_parameters())
    assert dict(with_head.named_parameters()).keys() - own.keys() == {HEAD}
    assert all(torch.equal(own[name], p) for name, p in with_head.named_parameters() if name != HEAD)


def test_only_a_phase_that_learns_rewards_trains_the_head(micro, restored, pairs):
    parts = micro.parts(
        *SFT_THEN_REWARD, f"+phase.phases.rewards.data.{pairs[0][5:]}", f"+phase.phases.rewards.data.{pairs[1][5:]}"
    )
    module, head = parts.module, parts.model.get_parameter(HEAD)
    assert not head.requires_grad
    module.set_phase(1)
    assert head.requires_grad
    module.set_phase(0)
    assert not head.requires_grad


class TestARun:
    def test_that_stopped_and_goes_on_is_the_uninterrupted_one_bit_by_bit(self, finished, train, tmp_path):
        run = Path(shutil.copytree(finished.with_name("broken"), tmp_path / "run"))
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert f"model.{HEAD}" in saved["state_dict"] and saved["global_step"] == 4
        done = train(f"resume={run}", settings=False)
        assert done.code == 0, done.text
        assert adapter(run) == adapter(finished)
        assert losses(run) == losses(finished)

    def test_learns(self, finished):
        logged = [row for row in metric_rows(finished) if "val/loss" in row]
        assert logged[-1]["val/loss"] < logged[0]["val/loss"]
        for name in ("reward_margin", "reward_accuracy", "chosen_reward", "rejected_reward"):
            assert f"val/{name}" in logged[-1]
            assert any(f"train/{name}" in row for row in metric_rows(finished))
        assert any("grad_norm/reward_head" in row for row in metric_rows(finished))

    def test_leaves_an_adapter_of_version_3_with_the_trained_head(self, finished):
        config = json.loads((finished / "adapter" / CONFIG_FILE).read_text())
        assert (config["format_version"], config["reward_head"]) == (3, True)
        stored = load_file(finished / "adapter" / WEIGHTS_FILE)
        saved = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
        assert torch.equal(stored[HEAD], saved["state_dict"][f"model.{HEAD}"])

    def test_that_is_loaded_scores_validation_rows_as_its_last_validation_did(self, finished, micro, pairs, restored):
        model, _ = lmoe.load(finished)
        parts = micro.parts(*pairs, *RUN)
        texts = [answer.input_ids.long() for row in parts.prepared.val for answer in row.pair()]
        longest = max(map(len, texts))
        last = [row for row in metric_rows(finished) if "val/loss" in row][-1]
        for left in (True, False):
            ids, mask = torch.zeros(len(texts), longest, dtype=torch.long), torch.zeros(len(texts), longest)
            for row, text in enumerate(texts):
                place = slice(longest - len(text), None) if left else slice(0, len(text))
                ids[row, place], mask[row, place] = text, 1
            with torch.no_grad():
                scores = lmoe.reward(model, ids, mask)
            assert scores.shape == (len(texts),) and scores.dtype == torch.float32
            assert scores[0::2].mean().item() == pytest.approx(last["val/chosen_reward"], abs=1e-5)
            assert scores[1::2].mean().item() == pytest.approx(last["val/rejected_reward"], abs=1e-5)

    def test_proposes_no_answers_of_a_model_that_has_learnt_to_score_them(self, finished):
        page = (finished / "report" / "index.html").read_text()
        assert "lmoe evaluate --checkpoint" in page and "lmoe generate" not in page

    def test_says_that_it_scores_answers_where_it_is_asked_for_some(self, finished):
        with pytest.warns(
            UserWarning, match="is a reward model, which has learnt to score answers and not to give them"
        ):
            trained(str(finished), base_model=None, domain=None, device="cpu")

    def test_keeps_its_head_where_the_adapters_are_off(self, finished):
        model, _ = lmoe.load(finished)
        row = EncodedRow(torch.arange(5, 17, dtype=torch.int32), torch.ones(12, dtype=torch.bool), 0)
        ids = row.input_ids.long()[None]
        with torch.no_grad(), adapters_off(model):
            off, dumb = lmoe.reward(model, ids, torch.ones_like(ids)), dumb_reward(model, row)
        with torch.no_grad():
            on = lmoe.reward(model, ids, torch.ones_like(ids))
        torch.testing.assert_close(off[0].double(), dumb, rtol=1e-5, atol=1e-6)
        assert not torch.equal(on, off)


@pytest.mark.parametrize("router", ["moe=sequence", "moe=prompt_hash"])
def test_a_router_that_decides_by_the_prompt_is_told_it_as_in_training(build, router):
    parts = build(router)
    model, objective = parts.model.eval(), parts.module.objective
    randomise(model)
    batch = objective.collate(pad_token_id=0, max_length=48, packed=False)(
        [parts.prepared.train[place] for place in (1, 6)]
    )
    with torch.no_grad():
        with batch_info(injected(model), batch, parts.prepared.domains):
            figures = objective.losses(model, batch).figures
        scores = lmoe.reward(
            model, batch["input_ids"], batch["attention_mask"], prompt_mask=(batch["labels"] != IGNORE).cumsum(1) == 0
        )
        without = lmoe.reward(model, batch["input_ids"], batch["attention_mask"])
    assert torch.equal(scores, torch.cat([figures["chosen_reward"], figures["rejected_reward"]]))
    assert not torch.equal(scores, without)


class TestOneRunBehindAnother:
    def test_a_run_of_answers_goes_on_as_a_reward_model_with_a_new_head(self, build, finished_run):
        parts = build(f"injection.experts_from={finished_run}", "seed=5")
        stored = load_file(finished_run / "adapter" / WEIGHTS_FILE)
        own = dict(parts.model.named_parameters())
        assert HEAD not in stored and own[HEAD].requires_grad and own[HEAD].abs().max() > 0
        path = "model.layers.0.mlp.up_proj"
        assert torch.equal(own[f"{path}.router.weight"], stored[f"{path}.router.weight"])

    def test_a_reward_model_goes_on_with_its_head(self, build, finished):
        parts = build(f"injection.experts_from={finished}", "injection.lora_dropout=0.2")
        assert torch.equal(parts.model.get_parameter(HEAD), load_file(finished / "adapter" / WEIGHTS_FILE)[HEAD])

    def test_the_head_trains_beside_experts_that_are_kept(self, build, finished):
        parts = build(f"injection.experts_from={finished}", "injection.num_experts=5", "injection.lora_dropout=0.2")
        head = parts.model.get_parameter(HEAD)
        assert torch.equal(head, load_file(finished / "adapter" / WEIGHTS_FILE)[HEAD]) and head.requires_grad
        assert injected(parts.model).kept_experts == 4

    def test_a_reward_model_cannot_go_on_without_a_use_for_its_head(self, micro, restored, finished):
        with pytest.raises(CheckpointError, match="is a reward model, and no phase of this run learns by its head"):
            micro.parts("phase=joint", f"injection.experts_from={finished}", "injection.lora_dropout=0.2")


class TestRules:
    def config(self, *overrides: str) -> RunConfig:
        return compose("train", RunConfig, ["moe=top_k", *overrides])

    def test_the_head_trains_in_phases_that_learn_rewards_and_in_no_other(self):
        config = self.config("phase=joint", "trainer.max_steps=10", *SFT_THEN_REWARD[1:])
        assert run_problems(config) == [] and has_reward_head(config)
        config.phase.phases["rewards"].start = "0"
        config.phase.phases["joint"].start = "5"
        config.phase.phases["rewards"].mode = PhaseMode.replace
        config.phase.phases["joint"].mode = PhaseMode.add  # which the head of the phase before is not added to
        rewards, joint = (phase.trainable for _, _, phase in ordered_phases(config))
        assert rewards == [Role.lora, Role.reward_head] and joint == [Role.lora, Role.router, Role.attn_lora]

    def test_it_may_be_named_in_such_a_phase_alone(self):
        named = "phase.phases.joint.trainable=[lora,reward_head]"
        assert run_problems(self.config("task=reward", "phase=joint", named)) == []
        assert (
            run_problems(self.config("task=reward", "phase=joint", "phase.phases.joint.trainable=[reward_head]")) == []
        )
        problems = run_problems(self.config("phase=joint", named))
        assert problems == [
            "phase.phases.joint.trainable names reward_head, and the phase learns task sft, which has no use for one; "
            "leave it out, or set phase.phases.joint.task.name=reward"
        ]

    def test_its_optimizer_settings_need_a_phase_that_learns_rewards(self):
        assert run_problems(self.config("task=reward", "+optim.roles.reward_head.lr=1e-4")) == []
        problems = run_problems(self.config("+optim.roles.reward_head.lr=1e-4"))
        assert problems == [without_effect("optim.roles.reward_head", "where no phase has task.name=reward")]

    def test_settings_of_other_objectives_are_refused(self):
        problems = run_problems(self.config("task=reward", "task.beta=0.1", "task.reference=start"))
        assert [problem.split()[0] for problem in problems] == ["task.beta", "task.reference"]


def test_an_estimate_counts_the_head_and_no_logits(micro, pairs, restored):
    rewards = estimate(micro.config(*pairs, "task=reward", "phase=joint"))
    orpo = estimate(micro.config(*pairs, "task=orpo", "phase=joint"))
    assert rewards.memory.logits == 0 < orpo.memory.logits
    assert rewards.memory.adapters > orpo.memory.adapters
    assert rewards.memory.gradients - orpo.memory.gradients == pytest.approx(32 * 4 / 1e6)
    assert rewards.cost.flops_per_token() < orpo.cost.flops_per_token()
