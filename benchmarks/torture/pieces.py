"""The micro model that is tortured, and the default job."""

from pathlib import Path

OVERRIDES = "overrides"
DEFAULT_JOB = ("injection=mixture_lora", "injection.num_experts=8", "logger=none", "trainer.enable_progress_bar=false")


def write_micro(folder: Path) -> None:
    """The backbone, its rows, and the overrides of a run with them, one a line. NOTE computes: not in the driver."""
    from tests.micro import make_micro

    micro = make_micro(folder / "micro")
    (folder / OVERRIDES).write_text("\n".join(micro.overrides), encoding="utf-8")


def micro_overrides(folder: Path) -> list[str]:
    """What write_micro has left."""
    return (folder / OVERRIDES).read_text(encoding="utf-8").splitlines()
