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
COMPUTING = ("trainer.device_ids", "trainer.gradient_checkpointing", "moe.backend")
PLACES = ("backbone.model_name", "backbone.gguf_file")
PLACES_OF_ROWS = re.compile(r"(phase\.phases\.[^.]+\.)?data\.(path|val_path|sources\.[^.]+\.(path|revision))")
"""Safe where the command means them: when the run ends, which GPUs compute and how, which changes rounding alone, and
where the backbone and the rows are (also those of a phase, and of one of several sources), whose contents are compared
with those of the start (run/provenance.py)."""
DEVICES = "trainer.devices"
BATCH_SIZE = "batch_size"
PER_STEP = (
    f"data.{BATCH_SIZE}",
    f"corpus.{BATCH_SIZE}",
    "trainer.accumulate_grad_batches",
    DEVICES,
    "trainer.num_nodes",
)
"""These may change together where a step takes the same samples as before; so may the batch size of a phase that has
one of its own."""
STRATEGY = "trainer.strategy"
Changes = Mapping[str, tuple[Any, Any]]
"""By key: the new value and the old one."""


def refused(
    changes: Changes, values: Mapping[str, Any], *, meant: Collection[str], watched: bool, recorded: bool
) -> dict[str, str]:
    """Why each key that may not change may not, by key.

    Args:
        changes: of this command.
        values: the saved values of PER_STEP by key, as far as the run has them, and of `batch_sizes_of_phases`.
        meant: keys of changes that the command names, themselves or their section; others come from an experiment.
        recorded: whether the run has a record of its contents.
        watched: whether validations decide something: when a phase begins, or when the run ends.
    """
    reasons = {}
    for key, (new, old) in changes.items():
        if key == VALIDATIONS and watched:
            reasons[key] = "a plateau or a callback looks at the validations, so it cannot change on resume"
            continue
        if key == STRATEGY and Strategy.device_map in (new, old):
            reasons[key] = (
                "device_map is one process for all devices, others one for each: a step would take other rows"
            )
            continue
        safe = SAFE + (ENDS + COMPUTING + PLACES * recorded) * (key in meant)
        if any(key == name or key.startswith(f"{name}.") for name in safe):
            continue
        if recorded and key in meant and PLACES_OF_ROWS.fullmatch(key):
            continue
        if key == LENGTH and isinstance(new, int) and new > old:
            continue
        if key == LENGTH:
            reasons[key] = f"a run can only be made longer than its {old} steps"
        elif (key not in PER_STEP and key not in values) or not isinstance(new, int):
            reasons[key] = "it cannot change on resume"
        elif (reason := _other_samples(key, changes, values)) is not None:
            reasons[key] = reason
    return reasons


def batch_sizes_of_phases(phases: Mapping[str, Any]) -> dict[str, int]:
    """Batch sizes that phases have of their own, by key.

    Args:
        phases: the section `phase.phases` of a saved config.
    """
    sizes = {f"phase.phases.{name}.data.{BATCH_SIZE}": phase.data.get(BATCH_SIZE) for name, phase in phases.items()}
    return {key: size for key, size in sizes.items() if isinstance(size, int)}


def _other_samples(key: str, changes: Changes, values: Mapping[str, Any]) -> str | None:
    """Why steps would take other samples where a key of `values` changes, beside all other changes; None: they take the
    same, each phase by its own batch size."""
    now = dict(values) | {name: new for name, (new, _) in changes.items() if name in values and isinstance(new, int)}
    shared = [name for name in values if not name.endswith(f".{BATCH_SIZE}")]
    for size in (name for name in values if name not in shared):
        factors = [size, *shared]
        before = math.prod(values[name] for name in factors)
        after = math.prod(now[name] for name in factors)
        if key in factors and before != after:
            step = f"a step of phase {size.split('.')[2]}" if size.startswith("phase.") else "a step"
            return (
                f"{step} would take {after} samples instead of {before}: change {', '.join(factors)} so that their "
                "product stays"
            )
    return None
