"""The day that a run's chat template reads: frozen when the run begins, so that its prompts stay the same."""

from dataclasses import replace
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmoe.config.run import RunConfig
from lmoe.data.chats.template import ChatTemplate
from lmoe.errors import ConfigError
from lmoe.files.run_folder import CONFIG_FILE
from lmoe.files.small_file import Reader
from lmoe.rules.template import is_day


def with_template_day(config: RunConfig, tokenizer: PreTrainedTokenizerBase, run_dir: Path | None) -> RunConfig:
    """The config with data.template_date where the chat template reads the date.

    Args:
        tokenizer: with the template of the run.
        run_dir: where another process of the run may have written its config; None: there is none.

    Raises:
        ConfigError: a day is given, and the template reads none.
    """
    day = config.data.template_date
    if not ChatTemplate.of(tokenizer).reads_clock:
        if day is not None:
            raise ConfigError(
                f"data.template_date={day} has no effect: the chat template does not ask for the date (strftime_now); "
                "leave it out"
            )
        return config
    day = day or _written_day(run_dir) or date.today().isoformat()
    return replace(config, data=replace(config.data, template_date=day))


def _written_day(run_dir: Path | None) -> str | None:
    """The day in a run's config.yaml: of several processes the first writes it before the others are started."""
    if run_dir is None or not (run_dir / CONFIG_FILE).is_file():
        return None
    saved = Reader().yaml(run_dir / CONFIG_FILE)
    data = saved.get("data") if isinstance(saved, dict) else None
    day = data.get("template_date") if isinstance(data, dict) else None
    return day if isinstance(day, str) and is_day(day) else None
