"""Compute what the reference of a preference objective says of all rows, once, before a phase trains on them."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator

from lightning.pytorch import Callback, Trainer
from safetensors import SafetensorError

from lmoe.data.datamodule import TrainingData
from lmoe.files.places import cache_folder
from lmoe.injection.batch_info import batch_info
from lmoe.injection.record import injected
from lmoe.objectives.known_answers import FILE_VERSION, KnownAnswers, answer_key
from lmoe.objectives.objective import Batch
from lmoe.objectives.preference import PreferenceObjective
from lmoe.training.module import AdapterModule
from lmoe.training.ranks import any_rank


class KnownReference(Callback):
    """With task.precompute_reference: at the start of a run and of a phase; NOTE after the switch to a phase, and
    before anything is measured or learnt. Logs nothing.

    Args:
        say: told how many rows were computed, or found.
        check: called after each batch; may raise to break off.
    """

    def __init__(self, say: Callable[[str], None], check: Callable[[], None]) -> None:
        self.say, self.check = say, check

    def on_train_start(self, trainer: Trainer, pl_module: AdapterModule) -> None:
        self._know(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: AdapterModule, batch: Batch, batch_idx: int) -> None:
        self._know(trainer, pl_module)

    def _know(self, trainer: Trainer, module: AdapterModule) -> None:
        objective = module.objective
        if not isinstance(objective, PreferenceObjective) or not objective.task.precompute_reference:
            return
        if objective.known is not None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TrainingData)
        key = self._key(trainer, module, data)
        file = (
            cache_folder(data.sets[data.set_now].config.cache_dir) / f"reference-{key[:32]}.v{FILE_VERSION}.safetensors"
        )
        known = KnownAnswers.read(file, key)
        missing = any_rank(trainer, known is None)
        if known is not None and not missing:
            self.say(f"reference: log-probabilities of {len(known.keys):,} rows found in {file.parent}")
        else:
            known = self._computed(trainer, module, data)
            self.say(f"reference: log-probabilities of {len(known.keys):,} rows computed")
            if trainer.is_global_zero:
                try:
                    known.write(file, key)
                except (OSError, SafetensorError) as error:
                    warnings.warn(f"they are not kept for other runs: {file} cannot be written ({error})", stacklevel=2)
        objective.known = known

    def _computed(self, trainer: Trainer, module: AdapterModule, data: TrainingData) -> KnownAnswers:
        """Every process computes all rows: a sharded model needs them all for each forward."""
        objective = module.objective
        assert isinstance(objective, PreferenceObjective)
        with trainer.precision_plugin.forward_context():
            return objective.learn_known(module.model, self._batches(trainer, module, data))

    def _batches(self, trainer: Trainer, module: AdapterModule, data: TrainingData) -> Iterator[Batch]:
        record = injected(module.model)
        for batch in data.every_row():
            moved = module.transfer_batch_to_device(batch, module.device, 0)
            with batch_info(record, moved, module.domains):
                yield moved
            if trainer.world_size == 1:  # of several processes all stop after the same step instead
                self.check()

    def _key(self, trainer: Trainer, module: AdapterModule, data: TrainingData) -> str:
        """SHA-256 of all that the log-probabilities depend on."""
        objective, samples = module.objective, data.sets[data.set_now]
        assert isinstance(objective, PreferenceObjective)
        rows = samples.prepared.train_rows
        assert rows is not None
        record = injected(module.model)
        parts = {
            "base": record.fingerprint,  # which is the same for weights of several types
            "types": sorted({str(parameter.dtype) for parameter in module.model.parameters()}),
            "adapters": objective.reference_digest,
            "injection": repr((record.injection, record.moe)) if objective.reference_digest else "",
            "rows": [[answer_key(row) for row in part] for part in (rows, samples.prepared.val)],
            "seconds": [part.seconds.tolist() for part in (rows, samples.prepared.val)],
            "precision": str(trainer.precision),
            "device": module.device.type,
            "attention": str(module.model.config._attn_implementation),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
