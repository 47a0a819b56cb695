"""Users get the message of an error, not its traceback, and in it the names that a command has for what it takes.

The library marks the arguments and calls that its messages name with backticks (lmoe/errors.py). Here they become flags
of the verbs, or keys of the config of `lmoe train` and `lmoe pretrain`. What has no entry stays as it was written.
"""

import re
import sys
from collections.abc import Callable, Mapping

from lmoe.errors import BlendError, LmoeError

MARKED = re.compile(r"`([a-z_][\w.]*)(?:=([^`]*)|\([^`]*\))?`")
"""Name of an argument, perhaps with its value; or of a function, perhaps with its arguments."""
SAME = (
    *("base_model", "batch_size", "chat_template", "checkpoint", "choices", "data", "device", "domain", "dry_run"),
    *("experts", "fit", "head", "max_length", "max_tokens", "message", "name", "public", "revision"),
    *("alpha", "baseline", "domains", "margin", "names", "rank", "unfinished"),
    *(
        "gguf_type",
        "host",
        "max_new_tokens",
        "model",
        "output",
        "port",
        "precision",
        "prompts",
        "router",
        "samples",
        "task",
    ),
    *("task_path", "tasks", "trust_remote_code", "weights"),
)
"""Arguments that the verbs call the same."""
FLAGS = {name: f"--{name.replace('_', '-')}" for name in SAME} | {
    "average": "--format merged --average-experts",
    "export_merged": "--format merged",
    "export_native_moe": "--format native-moe",
    "export_peft": "--format peft",
    "export_peft_experts": "--format peft-experts",
    "lmoe.load": "lmoe generate --checkpoint",
    "lmoe.trace": "--domain NAME",
    "model_name": "--model",
}
"""What an argument of the library, or a function of it, is on the command line."""
BLEND_FLAGS = FLAGS | {"temperature": "--router-temperature", "top_k": "--experts-top-k"}
"""Of a blend, whose arguments have names that sampling has too."""
KEYS = {"trust_remote_code": "backbone.trust_remote_code"}
"""What an argument is in the config of a run."""


def exit_code_of(action: Callable[[], None]) -> int:
    """Run a verb's action.

    Returns:
        0, or 1 after the message of an LmoeError on stderr.
    """
    try:
        action()
    except LmoeError as error:
        sys.stderr.write(f"{with_flags(error)}\n")
        return 1
    return 0


def with_flags(error: LmoeError) -> str:
    """The message of an error with flags: `max_length=900` becomes --max-length 900."""
    return with_flag_names(error.without_config(), BLEND_FLAGS if isinstance(error, BlendError) else FLAGS)


def with_flag_names(text: str, names: Mapping[str, str] = FLAGS) -> str:
    """What the library says, with flags in place of its arguments.

    Args:
        names: flags by argument.
    """

    def say(flag: str, value: str | None) -> str:
        return flag if value in (None, "True") else f"{flag} {value}"

    return _with_names(text, names, say)


def with_keys(message: str) -> str:
    """A message with keys of the config: `trust_remote_code=True` as backbone.trust_remote_code=true."""

    def say(key: str, value: str | None) -> str:
        return key if value is None else f"{key}={'true' if value == 'True' else value}"

    return _with_names(message, KEYS, say)


def _with_names(message: str, names: Mapping[str, str], say: Callable[[str, str | None], str]) -> str:
    """The message with each marked name that is known said by another one."""
    return MARKED.sub(lambda mark: say(names[mark[1]], mark[2]) if mark[1] in names else mark[0], message)
