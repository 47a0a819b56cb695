"""What the project promises of its speed and memory, and whether a measurement keeps it."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.contestants import PRIMARY, active_lora, full_lora, mixture
from benchmarks.experts import Experts
from benchmarks.memory import Peak
from benchmarks.timing import Timed, ratio

FORWARD_BACKWARD = "forward+backward"


@dataclass(slots=True, frozen=True, kw_only=True)
class Target:
    """A bound on a ratio.

    Args:
        what: in words.
        mine, theirs: names of contestants; the ratio is mine / theirs.
        part: of a step; None: the whole.
        memory: the ratio is of memory beyond the base, not of time.
        limit: the bound that is promised; None: only the aim is.
        aim: a better one that is hoped for.
        at_least: bounds are from below.
    """

    what: str
    mine: str
    theirs: str
    part: str | None = None
    memory: bool = False
    limit: float | None = None
    aim: float | None = None
    at_least: bool = False

    def keeps(self, measured: float, bound: float) -> bool:
        """Whether a value is on the right side of a bound."""
        return measured >= bound if self.at_least else measured <= bound

    def bound(self, value: float | None) -> str:
        """A bound in words."""
        return "" if value is None else f"{'>=' if self.at_least else '<='} {value:g}"


@dataclass(slots=True, frozen=True, kw_only=True)
class Judged:
    """A target beside what was measured; None: something that it needs was not."""

    target: Target
    measured: float | None

    @property
    def verdict(self) -> str:
        """met, missed or not measured; of the aim where nothing is promised."""
        target = self.target
        if self.measured is None:
            return "not measured"
        if target.limit is None:
            assert target.aim is not None
            return "aim reached" if target.keeps(self.measured, target.aim) else "aim not reached"
        return "met" if target.keeps(self.measured, target.limit) else "missed"


STEP_TARGETS = (
    Target(
        what="step, lmoe to PEFT LoRA of rank k*r",
        mine=mixture("lmoe", PRIMARY),
        theirs=active_lora(PRIMARY),
        limit=1.08,
        aim=1.03,
    ),
    Target(
        what="step, lmoe to PEFT LoRA of rank E*r",
        mine=mixture("lmoe", PRIMARY),
        theirs=full_lora(PRIMARY),
        limit=1.0,
    ),
    Target(
        what="forward and backward, lmoe with 64 experts to 8",
        mine=mixture("lmoe", Experts(64, 16)),
        theirs=mixture("lmoe", PRIMARY),
        part=FORWARD_BACKWARD,
        limit=1.35,
    ),
    Target(
        what="memory beyond the base, lmoe to PEFT LoRA of rank E*r",
        mine=mixture("lmoe", PRIMARY),
        theirs=full_lora(PRIMARY),
        memory=True,
        limit=1.05,
    ),
)

LAYER_TARGETS = (
    Target(
        what="layer, eulerforge to lmoe",
        mine=mixture("eulerforge", PRIMARY),
        theirs=mixture("lmoe", PRIMARY),
        limit=6.0,
        aim=10.0,
        at_least=True,
    ),
    Target(
        what="layer, lmoe to the frozen Linear",
        mine=mixture("lmoe", PRIMARY),
        theirs="frozen base",
        aim=1.6,
    ),
)


def expert_ffn_targets(experts: Experts, *, compiled: bool = False) -> tuple[Target, ...]:
    """Targets of one FFN turned into experts, as it is and `compiled`."""
    bounds = {"mixlora FFN": 2.0, "eulerforge FFN": 3.0}
    return tuple(
        Target(
            what=f"forward and backward, {family} to {own}",
            mine=mixture(family, experts),
            theirs=mixture(own, experts),
            limit=limit,
            at_least=True,
        )
        for own in ("lmoe FFN", *(["lmoe compiled FFN"] if compiled else []))
        for family, limit in bounds.items()
    )


def native_targets(experts: Experts, more: Experts) -> tuple[Target, ...]:
    """Targets of LoRA on native experts; `more` are more of them with as many adapter parameters."""
    faster = (
        Target(
            what=f"step, PEFT target_parameters to lmoe with {setting.num_experts} experts",
            mine=mixture("peft target_parameters", setting),
            theirs=mixture("lmoe native", setting),
            limit=2.0,
            at_least=True,
        )
        for setting in (experts, more)
    )
    return (
        *faster,
        Target(
            what=f"memory beyond the base, lmoe with {more.num_experts} experts to {experts.num_experts}",
            mine=mixture("lmoe native", more),
            theirs=mixture("lmoe native", experts),
            memory=True,
            limit=1.1,
        ),
    )


def judge(targets: tuple[Target, ...], times: Mapping[str, Timed], peaks: Mapping[str, Peak]) -> list[Judged]:
    """Every target with its measurement."""
    return [Judged(target=target, measured=_measured(target, times, peaks)) for target in targets]


def _measured(target: Target, times: Mapping[str, Timed], peaks: Mapping[str, Peak]) -> float | None:
    if target.memory:
        if target.mine not in peaks or target.theirs not in peaks:
            return None
        return peaks[target.mine].training / peaks[target.theirs].training
    if target.mine not in times or target.theirs not in times:
        return None
    return ratio(times[target.mine], times[target.theirs], target.part)
