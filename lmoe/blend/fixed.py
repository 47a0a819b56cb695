"""What a blend with fixed weights can be turned into: the weights of the model, an adapter, a merged model."""

from abc import ABC, abstractmethod
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.answer_end import write_answer_end
from lmoe.blend.calls import ModelGate
from lmoe.blend.export import Export, Method, export_peft
from lmoe.blend.fold import Fold, Folded, Keep
from lmoe.blend.stack import BlendStack
from lmoe.errors import BlendError
from lmoe.files.write import empty_folder


class FixedBlend(ABC):
    """That part of a blend; see `Blend`, which makes what is declared here."""

    model: PreTrainedModel
    _stack: BlendStack
    _gate: ModelGate
    _folded: Folded | None = None

    @abstractmethod
    def _ready(self, *names: str) -> None:
        """Refuse what a closed or folded blend cannot do."""

    @abstractmethod
    def _fixed(self, what: str) -> dict[str, float]:
        """The weights of the model, where there are any."""

    @property
    def is_folded(self) -> bool:
        """Whether the blend is in the weights now."""
        return self._folded is not None

    def fold(self, keep: Keep = "copy") -> Fold:
        """Add the blend to the weights: from now on a token costs what it costs the base.

        Args:
            keep: copy: the originals stay in memory for `unfold`; reread: they are read again from the base's files.

        Raises:
            BlendError: weights by row or by token, a quantised or shared weight, files that differ, or folded already.
        """
        with self._gate.changing():
            self._ready()
            if self._stack.settings.own is not None:
                raise BlendError(
                    "cannot fold inside using(), silenced() or watched(): the weights of the model are folded"
                )
            blended = self._stack.blended(self._fixed("fold"))
            self._stack.detach()
            try:
                folded = Folded(self.model, blended, keep)
            except BaseException:
                self._stack.attach()
                raise
            self._folded = folded
            return folded.report

    def unfold(self) -> None:
        """The base's weights as they were, bit by bit, and the experts beside them again.

        Raises:
            BlendError: not folded, or (keep=reread) the base's files are gone or have changed.
        """
        with self._gate.changing():
            if self._folded is None:
                raise BlendError("the blend is not folded")
            self._folded.unfold()
            self._folded = None
            self._stack.attach()

    def export(self, folder: str | Path, method: Method = "cat", rank: int | None = None) -> Export:
        """Write the blend as it is now as one PEFT adapter.

        Args:
            folder: made if missing; must be empty.
            method: cat: all ranks side by side, exact; svd: the nearest adapter of a rank, with its error by site.
            rank: of svd.

        Raises:
            BlendError: no fixed weights, all 0, a rank that cannot be, or something in the way.
            CheckpointError: the folder cannot be written.
        """
        self._ready()
        blended, name = self._stack.blended(self._fixed("export")), str(self.model.name_or_path)
        return export_peft(self.model, blended, folder, method=method, rank=rank, base_model=name)

    def save_merged(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write base and blend as one Hugging Face model; the blend stays as it is.

        Raises:
            BlendError: as `fold`, or something in the way.
        """
        target = empty_folder(folder, BlendError)
        with self._gate.changing():
            folded_here = self._folded is None
            if folded_here:
                self.fold()
            try:
                self.model.save_pretrained(target)
            finally:
                if folded_here:
                    self.unfold()
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
            write_answer_end(self.model, tokenizer, target)
        return target
