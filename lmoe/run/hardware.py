"""Findings about the processor, the GPUs and the memory."""

import os
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lmoe.run import machine
from lmoe.run.findings import GB, Finding, State, findings_of


def processor() -> Iterator[Finding]:
    """The processor, and whether it computes in bfloat16."""
    yield Finding(section="devices", name="processor", value=machine.cpu_model())
    flags = machine.bfloat16_flags()
    if flags is None:
        value, advice = "the system does not tell", ""
    elif flags:
        value, advice = f"yes ({', '.join(flags)})", ""
    else:
        value, advice = "no instructions for it", "trainer.precision=32-true is faster here than bf16-mixed"
    yield Finding(section="devices", name="bfloat16 on the processor", value=value, advice=advice)


def gpus() -> Iterator[Finding]:
    """What torch was built for, and each GPU that it sees."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "the CPU alone"
    yield Finding(section="devices", name="torch is built for", value=build)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        yield Finding(section="devices", name="CUDA_VISIBLE_DEVICES", value=visible or "(empty: no GPU)")
    if not there:
        yield _no_gpu(build, [str(warning.message) for warning in said])
        return
    for number in range(torch.cuda.device_count()):
        yield from findings_of("devices", f"GPU {number}", partial(_gpu, number))


def _no_gpu(build: str, said: list[str]) -> Finding:
    """The finding that torch sees no GPU, and why, as far as can be told.

    Args:
        build: what torch was built for.
        said: by torch, when it was asked.
    """
    driver = Path("/proc/driver/nvidia/version").exists()
    state, advice = State.fine, ""
    if said:
        state, advice = State.note, said[0].splitlines()[0]
    elif driver and build == "the CPU alone":
        state, advice = State.note, "there is an NVIDIA driver: install a build of torch for CUDA to use the GPU"
    elif driver:
        state, advice = State.note, "there is an NVIDIA driver: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    return Finding(section="devices", name="GPU", value="torch sees none", state=state, advice=advice)


def _gpu(number: int) -> Iterator[Finding]:
    """Name, memory and abilities of a GPU, and what moe.backend=auto takes on it."""
    import torch

    from lmoe.ops.card_rules import choose_rule, read_rules

    about = torch.cuda.get_device_properties(number)
    with torch.cuda.device(number):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    value = (
        f"{about.name}, {about.total_memory / GB:.1f} GB, compute capability {about.major}.{about.minor}, "
        f"bfloat16: {'yes' if bfloat16 else 'no'}"
    )
    yield Finding(section="devices", name=f"GPU {number}", value=value)
    free, _ = torch.cuda.mem_get_info(number)
    few = free < about.total_memory / 2
    yield Finding(
        section="devices",
        name=f"GPU {number}, free",
        value=f"{free / GB:.1f} GB",
        state=State.note if few else State.fine,
        advice="more than half is taken: nvidia-smi names by whom" if few else "",
    )
    capability = None if torch.version.hip else (about.major, about.minor)
    rule = choose_rule(read_rules(), card=about.name, device="cuda", capability=capability, dtype=torch.bfloat16)
    yield Finding(section="devices", name=f"GPU {number}, moe.backend=auto", value=str(rule))


def memory() -> Iterator[Finding]:
    """Memory of the machine, and what of it this process can take."""
    found = machine.memory()
    yield Finding(section="memory", name="of the machine", value=f"{found.total / GB:.1f} GB")
    if found.limit is not None:
        value = f"{found.limit / GB:.1f} GB"
        yield Finding(section="memory", name="limit of the container or job", value=value)
    free = "the system does not tell" if found.free is None else f"{found.free / GB:.1f} GB"
    yield Finding(section="memory", name="free", value=free)
