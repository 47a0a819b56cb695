"""Which keys of a run may change when it is resumed."""

import math
from collections.abc import Mapping
from typing import Any

from lmoe.schema.phase import start_step

SAFE = (
    "logger",
    "name",
    "resume",
    "dry_run",
    "checkpoint",
    "analysis",
    "trainer.val_every_n_steps",
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.max_time",
    "trainer.nonfinite",
    "trainer.strategy",
    "trainer.accelerator",
    "data.num_workers",
    "data.cache_dir",
    "output",
    "eval_sft",
)
"""Neither the weights nor the order of the data depends on these, but for the rounding of another device."""
PER_STEP = (
    "data.batch_size",
    "corpus.batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.devices",
    "trainer.num_nodes",
)
"""These may change together where a step takes the same samples as before."""
LENGTH = "trainer.max_steps"
Changes = Mapping[str, tuple[Any, Any]]
"""By key: the new value and the old one."""


def refused(changes: Changes, values: Mapping[str, Any]) -> dict[str, str]:
    """Why each key that may not change may not, by key.

    Args:
        changes: of this command.
        values: the saved values of PER_STEP by key, as far as the run has them.
    """
    reasons = {}
    before = math.prod(values.values())
    after = math.prod(changes[key][0] if key in changes else value for key, value in values.items())
    for key, (new, old) in changes.items():
        if key.startswith(SAFE):
            continue
        if key == LENGTH and isinstance(new, int) and new > old:
            continue
        if key == LENGTH:
            reasons[key] = f"a run can only be made longer than its {old} steps"
        elif key not in PER_STEP:
            reasons[key] = "it cannot change on resume"
        elif before != after:
            reasons[key] = (
                f"a step would take {after} samples instead of {before}: change {', '.join(values)} so that their "
                "product stays"
            )
    return reasons


def kept_steps(start: str, old_max_steps: int) -> str:
    """A start, or the end of an annealing, as the step that it was in the shorter run."""
    return str(start_step(start, old_max_steps)) if str(start).strip().endswith("%") else start
