"""Put a saved adapter into a model in memory."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from lmoe.adapter.answer_end import answers_end
from lmoe.adapter.folder import read_adapter_config
from lmoe.adapter.load import inject_stored
from lmoe.adapter.place import adapter_folder, local_checkpoint
from lmoe.adapter.stored_base import check_base, stored_fingerprints
from lmoe.backbones.fingerprint import base_fingerprint
from lmoe.backbones.load import QUANTISED, precision_of, tokenizer_in
from lmoe.injection.apply import refuse_taken, undone_on_error
from lmoe.injection.plan import InjectionPlan


def attach(
    model: nn.Module, path: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> InjectionPlan:
    """Put a saved adapter into a model in memory, in place: to generate with it, or to train it on.

    The backbone is frozen, except that what a phase has trained of it is overwritten with the adapter's; adapters and
    routers are trainable, and the model stays in training or evaluation mode. Where the adapter brings a tokenizer,
    model.generate stops where training ended a turn.

    Args:
        model: the base that the adapter was trained on, in any floating-point type; of a quantised one only names and
            sizes can be compared, unless the adapter was trained on one quantised so.
        path: a run directory, an adapter directory, or the name of an adapter on the hub.
        trust_remote_code: run Python that comes with the adapter's tokenizer.
        revision: branch, tag or commit of an adapter on the hub; None: main.

    Returns:
        The plan that was applied; print it for a table.

    Raises:
        CheckpointError: no adapter there, a torn file, or a base that does not fit; the model is as it was.
        BackboneError: a tokenizer that cannot be loaded, or needs Python; the model is as it was.
        InjectionError: the model carries experts or a blend already.
    """
    refuse_taken(model)
    folder = adapter_folder(local_checkpoint(path, revision, trust_remote_code=trust_remote_code))
    config = read_adapter_config(folder)
    stored = config.base_model
    if precision_of(model) not in QUANTISED or precision_of(model) == stored["precision"]:
        found = base_fingerprint(model)
        check_base(f"{folder}: the adapter was", stored["name"], stored_fingerprints(stored), found)
    tokenizer = tokenizer_in(folder, trust_remote_code=trust_remote_code)
    with undone_on_error(model):
        done = inject_stored(model, folder, config, "this model")
    if tokenizer is not None and isinstance(model, PreTrainedModel):
        answers_end(model, tokenizer)
    return done
