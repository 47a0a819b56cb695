"""Why Triton's kernels cannot be run by its interpreter here, for tests that are skipped then."""

import os
from importlib.util import find_spec

WHY_NOT = (
    "triton is not installed: pip install 'lmoe[triton]'"
    if find_spec("triton") is None
    else ""
    if os.environ.get("TRITON_INTERPRET") == "1"
    else "Triton runs its kernels on the CPU with TRITON_INTERPRET=1 alone"
)
"""In words; "": they can be."""
