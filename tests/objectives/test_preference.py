"""Preference objectives on whole models: their first step, values and gradients, dropout, and what the trace sees."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lmoe.data.encoded import EncodedRow, opening
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.objectives import kto
from lmoe.run.parts import Parts
from tests.preference_rows import labelled_of, pairs_of
from tests.training.conftest import randomise

LN2 = float(torch.tensor(2.0).log())
"""In float32."""
NO_AUXILIARY = ("moe.router_z_loss_coef=0", "moe.load_balance.type=none")
PLACES = (0, 3, 7, 12)
"""Rows of very different lengths."""
BY_MODEL = ("moe=sequence", "moe.router_scope=model")
EXACT = {
    "one LoRA": ("injection=dense_lora",),
    "top_k": ("moe=top_k",),
    "soft": ("moe=soft",),
    "sequence": ("moe=sequence",),
    "oracle": ("moe=oracle",),
    "model, on answers": (*BY_MODEL, "moe.prompt_experts=false"),
    "model, everywhere": (*BY_MODEL, "moe.prompt_experts=true"),
    "experts of one FFN by domain": ("injection=moe_expert_lora", "moe=oracle"),
    "experts of the backbone": ("injection=native_moe_expert_lora",),
}
SUMMED = {
    "experts of one FFN by top_k": ("injection=moe_expert_lora", "moe=top_k"),
    "experts of one FFN, soft": ("injection=moe_expert_lora", "moe=soft"),
    "copies of the FFN": ("injection=moe_expert_lora", "injection.share_base=false"),
    "experts of one FFN, model": ("injection=moe_expert_lora", *BY_MODEL, "moe.prompt_experts=false"),
}
"""Where y = sum_e w_e FFN(x) stands for FFN(x)."""


@pytest.fixture
def build(micro, restored) -> Callable[..., Parts]:
    """Parts of a run in one phase; `task` decides its rows."""

    def parts(task: str, *overrides: str) -> Parts:
        rows = labelled_of(micro) if task == "kto" else pairs_of(micro)
        native = "injection=native_moe_expert_lora" in overrides
        model = (f"backbone.model_name={micro.native}",) if native else ()
        built = micro.parts(*rows, "phase=joint", f"task={task}", *model, *overrides)
        built.module.trainer = SimpleNamespace(
            global_step=0,
            accumulate_grad_batches=1,
            world_size=1,
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
        )
        return built

    return parts


def first_losses(parts: Parts) -> Tensor:
    """Losses of the first training batch, as a training step computes them."""
    found, module = [], parts.module
    compute = module.losses
    module.losses = lambda batch: found.append(compute(batch)) or found[-1]
    module.training_step(next(iter(parts.datamodule.train_dataloader())), 0)
    del module.losses
    return found[0].values


def validation(parts: Parts) -> dict[str, float]:
    return parts.module.evaluate(parts.datamodule.val_dataloader()).compute()


def away_from_start(parts: Parts, seed: int = 3) -> None:
    """Adapters and routers with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if "lora_" in name or name.endswith("router.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


class TestTheFirstLoss:
    """A policy that is its reference has gained nothing: -log sigmoid(0)."""

    @pytest.mark.parametrize("overrides", EXACT.values(), ids=EXACT)
    def test_is_ln_2_to_the_last_bit_beside_the_base(self, build, overrides):
        parts = build("dpo", *overrides)
        assert first_losses(parts).tolist() == [LN2] * 4
        found = validation(parts)
        assert (found["loss"], found["reward_margin"], found["reward_accuracy"]) == (LN2, 0.0, 0.5)

    @pytest.mark.parametrize("overrides", (EXACT | SUMMED).values(), ids=EXACT | SUMMED)
    def test_is_ln_2_to_the_last_bit_beside_the_start(self, build, overrides):
        parts = build("dpo", *overrides, "task.reference=start")
        randomise(parts.model)
        parts.module.set_phase(0)
        assert first_losses(parts).tolist() == [LN2] * 4
        found = validation(parts)
        assert (found["loss"], found["reward_margin"]) == (LN2, 0.0)

    @pytest.mark.parametrize("overrides", SUMMED.values(), ids=SUMMED)
    def test_of_several_experts_of_one_ffn_is_ln_2_as_far_as_float32_adds_up(self, build, overrides):
        """The weights of the experts are multiplied in and summed before the last Linear, which rounds."""
        torch.testing.assert_close(first_losses(build("dpo", *overrides)), torch.full((4,), LN2), rtol=0, atol=1e-5)


def dumb_log_prob(model, row: EncodedRow) -> Tensor:
    """() log p of the labelled tokens of one sequence without padding, from the logits of all its tokens."""
    ids = row.input_ids.long()
    with injected(model).context.with_batch_info(expert_of_token=torch.tensor(row.domain)):  # read by an oracle alone
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
    table = logits.log_softmax(-1)
    places = [place for place in range(1, len(ids)) if row.is_label[place]]
    return sum((table[place - 1, ids[place]] for place in places), torch.zeros((), dtype=torch.float64))


def label_tokens(row: EncodedRow) -> int:
    return int(row.is_label[1:].sum())


def dumb_sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def dumb_pair_loss(name: str, policy, reference, row: EncodedRow, task) -> Tensor:
    """The loss of one pair, written as the papers have it."""
    chosen, rejected = row.pair()
    p, q = dumb_log_prob(policy, chosen), dumb_log_prob(policy, rejected)
    n, m, b = label_tokens(chosen), label_tokens(rejected), task.beta
    if name == "simpo":
        return -dumb_sigmoid(b / n * p - b / m * q - task.gamma).log()
    if name == "orpo":
        odds_p, odds_q = ((mean.exp() / (1 - mean.exp())) for mean in (p / n, q / m))
        return -p / n - b * dumb_sigmoid((odds_p / odds_q).log()).log()
    with torch.no_grad():
        r, s = dumb_log_prob(reference, chosen), dumb_log_prob(reference, rejected)
    if task.loss_type == "ipo":
        return ((p - r) / n - (q - s) / m - 1 / (2 * b)) ** 2
    h, e = (p - r) - (q - s), task.label_smoothing
    if task.loss_type == "hinge":
        return torch.clamp(1 - b * h, min=0)
    return -(1 - e) * dumb_sigmoid(b * h).log() - e * dumb_sigmoid(-b * h).log()


def dumb_mismatched(rows: list[EncodedRow]) -> list[EncodedRow]:
    """Each row's prompt with the answer to the prompt that came before it."""
    found = []
    for number, row in enumerate(rows):
        mine = opening(row)
        place = number - 1
        while rows[place].input_ids[: opening(rows[place])].tolist() == row.input_ids[:mine].tolist():
            place -= 1
        previous = rows[place]
        found.append(
            EncodedRow(
                torch.cat([row.input_ids[:mine], previous.input_ids[opening(previous) :]]),
                torch.cat([row.is_label[:mine], previous.is_label[opening(previous) :]]),
                row.domain,
            )
        )
    return found


def dumb_ratios(policy, reference, rows: list[EncodedRow]) -> Tensor:
    """(B,) log p - log p_ref of the labelled tokens of each row, without gradients."""
    with torch.no_grad():
        return torch.stack([dumb_log_prob(policy, row) - dumb_log_prob(reference, row) for row in rows])


def dumb_kto_losses(policy, reference, rows: list[EncodedRow], task) -> list[Tensor]:
    """z is the mean log ratio of the mismatched answers, at least 0."""
    mean = dumb_ratios(policy, reference, dumb_mismatched(rows)).mean()
    z = max(mean, torch.zeros((), dtype=torch.float64))
    found = []
    for row in rows:
        with torch.no_grad():
            at_start = dumb_log_prob(reference, row)
        reward = task.beta * (dumb_log_prob(policy, row) - at_start - z)
        if row.good:
            found.append(task.good_weight * (1 - dumb_sigmoid(reward)))
        else:
            found.append(task.bad_weight * (1 - dumb_sigmoid(-reward)))
    return found


OBJECTIVES = {
    "dpo": ("dpo",),
    "dpo, smoothed": ("dpo", "task.label_smoothing=0.2", "task.beta=0.5"),
    "dpo, hinge": ("dpo", "task.loss_type=hinge", "task.beta=0.02"),
    "dpo, ipo": ("dpo", "task.loss_type=ipo"),
    "dpo, start": ("dpo", "task.reference=start"),
    "orpo": ("orpo", "task.beta=0.7"),
    "simpo": ("simpo", "task.gamma=0.4"),
    "kto": ("kto", "task.good_weight=1.5", "task.bad_weight=0.5"),
    "kto, start": ("kto", "task.reference=start"),
}


@pytest.mark.parametrize("chosen", OBJECTIVES.values(), ids=OBJECTIVES)
def test_values_and_gradients_are_those_of_one_unpadded_sequence_after_the_other(build, chosen):
    name, *overrides = chosen
    parts = build(name, *overrides, *NO_AUXILIARY)
    model, module = parts.model, parts.module
    if "task.reference=start" in overrides:
        away_from_start(parts, seed=5)
        module.set_phase(0)
    reference = copy.deepcopy(model)  # at the start the adapters of the other ones are 0
    away_from_start(parts)
    rows = [parts.prepared.train[place] for place in PLACES]
    assert len({len(row) for row in rows}) > 2
    batch = module.objective.collate(pad_token_id=0, max_length=48, packed=False)(rows)
    module.window_totals = lambda step: (len(rows), int(batch["valid_mask"].sum()))
    module.training_step(batch, 0).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    logged = module.step_record.window.values()["train/loss"]
    model.zero_grad()
    task = module.objective.task
    if name == "kto":
        assert {row.good for row in rows} == {True, False}
        losses = dumb_kto_losses(model, reference, rows, task)
    else:
        losses = [dumb_pair_loss(name, model, reference, row, task) for row in rows]
    mean = sum(losses) / len(losses)
    mean.backward()
    assert logged == pytest.approx(mean.item(), rel=2e-5)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-4
    for parameter, gradient in expected.items():
        error = (found[parameter] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert error < 1e-3, parameter


def test_kto_measures_its_baseline_by_the_expert_of_the_prompt(build, monkeypatch):
    """To the end of an answer of another row, also where it reaches further than the row's own."""
    parts = build("kto", "moe=oracle")
    model, objective = parts.model, parts.module.objective
    reference = copy.deepcopy(model)
    away_from_start(parts)
    by_length = sorted(parts.prepared.train, key=len)
    short, long = (next(row for row in rows if row.domain) for rows in (by_length, by_length[::-1]))
    rows = [long, short]
    batch = objective.collate(pad_token_id=0, max_length=64, packed=False)(rows)
    assert (batch["mismatched_attention_mask"].bool() & ~batch["valid_mask"]).any()
    measured = []
    monkeypatch.setattr(kto, "kto_baseline", lambda rewards: measured.append(rewards) or rewards.mean())
    with batch_info(injected(model), batch, parts.prepared.domains):
        objective.baseline(model, batch)
    expected = dumb_ratios(model, reference, dumb_mismatched(rows))
    torch.testing.assert_close(measured[0].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", ["dpo", "orpo"])  # the z of kto is of its micro-batch
def test_the_gradient_of_several_micro_batches_is_that_of_one(gradients_of, task):
    """Each pair, or answer, of an optimizer step weighs the same, whatever micro-batch it comes in."""
    pairs = gradients_of(task, *NO_AUXILIARY, "data.batch_size=4")
    halves = gradients_of(task, *NO_AUXILIARY, "data.batch_size=2", "trainer.accumulate_grad_batches=2")
    for name in pairs.keys() - {"train/load_balancing_loss"}:
        gradient = pairs[name]
        torch.testing.assert_close(halves[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def gradients_of(build) -> Callable[..., dict[str, Tensor]]:
    """Gradients of the first optimizer step with what it logs, of adapters away from their start."""

    def gradients(task: str, *overrides: str) -> dict[str, Tensor]:
        parts = build(task, *overrides)
        away_from_start(parts)
        module, micro_batches = parts.module, parts.config.trainer.accumulate_grad_batches
        module.trainer.accumulate_grad_batches = micro_batches
        for index, batch in zip(range(micro_batches), parts.datamodule.train_dataloader(), strict=False):
            (module.training_step(batch, index) / micro_batches).backward()
        found = {n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None}
        return found | {n: torch.tensor(v) for n, v in module.step_record.window.values().items()}

    return gradients


@pytest.mark.parametrize("task", ["dpo", "kto"])
@pytest.mark.parametrize("overrides", [("task.reference=start",), BY_MODEL], ids=["start", "router of the model"])
def test_gradients_that_are_computed_with_recomputed_activations_are_the_same(gradients_of, task, overrides):
    """Dropout is off in training mode, in which alone activations are recomputed."""
    dropped = ("injection.lora_dropout=0.3", "trainer.gradient_checkpointing=true")
    kept, recomputed = gradients_of(task, *overrides), gradients_of(task, *overrides, dropped[1])
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


NOISY = ("injection.lora_dropout=0.3", "moe.router_noise=2", "moe.expert_dropout=0.3")


def training_losses(parts: Parts, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses of a batch twice, and the gradients behind the second ones."""
    module, found = parts.module, []
    compute = module.losses
    module.losses = lambda batch: found.append(compute(batch)) or found[-1]
    module.training_step(batch, 0)
    module.training_step(batch, 0).backward()
    del module.losses
    gradients = {n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None}
    parts.model.zero_grad()
    return found[0].values.detach(), found[1].values.detach(), gradients


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_neither_dropout_nor_noise_acts_on_a_policy_unless_the_task_says_so(build, micro, checkpointing, router):
    """The same losses and gradients as without any, also where activations are recomputed."""
    sft = f"+phase.phases.later={{start: 3, trainable: [lora], task: {{name: sft}}, data: {{path: {micro.train}}}}}"
    common = (f"moe={router}", f"trainer.gradient_checkpointing={str(checkpointing).lower()}", sft)
    plain, quiet = build("dpo", *common), build("dpo", *common, *NOISY)
    for parts in (plain, quiet):
        away_from_start(parts)
    batch = next(iter(plain.datamodule.train_dataloader()))
    first, again, gradients = training_losses(quiet, batch)
    assert torch.equal(first, again)
    wanted, _, expected = training_losses(plain, batch)
    torch.testing.assert_close(first, wanted)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", NOISY)
def test_dropout_and_noise_act_on_a_policy_where_the_task_says_so_and_never_on_its_reference(build, setting):
    parts = build("dpo", "task.dropout=true", "task.reference=start", setting)
    away_from_start(parts)
    parts.module.set_phase(0)
    batch, objective = next(iter(parts.datamodule.train_dataloader())), parts.module.objective
    first, again, _ = training_losses(parts, batch)
    assert not torch.equal(first, again)
    one, other = (objective.reference_answers(parts.model, batch).log_probs for _ in range(2))
    assert torch.equal(one, other)
    assert parts.model.training


def test_the_dropout_of_the_backbone_comes_back_in_a_phase_of_another_objective(micro, restored, monkeypatch):
    """Of modules, and of what modules hand to functions."""
    from lmoe.backbones.load import load_model

    def with_dropout(config, **settings):
        model = load_model(config, **settings)
        model.model.layers[1].self_attn.attention_dropout = 0.2
        return model

    monkeypatch.setattr("lmoe.run.base.load_model", with_dropout)
    sft = "phase.phases.experts.task={name: sft}", f"phase.phases.experts.data={{path: {micro.train}}}"
    phases = ("phase=router_warmup", "phase.phases.experts.start=3", *sft)
    parts = micro.parts(*pairs_of(micro), "task=dpo", "injection.lora_dropout=0.3", *phases)
    layer = parts.model.model.layers[1]

    def found() -> tuple[float, float]:
        return layer.mlp.gate_proj.lora_dropout.p, layer.self_attn.attention_dropout

    assert found() == (0.0, 0.0)
    parts.module.set_phase(1)
    assert found() == (0.3, 0.2)
    parts.module.set_phase(0)
    assert found() == (0.0, 0.0)


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_auxiliary_losses_and_routing_are_those_of_the_forward_of_the_policy_alone(build, task):
    """The trace holds what it holds after a forward without any reference."""
    parts = build(task, "task.reference=start", "moe=top_k")
    away_from_start(parts, seed=5)
    parts.module.set_phase(0)
    away_from_start(parts)
    batch = next(iter(parts.datamodule.train_dataloader()))
    record = injected(parts.model)
    with batch_info(record, batch, parts.prepared.domains):
        with record.trace.recording(batch["valid_mask"]):
            parts.module.objective.losses(parts.model, batch)
            found = {site: routing.probs.detach() for site, routing in record.trace.routing.items()}
        with record.trace.recording(batch["valid_mask"]):
            parts.module.objective.answers(parts.model, batch)
            expected = {site: routing.probs.detach() for site, routing in record.trace.routing.items()}
    assert found.keys() == expected.keys() == parts.plan.routers.keys()
    for site, probs in expected.items():
        assert torch.equal(found[site], probs)


@pytest.mark.parametrize("overrides", [("moe=sequence",), BY_MODEL], ids=["sites", "model"])
def test_a_router_of_prompts_decides_alike_for_both_answers_of_a_pair(build, overrides):
    parts = build("dpo", *overrides)
    away_from_start(parts)
    batch = next(iter(parts.datamodule.train_dataloader()))
    record = injected(parts.model)
    with batch_info(record, batch, parts.prepared.domains), record.trace.recording(batch["valid_mask"]):
        parts.module.objective.losses(parts.model, batch)
        routing = dict(record.trace.routing)
    pairs = len(batch["input_ids"]) // 2
    for decision in routing.values():
        logits = decision.router_logits[:, 0]
        torch.testing.assert_close(logits[:pairs], logits[pairs:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits[0], logits[1]), "else every prompt would get the same decision"


def test_in_mixed_precision_policy_and_reference_compute_with_their_own_weights(build):
    """Autocast keeps the weights that it has rounded, which change places in between."""
    parts = build("dpo", "task.reference=start")
    away_from_start(parts, seed=5)
    parts.module.set_phase(0)
    away_from_start(parts)
    batch, objective = next(iter(parts.datamodule.train_dataloader())), parts.module.objective

    def log_probs() -> list[Tensor]:
        of_both = objective.reference_answers(parts.model, batch), objective.answers(parts.model, batch)
        return [answers.log_probs.detach() for answers in of_both]

    expected = log_probs()
    with torch.autocast("cpu", torch.bfloat16):
        found = log_probs()
    assert (expected[0] - expected[1]).abs().max() > 5
    for rounded, exact in zip(found, expected, strict=True):  # rounding may flip a choice of experts
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=1.5)


def test_a_silenced_expert_is_silenced_in_the_policy_and_not_in_its_reference(build):
    parts = build("dpo", "task.reference=start", "moe=top_k")
    away_from_start(parts)
    parts.module.set_phase(0)
    record, objective = injected(parts.model), parts.module.objective
    batch = next(iter(parts.datamodule.val_dataloader()))
    whole = objective.reference_answers(parts.model, batch).log_probs
    with record.context.silence(dict.fromkeys(parts.plan.routers, 0)):
        assert torch.equal(objective.reference_answers(parts.model, batch).log_probs, whole)
        assert validation(parts)["loss"] != LN2


def test_with_the_adapters_off_the_reference_is_the_start_still(build):
    """So the validation before training tells how the base compares with what it is measured against."""
    parts = build("dpo", "task.reference=start", "moe=top_k")
    away_from_start(parts)
    parts.module.set_phase(0)
    assert validation(parts)["loss"] == LN2
    with adapters_off(parts.model):
        assert abs(validation(parts)["loss"] - LN2) > 1e-3
        assert injected(parts.model).context.off == 1
    assert validation(parts)["loss"] == LN2
