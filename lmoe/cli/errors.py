"""Users get the message of an error, not its traceback."""

import sys
from collections.abc import Callable

from lmoe.errors import ConfigError, LmoeError


def told(action: Callable[[], None]) -> int:
    """Run a verb's action.

    Returns:
        0, or 1 after the message of an LmoeError on stderr.
    """
    try:
        action()
    except ConfigError as error:
        sys.stderr.write(f"{error.without_config()}\n")
        return 1
    except LmoeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
