"""From a run or an adapter folder back to a model that generates."""

from dataclasses import replace
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lmoe.adapter.answer_end import answers_end
from lmoe.adapter.average import merge_without_config
from lmoe.adapter.folder import CONFIG_FILE, AdapterConfig, check_sizes, load_adapter, read_adapter_config
from lmoe.adapter.inject import inject
from lmoe.adapter.place import adapter_folder, local_checkpoint, lost_config
from lmoe.adapter.stored_base import BESIDE, GGUF_FILE
from lmoe.backbones.load import load_model, load_tokenizer, tokenizer_in
from lmoe.config.backbone import BackboneConfig
from lmoe.errors import BackboneError, CheckpointError, ConfigError, InjectionError, keys_renamed
from lmoe.injection.apply import plan
from lmoe.injection.plan import InjectionPlan
from lmoe.rules.trust import would_run
from lmoe.vocabulary import QUANTISED, BackbonePrecision


def load(
    path: str | Path,
    *,
    base_model: str | None = None,
    average_without_config: bool = True,
    trust_remote_code: bool = False,
    precision: BackbonePrecision | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Rebuild backbone, routers and experts exactly.

    Args:
        path: a run directory, an adapter directory, or the name of an adapter on the hub, of which lmoe's own files and
            the tokenizer are downloaded. A folder of that name goes before the hub.
        base_model: hub name or directory of the backbone; None: the one that save_pretrained has written beside the
            adapter, or else the one that the adapter names.
        average_without_config: for an adapter whose lmoe_config.json is lost: merge the average of its experts into
            base_model, which must be given, with a warning, because it is another model than the one that was trained.
            False: refuse it.
        trust_remote_code: run Python that comes with the base, or with the adapter's tokenizer. What the adapter's own
            config says of it never counts.
        precision: of the base; None: that in which it was trained. What was trained over a quantised base has that one.
        revision: branch, tag or commit of an adapter on the hub; None: main.

    Returns:
        The model in evaluation mode, ready for model.generate, which stops where training ended a turn, and its
        tokenizer, with the chat template that the run was trained with.

    Raises:
        CheckpointError: no adapter there, a torn file, a base that does not fit, or one that asks to run Python.
        ConfigError: a revision of a local folder, or a precision that there is none of.
        BackboneError: the base cannot be loaded.
    """
    if precision is not None and precision not in tuple(BackbonePrecision):
        raise ConfigError(f"`precision={precision}`: allowed: {', '.join(BackbonePrecision)}")
    path = local_checkpoint(path, revision, trust_remote_code=trust_remote_code)
    lost = lost_config(path)
    if lost is not None and base_model is not None and average_without_config:
        return _average(lost, base_model, trust_remote_code)
    folder = adapter_folder(path)
    config = read_adapter_config(folder)
    backbone, is_beside = stored_backbone(folder, config, base_model, trust_remote_code=trust_remote_code)
    if precision is not None and backbone.precision not in QUANTISED:
        backbone.precision = BackbonePrecision(precision)
    model = load_base(backbone, None if base_model or is_beside else folder / CONFIG_FILE)
    inject_stored(model, folder, config, f"the base {backbone.full_name}")
    named, stored = backbone, config.base_model
    if is_beside and stored["name"]:
        named = replace(backbone, model_name=stored["name"], gguf_file=stored.get(GGUF_FILE))
    with keys_renamed(as_argument(base_model) if base_model else {}):
        tokenizer = tokenizer_in(folder, trust_remote_code=trust_remote_code) or load_tokenizer(named)
    answers_end(model, tokenizer)
    return model.eval(), tokenizer


def stored_backbone(
    folder: Path, config: AdapterConfig, base_model: str | None, *, trust_remote_code: bool
) -> tuple[BackboneConfig, bool]:
    """The base of an adapter, and whether it lies in the adapter's own folder; nothing is loaded.

    Args:
        base_model: as in `load`.

    Raises:
        CheckpointError: the adapter does not name it, or it would run Python that nobody has trusted in this call.
    """
    stored = config.base_model
    is_beside = base_model is None and bool(stored.get(BESIDE)) and _holds_model(folder)
    if not (base_model or is_beside or stored["name"]):
        raise CheckpointError(
            f"{folder}: the adapter does not name its base; give `base_model` (a hub name or directory)"
        )
    backbone = BackboneConfig(
        model_name=base_model or (str(folder) if is_beside else stored["name"]),
        gguf_file=None if base_model or is_beside else stored.get(GGUF_FILE),
        revision=None if base_model or is_beside else stored.get("revision"),
        precision=BackbonePrecision(stored["precision"]),
        trust_remote_code=trust_remote_code,
    )
    if stored.get("trust_remote_code") and base_model is None and not trust_remote_code:
        refuse_code(backbone.model_name, folder)
    return backbone, is_beside


def load_base(backbone: BackboneConfig, named_by: Path | None) -> PreTrainedModel:
    """The base of an adapter.

    Args:
        named_by: the file that names it; None: the user does.

    Raises:
        BackboneError: it cannot be loaded; says which file names it.
    """
    if named_by is None:
        with keys_renamed(as_argument(backbone.full_name)):
            return load_model(backbone)
    try:
        with keys_renamed({"backbone.model_name=": ""}):
            return load_model(backbone)
    except BackboneError as error:
        raise BackboneError(f"{error} (the base that {named_by} names; `base_model` names another)") from None


def as_argument(base_model: str) -> dict[str, str]:
    """How errors name a base that the caller has given, and that is loaded as the backbone of a config."""
    key = "backbone.model_name"
    return {f"{key}={base_model}": f"`base_model={base_model}`", key: "`base_model`"}


def inject_stored(model: nn.Module, folder: Path, config: AdapterConfig, named: str) -> InjectionPlan:
    """Inject as an adapter's config says, and load its tensors.

    Args:
        named: the base, for messages.

    Raises:
        CheckpointError: a torn file, or a base that does not fit.
    """
    try:
        check_sizes(folder, plan(model, config.injection, config.moe))
        done = inject(
            model,
            config.injection,
            config.moe,
            trained_base=config.trained_base,
            reward_head=config.reward_head,
        )
    except (ConfigError, InjectionError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} does not fit {named}: {error}") from None
    load_adapter(model, folder, config)
    return done


def _holds_model(folder: Path) -> bool:
    """Whether the base that save_pretrained wrote is still there."""
    return (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))


def refuse_code(model_name: str, folder: Path) -> None:
    """Refuse an adapter whose base or tokenizer would run Python that nobody has trusted in this call.

    Raises:
        CheckpointError: the base or the adapter's tokenizer names Python that was run in training.
    """
    if (code := would_run(model_name, folder)) is not None:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: base_model.trust_remote_code is true: {code} would run. Where you trust it, say "
            "so: `trust_remote_code=True`"
        )


def _average(folder: Path, base_model: str, trust: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    backbone = BackboneConfig(model_name=base_model, trust_remote_code=trust)
    model = load_base(backbone, None)
    merge_without_config(model, folder)
    tokenizer = tokenizer_in(folder, trust_remote_code=trust) or load_tokenizer(backbone)
    answers_end(model, tokenizer)
    return model.eval(), tokenizer
