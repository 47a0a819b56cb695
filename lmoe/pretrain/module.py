"""The LightningModule of `lmoe pretrain`: every parameter trains, every token is predicted."""

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lmoe.backbones.label_losses import LabelLosses
from lmoe.config.optim import OptimConfig
from lmoe.metrics.language import DomainLoss
from lmoe.ops.labels import IGNORE
from lmoe.training.lr_schedule import LrShape, lr_factor
from lmoe.training.optimizers import set_learning_rates
from lmoe.training.step import StepRecord


class PretrainModule(LightningModule):
    """Next-token training of a whole model.

    Args:
        model: a causal language model of Transformers, in float32.
        optim: AdamW and its schedule.
        max_steps: length of the schedule in optimizer steps.
        domains: names of the validation domains.
        val_batches: held-out windows.
        compile_model: run the training forward through torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimConfig,
        max_steps: int,
        domains: list[str],
        val_batches: Iterable[dict[str, Tensor]],
        *,
        compile_model: bool,
    ) -> None:
        super().__init__()
        self.model, self.optim, self.max_steps = model, optim, max_steps
        self.domains, self.val_batches = domains, val_batches
        self._compiled_forward = torch.compile(model.forward) if compile_model else None
        self._label_losses = LabelLosses(model)
        self.step_record = StepRecord()

    def on_train_start(self) -> None:
        """A resumed run that was made longer has another schedule than the one its learning rates came from."""
        set_learning_rates(self.trainer)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        labels = batch["labels"]
        if self._compiled_forward is None:
            losses = self._label_losses({"input_ids": batch["input_ids"]}, labels)
            loss = losses.sum() / (labels != IGNORE).sum()
        else:  # compiled code makes the logits of all tokens
            logits = self._compiled_forward(input_ids=batch["input_ids"], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        self.step_record = StepRecord()  # of the last micro-batch, whose loss stands for the step
        self.step_record.window.add({"train/loss": loss})
        return loss

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """{"loss": nats per token, "<domain>/loss": …} on the held-out windows."""
        metric = DomainLoss(self.domains).to(self.device)
        self.model.eval()
        with self.trainer.precision_plugin.forward_context():
            for batch in self.val_batches:
                batch = self.transfer_batch_to_device(batch, self.device, 0)
                losses = self._label_losses({"input_ids": batch["input_ids"]}, batch["labels"])
                metric.update(losses, batch["labels"] != IGNORE, batch["domain"][:, None])
        self.model.train()
        return metric.compute()

    def configure_optimizers(self):
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        rest = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": decay, "weight_decay": self.optim.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        beta1, beta2 = self.optim.betas
        optimizer = torch.optim.AdamW(groups, lr=self.optim.lr, betas=(beta1, beta2), eps=self.optim.eps)

        shape = LrShape(
            schedule=self.optim.schedule, min_ratio=self.optim.min_lr_ratio, decay_share=self.optim.decay_share
        )

        def factor(step: int) -> float:
            return lr_factor(step, warmup=self.optim.warmup_steps, total=self.max_steps, shape=shape)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
