"""Which rows a run validated on: the data section of its config.yaml."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lmoe.backbones.load import load_tokenizer
from lmoe.config.backbone import BackboneConfig
from lmoe.config.data import DataConfig
from lmoe.config.problems import size_problems
from lmoe.config.read import read_section
from lmoe.data.chats.template_settings import variables_of, with_settings
from lmoe.data.chats.template_source import read_template
from lmoe.errors import BackboneError, DataError
from lmoe.files.adapter_files import ADAPTER_DIR
from lmoe.files.run_folder import CONFIG_FILE
from lmoe.files.small_file import Reader
from lmoe.files.wording import shown


def run_folder(adapter: Path) -> Path | None:
    """The run directory that an adapter folder lies in, or None for an adapter on its own."""
    run = adapter.parent
    return run if adapter.name == ADAPTER_DIR and (run / CONFIG_FILE).exists() else None


def run_template(
    file: str | None, config: DataConfig, tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig
) -> tuple[str | None, dict[str, Any]]:
    """The file and the settings of the template by which a run's rows are rendered again; None: the tokenizer's own.

    Args:
        file: in place of the run's template, which takes those of the run's settings that it reads.
        config: data section of the run.
        tokenizer: of its adapter.
        backbone: that it rests on.

    Raises:
        DataError: the file cannot be read.
    """
    file = file or older_template(config, tokenizer, backbone)
    source = tokenizer.chat_template if file is None else read_template(file)
    read = variables_of(source) if isinstance(source, str) else frozenset()
    return file, {name: value for name, value in config.template_kwargs.items() if name in read}


def older_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase, backbone: BackboneConfig) -> str | None:
    """data.chat_template of a run whose adapter does not have it, because an older lmoe has saved the base's own there;
    None: the adapter's tokenizer has the template of the run.

    Args:
        config: data section of the run.
        tokenizer: of its adapter.
        backbone: that it rests on.
    """
    file = config.chat_template
    try:
        if file is None or with_settings(read_template(file), config.template_kwargs) == tokenizer.chat_template:
            return None
        base = load_tokenizer(backbone)
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
    reader = Reader(cure="put back the file that the run has written, or move adapter/ out of the run")
    saved = reader.yaml(file)
    config, reading = read_section(DataConfig, {} if saved.get("data") is None else saved["data"], prefix="data")
    seed = saved.get("seed", 0)
    problems = reading.problems + ([] if type(seed) is int else [f"seed is {shown(seed)}, must be a whole number"])
    if problems := problems + size_problems(config, "data"):
        raise reader.refusal(file, f"its data section cannot be read: {'; '.join(problems)}")
    return config, seed
