"""Which keys of a run may change when it is resumed."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from lmoe.vocabulary import Strategy

LENGTH, VALIDATIONS = "trainer.max_steps", "trainer.val_every_n_steps"
SAFE = (
    "logger",
    "name",
    "resume",
    "callbacks_from",
    "dry_run",
    "checkpoint",
    "analysis",
    VALIDATIONS,
    "trainer.log_every_n_steps",
    "trainer.enable_progress_bar",
    "trainer.max_time",
    "trainer.nonfinite",
    "trainer.strategy",
    "trainer.accelerator",
    "trainer.compile",
    "data.num_workers",
    "data.num_proc",
    "data.cache_dir",
    "data.judge_path",
    "output",
    "eval_sft",
)
"""Neither the weights nor the order of the data depends on these, but for rounding and random numbers elsewhere."""
ENDS = ("callbacks", "trainer.stop_on_collapse")
PLACES = ("data.path", "data.val_path", "backbone.model_name", "backbone.gguf_file")
"""Safe where the command means them: when the run ends, and where the rows and the backbone are, whose contents are
compared with those of the start (run/provenance.py)."""
PLACE_OF_PHASE = re.compile(r"phase\.phases\.[^.]+\.data\.(path|val_path)")
"""The same of a phase with rows of its own."""
DEVICES = "trainer.devices"
PER_STEP = (
    "data.batch_size",
    "corpus.batch_size",
    "trainer.accumulate_grad_batches",
    DEVICES,
    "trainer.num_nodes",
)
"""These may change together where a step takes the same samples as before."""
STRATEGY = "trainer.strategy"
Changes = Mapping[str, tuple[Any, Any]]
"""By key: the new value and the old one."""


def refused(
    changes: Changes, values: Mapping[str, Any], *, meant: Collection[str], watched: bool, recorded: bool
) -> dict[str, str]:
    """Why each key that may not change may not, by key.

    Args:
        changes: of this command.
        values: the saved values of PER_STEP by key, as far as the run has them.
        meant: keys of changes that the command names, themselves or their section; others come from an experiment.
        recorded: whether the run has a record of its contents.
        watched: whether validations decide something: when a phase begins, or when the run ends.
    """
    reasons = {}
    before = math.prod(values.values())
    after = math.prod(changes[key][0] if key in changes else value for key, value in values.items())
    for key, (new, old) in changes.items():
        if key == VALIDATIONS and watched:
            reasons[key] = "a plateau or a callback looks at the validations, so it cannot change on resume"
            continue
        if key == STRATEGY and Strategy.device_map in (new, old):
            reasons[key] = (
                "device_map is one process for all devices, others one for each: a step would take other rows"
            )
            continue
        safe = SAFE + (ENDS + PLACES * recorded) * (key in meant)
        if any(key == name or key.startswith(f"{name}.") for name in safe):
            continue
        if recorded and key in meant and PLACE_OF_PHASE.fullmatch(key):
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
