"""Which rows a run validated on: the data section of its config.yaml."""

import json
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import PreTrainedTokenizerBase
from yaml import YAMLError, safe_load

from lmoe.backbones.load import load_tokenizer
from lmoe.checkpoint.place import ADAPTER_DIR
from lmoe.data.template import read_template
from lmoe.errors import BackboneError, CheckpointError, DataError
from lmoe.schema.backbone import BackboneConfig
from lmoe.schema.data import DataConfig
from lmoe.schema.run_folder import CONFIG_FILE

UNREADABLE = (OSError, YAMLError, OmegaConfBaseException, AttributeError, TypeError, ValueError)


def run_folder(adapter: Path) -> Path | None:
    """The run directory that an adapter folder lies in, or None for an adapter on its own."""
    run = adapter.parent
    return run if adapter.name == ADAPTER_DIR and (run / CONFIG_FILE).exists() else None


def older_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, base_model: str) -> str | None:
    """data.chat_template of a run whose adapter does not have it, because an older lmoe has saved the base's own there;
    None: the adapter's tokenizer has the template of the run.

    Args:
        config: data section of the run.
        tokenizer: of its adapter.
        base_model: hub name or directory of the backbone.
    """
    file = config.chat_template
    try:
        if file is None or read_template(file) == tokenizer.chat_template:
            return None
        base = load_tokenizer(BackboneConfig(model_name=base_model))
    except (DataError, BackboneError):
        return None
    return file if base.chat_template == tokenizer.chat_template else None


def run_data(run: Path | None) -> tuple[DataConfig, int]:
    """The data section of a run, and the seed of its split; of an adapter on its own the defaults.

    Raises:
        CheckpointError: config.yaml cannot be read, or holds something else.
    """
    if run is None:
        return DataConfig(), 0
    file = run / CONFIG_FILE
    try:
        saved = safe_load(file.read_text(encoding="utf-8"))
        section, seed = saved.get("data") or {}, int(saved.get("seed", 0))
        if "${" in json.dumps(section):
            raise ValueError("an interpolation where plain values are expected")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), section))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file}: its data section cannot be read ({reason}); name rows with --data") from None
    assert isinstance(config, DataConfig)
    return config, seed
