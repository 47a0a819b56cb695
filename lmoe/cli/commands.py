"""A call of a verb as a shell takes it: what a run or a report says to do next."""

import shlex
from pathlib import Path

from lmoe.files.run_folder import hydra_setting
from lmoe.run.verb_call import VerbCall

COMPOSED = ("train", "pretrain")
"""Verbs whose settings are key=value, composed by Hydra; the others take flags."""


def shell_command(call: VerbCall) -> str:
    """The command of a call: `lmoe generate --checkpoint RUN`, or `lmoe train resume=RUN`."""
    if call.verb in COMPOSED:
        return " ".join([program(call.verb), *(hydra_setting(key, value) for key, value in call.settings.items())])
    flags = [f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in call.settings.items()]
    return " ".join([program(call.verb), *flags])


def program(verb: str) -> str:
    """How a verb is started in the working directory: `train` by train.py where that of this checkout stands there,
    everything else by the installed command."""
    own = Path(__file__).resolve().parents[2] / "train.py"  # of a checkout; an installed package has none
    here = Path.cwd() / "train.py"
    return "python train.py" if verb == "train" and own.is_file() and here.resolve() == own else f"lmoe {verb}"
