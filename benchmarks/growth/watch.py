"""What time is read from."""

import time
from collections.abc import Callable

Now = Callable[[], float]
CLOCKS: dict[str, Now] = {"wall": time.perf_counter, "process": time.process_time}
"""Seconds of the wall, and of this process on all its threads: where other work shares the cores the second counts what
is done, and not what is waited for."""
