"""Where a run stands in its data: a pure function of the optimizer steps done.

So a checkpoint that was written in the middle of an accumulation window starts the window anew, and one that several
processes wrote goes on in one, or the other way round, as long as a step takes the same samples.
"""

from typing import Any


def stand_at_step(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Put the progress of Lightning's loops and of the loader to the end of the checkpoint's last step.

    Args:
        checkpoint: as loaded; changed in place.
        micro_batches: of one optimizer step, on one rank, in the run that goes on.
    """
    done = checkpoint["global_step"] * micro_batches
    loop = checkpoint["loops"]["fit_loop"]
    progress = loop["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        # What Lightning itself leaves when it saves at the end of a batch, whose completion it then counts on restart.
        progress[part] = dict.fromkeys(progress[part], done) | {"completed": done - 1}
    progress["is_last_batch"] = False
    for part in ("total", "current"):  # the whole run is one epoch, which has begun
        loop["epoch_progress"][part] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loop["state_dict"]["combined_loader"] = [{"yielded": done}]
