"""A model that brings Python: it is found out when that is imported."""

import json
import shutil
from pathlib import Path

CODE = """\
from pathlib import Path

from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Path({marker!r}).touch()


class Config(Qwen3Config):
    model_type = "with_code"


class Model(Qwen3ForCausalLM):
    config_class = Config


class Tokens(PreTrainedTokenizerFast):
    pass
"""
NAMED = {"AutoConfig": "brought.Config", "AutoModelForCausalLM": "brought.Model"}


def bring_code(model: Path, folder: Path) -> Path:
    """Copy a Qwen3 model into a folder, with Python beside it that its configs name.

    Returns:
        A file that is there once the Python has been imported.
    """
    shutil.copytree(model, folder)
    marker = folder.parent / f"{folder.name} has been run"
    (folder / "brought.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    edit(folder / "config.json", auto_map=NAMED, model_type="with_code")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["brought.Tokens", "brought.Tokens"]})
    return marker


def edit(file: Path, **changes) -> None:
    """Set keys of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes), encoding="utf-8")
