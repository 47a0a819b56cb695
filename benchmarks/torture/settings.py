"""The runs that are tortured: all of the micro backbone, a second or two each, each with something else to lose."""

CHECKED = (
    "injection.lora_dropout=0.2",
    "data.batch_size=2",
    "trainer.accumulate_grad_batches=2",
    "phase.phases.experts.start=3",
    "trainer.val_every_n_steps=2",
)
"""Dropout, accumulation, a switch of phases in the middle, validations."""
EVERY, EVERY_SECOND = "checkpoint.every_n_steps=1", "checkpoint.every_n_steps=2"
BF16 = "trainer.precision=bf16-mixed"

RUNS: dict[str, tuple[str, ...]] = {
    "top-k": (EVERY,),
    "top-k bf16, three kept": (EVERY, BF16, "checkpoint.keep_last=3"),
    "selection biases": (EVERY, "moe=sigmoid", "moe.load_balance.bias_update_rate=0.05"),
    "selection biases bf16": (EVERY_SECOND, BF16, "moe=sigmoid", "moe.load_balance.bias_update_rate=0.05"),
    "packing": (EVERY, "data.packing=true"),
    "packing, two workers": (EVERY_SECOND, "data.packing=true", "data.num_workers=2"),
    "two workers": (EVERY, "data.num_workers=2", "checkpoint.keep_last=1"),
    "dials": (
        EVERY_SECOND,
        "moe.load_balance.scope=global_batch",
        "moe.router_noise=0.5",
        "moe.router_noise_end=0.1",
        "moe.temperature_end=2.0",
        "moe.expert_dropout=0.3",
        "optim.lora_plus_ratio=4",
        "phase.phases.experts.router_noise=true",
    ),
    "experts of a whole FFN": (EVERY, "injection=moe_expert_lora", "injection.lora_dropout=0.2"),
    "copies of the FFN": (
        EVERY_SECOND,
        "injection=moe_expert_lora",
        "injection.share_base=false",
        "phase.phases.experts.mode=add",
        "phase.phases.experts.trainable=[lora,base_ffn]",
    ),
    "relu": (EVERY, "moe=relu", "moe.l1_start=0.01"),
}
"""Overrides by name, beside CHECKED."""


def command_line(common: list[str], name: str, *more: str) -> list[str]:
    """Overrides of one of RUNS; of two for the same key the later one counts.

    Args:
        common: see tests.micro.Micro.overrides.
        name: one of RUNS.
        more: further ones.
    """
    chosen: dict[str, str] = {}
    for override in (*common, *CHECKED, *RUNS[name], *more):
        key = override.split("=", 1)[0]
        chosen.pop(key, None)
        chosen[key] = override
    return list(chosen.values())
