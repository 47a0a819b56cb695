"""Whether the machine has what torch.compile calls, before anything of a run is written."""

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from lmoe.errors import ConfigError

USUAL = {"win32": "cl", "darwin": "clang++"}
"""C++ compiler that torch calls, by platform; elsewhere g++."""
WITHOUT = "or set trainer.compile=false"


def check_compiler(*, on_gpu: bool) -> None:
    """Refuse to compile where torch.compile could not.

    Args:
        on_gpu: what is compiled runs on a GPU.

    Raises:
        ConfigError: no C++ compiler, no headers of Python, or no Triton for a GPU.
    """
    if on_gpu and find_spec("triton") is None:
        raise ConfigError(f"trainer.compile=true needs Triton on a GPU: pip install triton, {WITHOUT}")
    name = os.environ.get("CXX") or USUAL.get(sys.platform, "g++")
    if shutil.which(name) is None:
        raise ConfigError(
            f"trainer.compile=true needs a C++ compiler, and {name} is not there: install it (Debian, Ubuntu: apt "
            f"install g++), name another in the environment variable CXX, {WITHOUT}"
        )
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise ConfigError(
            f"trainer.compile=true needs the headers of Python, and {headers} holds no Python.h: install them (Debian, "
            f"Ubuntu: apt install python{sys.version_info.major}.{sys.version_info.minor}-dev), {WITHOUT}"
        )
