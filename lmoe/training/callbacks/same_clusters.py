"""Let every process of a run have the clusters of the first, which alone has put the rows into them. Logs nothing."""

from lightning.pytorch import Callback, LightningModule, Trainer

from lmoe.data.datamodule import TrainingData
from lmoe.training.ranks import from_first_rank


class SameClusters(Callback):
    """Before any batch is made, and after the processes have found one another."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TrainingData)
        rows, val = data.prepared.train_rows, data.prepared.val
        if rows is None or rows.clusters is None or val.clusters is None or trainer.world_size == 1:
            return
        train_clusters, val_clusters = from_first_rank(trainer, (rows.clusters, val.clusters))
        data.take(data.prepared.with_clusters(train_clusters, val_clusters))
