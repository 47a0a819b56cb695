"""A device without torch's kernel for grouped matmuls, played on the CPU."""

from typing import Any

import pytest


def no_grouped_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let grouped matmuls find no kernel, as on Ampere and Ada, and fail where torch's loop, which waits, is called."""

    def waits(*args: Any, **given: Any) -> None:
        raise AssertionError("grouped_mm reads a value back to the host")

    monkeypatch.setattr("lmoe.ops.grouped.has_grouped_kernel", lambda device, dtype: False)
    monkeypatch.setattr("lmoe.ops.grouped.grouped_mm", waits)
