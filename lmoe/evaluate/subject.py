"""The model under evaluation, and how rows are put before it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.answer_end import answers_end
from lmoe.adapter.folder import read_adapter_config
from lmoe.adapter.load import load
from lmoe.adapter.place import adapter_folder, local_checkpoint, run_folder
from lmoe.adapter.run_data import run_data
from lmoe.adapter.stored_base import GGUF_FILE
from lmoe.backbones.load import context_length, load_model, load_tokenizer, tokenizer_in
from lmoe.backbones.placement import placed
from lmoe.config.backbone import BackboneConfig
from lmoe.config.data import DataConfig
from lmoe.data.chats.template_source import take_template
from lmoe.data.encoded import EncodedRow, EncodedRows
from lmoe.errors import ConfigError
from lmoe.evaluate.run_template import run_template
from lmoe.objectives.objective import Batch, Objective
from lmoe.objectives.sft import SupervisedFineTuning
from lmoe.vocabulary import BackbonePrecision


def batches_by_length(
    rows: EncodedRows, batch_size: int, collate: Callable[[Sequence[EncodedRow]], Batch]
) -> Iterator[tuple[list[int], Batch]]:
    """All rows once, longest last, as training validates them.

    Args:
        batch_size: rows in a batch.
        collate: makes a batch of rows.

    Yields:
        Indices of the rows in a batch, and the batch.
    """
    order = rows.lengths.argsort(stable=True).tolist()
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        yield chosen, collate([rows[index] for index in chosen])


@dataclass(slots=True, frozen=True, kw_only=True)
class Subject:
    """A model, and how its rows are laid into batches.

    Args:
        model: on the device where it computes.
        tokenizer: with a padding token.
        batch_size: rows in a batch.
        max_length: longest row in tokens, within the backbone's context.
        objective: whose losses are measured.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int
    objective: Objective = field(default_factory=SupervisedFineTuning)

    def batches(self, rows: EncodedRows) -> Iterator[tuple[list[int], Batch]]:
        """Indices of the rows of each batch, and the batch of the objective on the model's device; rows of like length
        together."""
        pad = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        collate = self.objective.collate(pad_token_id=pad, max_length=self.max_length, packed=False)
        for indices, batch in batches_by_length(rows, self.batch_size, collate):
            yield indices, {name: tensor.to(self.model.device) for name, tensor in batch.items()}


def subject_of(
    checkpoint: str | Path,
    *,
    base_model: str | None = None,
    trust_remote_code: bool = False,
    batch_size: int,
    max_length: int | None = None,
    chat_template: str | None = None,
    device: str | None = None,
    precision: BackbonePrecision | None = None,
) -> Subject:
    """A trained mixture, ready to be measured: rows, questions and answers by the template of its run.

    Args:
        checkpoint: run or adapter directory, or the name of an adapter on the hub.
        base_model: backbone to use instead of the one the adapter names.
        max_length: longest row in tokens; None: that of the run, within the context.
        chat_template: file in place of the run's template.
        device: as torch names it; None: a GPU where there is one.
        precision: of the base; None: that in which it was trained.

    Raises:
        LmoeError: a checkpoint that cannot be read, or a length beyond the context.
    """
    checkpoint = local_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    own, _ = run_data(run_folder(adapter_folder(checkpoint)))
    model, tokenizer = load(checkpoint, base_model=base_model, trust_remote_code=trust_remote_code, precision=precision)
    length = longest(max_length, own.max_length, model)
    backbone = BackboneConfig(model_name=str(model.name_or_path), trust_remote_code=trust_remote_code)
    take_template(tokenizer, *run_template(chat_template, own, tokenizer, backbone))
    answers_end(model, tokenizer)
    return Subject(model=placed(model, device), tokenizer=tokenizer, batch_size=batch_size, max_length=length)


def base_subject(backbone: BackboneConfig, data: DataConfig, *, batch_size: int, device: str | None = None) -> Subject:
    """The base of a run by itself, ready to be measured: the same losses as those of the run with its adapters off, as
    far as no phase has trained the base.

    Args:
        backbone: section of the run; its attention is the one that Transformers chooses, as that of `subject_of` is.
        data: section of the run, whose template and length count.
        device: as torch names it; None: a GPU where there is one.

    Raises:
        LmoeError: a base or a template that cannot be read.
    """
    backbone = replace(backbone, attn_implementation=None)
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    take_template(tokenizer, data.chat_template, data.template_kwargs)
    length = longest(None, data.max_length, model)
    return Subject(model=placed(model, device), tokenizer=tokenizer, batch_size=batch_size, max_length=length)


def row_tokenizer(checkpoint: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a trained mixture with the template of its run, as `subject_of` gives it, without the model.

    Raises:
        LmoeError: a checkpoint or a tokenizer that cannot be read.
    """
    folder = adapter_folder(checkpoint)
    own, _ = run_data(run_folder(folder))
    stored = read_adapter_config(folder).base_model
    backbone = BackboneConfig(
        model_name=stored["name"], gguf_file=stored.get(GGUF_FILE), trust_remote_code=trust_remote_code
    )
    tokenizer = tokenizer_in(folder, trust_remote_code=trust_remote_code) or load_tokenizer(backbone)
    take_template(tokenizer, *run_template(None, own, tokenizer, backbone))
    return tokenizer


def longest(asked: int | None, usual: int, model: PreTrainedModel) -> int:
    """Longest row in tokens.

    Args:
        asked: by the user.
        usual: otherwise, as far as the context reaches.

    Raises:
        ConfigError: asked for more than the context.
    """
    limit = context_length(model)
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError(f"`max_length={asked}` is beyond the backbone's context of {limit} tokens")
    return asked or min(usual, limit or usual)
