"""Put the rows of a run into clusters once its model stands: rows of a stream, and those of a base that is sharded."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lmoe.backbones.mean_states import PROMPTS_AT_ONCE, states_in_batches
from lmoe.data.datamodule import TrainingData
from lmoe.injection.evaluating import evaluating
from lmoe.injection.record import injected
from lmoe.injection.tracing import adapters_off
from lmoe.rules.routers import target_count
from lmoe.run.clustered_rows import put_into_clusters
from lmoe.run.clusters import ReadStates
from lmoe.run.parts import Parts
from lmoe.training.module import AdapterModule
from lmoe.training.ranks import from_first_rank
from lmoe.training.sharded import whole_outside_layers


class FitClusters(Callback):
    """Before any batch is made. Every process reads all prompts, since a sharded base needs them all for each forward.

    Args:
        parts: of the run.
        run_dir: of the run.
        writes: whether this process writes for all of the run.
        say: told what is in the clusters.
        check: called after each batch of prompts; may raise to break off.
    """

    def __init__(
        self, parts: Parts, run_dir: Path, writes: bool, say: Callable[[str], None], check: Callable[[], None]
    ) -> None:
        self.parts, self.run_dir, self.writes, self.say, self.check = parts, run_dir, writes, say, check
        self._fitted = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, parts = trainer.datamodule, self.parts  # type: ignore[attr-defined]
        assert isinstance(data, TrainingData) and isinstance(pl_module, AdapterModule)
        record = injected(pl_module.model)
        bare = bare_states(pl_module.model, parts.config.data.micro_batch_tokens)

        def read(prompts: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
            for batch in bare(prompts):
                yield batch
                if trainer.world_size == 1 and not self._fitted:  # of several processes all stop after the same step
                    self.check()

        found = put_into_clusters(
            parts.config,
            data.prepared,
            record.base,
            read,
            parts.tokenizer,
            target_count(record.moe),
            self.run_dir,
            self.say,
            partial(from_first_rank, trainer),
        )
        self._fitted = True
        data.take(found.prepared)
        if self.writes:
            found.write(self.run_dir)
        for line in found.lines:
            self.say(line)


def bare_states(model: nn.Module, most_tokens: int) -> ReadStates:
    """What reads states of prompts as the bare base makes them, between the steps of a run too.

    Args:
        model: of a run, sharded or not.
        most_tokens: of prompts that are read in one forward.
    """

    def read(prompts: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
        with evaluating(model), adapters_off(model), whole_outside_layers(model):
            yield from states_in_batches(model, prompts, PROMPTS_AT_ONCE, most_tokens)

    return read
