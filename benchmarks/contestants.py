"""Who is timed against whom."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from benchmarks.experts import Experts

PRIMARY = Experts(8, 16)
"""The setting of the targets."""

OTHERS = tuple(Experts(*pair) for pair in [(8, 8), (8, 48), (4, 16), (16, 16), (32, 16), (64, 16), (32, 48)])


@dataclass(slots=True, frozen=True, kw_only=True)
class Contestant:
    """One line of a table.

    Args:
        name: unique within a group; one name means one thing everywhere.
        peer: module under benchmarks/peers/ that builds it.
        experts: its setting.
        reference: name of the contestant in the same group that its ratio is to.
    """

    name: str
    peer: str
    experts: Experts
    reference: str

    @property
    def foreign(self) -> bool:
        """Whether it is from another project: it may be missing, or fail, without stopping the rest."""
        return self.peer != "frozen" and not self.peer.startswith("lmoe_")

    def load(self) -> ModuleType:
        """The module that builds it.

        Raises:
            ImportError: the library is not installed.
        """
        return import_module(f"benchmarks.peers.{self.peer}")


def active_lora(experts: Experts) -> str:
    """Name of the reference of a setting: the LoRA of rank k*r."""
    return f"peft lora r={experts.active_rank} (k*r)"


def full_lora(experts: Experts) -> str:
    """Name of the LoRA with as many parameters as the experts of a setting."""
    return f"peft lora r={experts.full_rank} (E*r)"


def mixture(family: str, experts: Experts) -> str:
    """Name of a family at a setting."""
    return f"{family} E={experts.num_experts} k={experts.top_k} r={experts.rank}"


def _loras(experts: Experts) -> list[Contestant]:
    reference = active_lora(experts)
    return [
        Contestant(name=reference, peer="peft_lora", experts=Experts(1, experts.active_rank, 1), reference=reference),
        Contestant(
            name=full_lora(experts), peer="peft_lora", experts=Experts(1, experts.full_rank, 1), reference=reference
        ),
    ]


def _mixture(family: str, peer: str, experts: Experts) -> Contestant:
    return Contestant(name=mixture(family, experts), peer=peer, experts=experts, reference=active_lora(experts))


def _setting(experts: Experts) -> list[Contestant]:
    return [
        *_loras(experts),
        # X-LoRA has no k: it weighs all E adapters.
        Contestant(
            name=f"peft xlora E={experts.num_experts} r={experts.rank}",
            peer="peft_xlora",
            experts=experts,
            reference=active_lora(experts),
        ),
        _mixture("eulerforge", "eulerforge_mixture", experts),
        _mixture("lmoe", "lmoe_mixture", experts),
    ]


def _floor(experts: Experts) -> Contestant:
    return Contestant(name="frozen base", peer="frozen", experts=Experts(0, 0, 0), reference=active_lora(experts))


def step_groups() -> dict[str, list[Contestant]]:
    """Contestants that are alive together, by the name of the group.

    `grid` holds everything that a target needs: all at the primary setting, and lmoe at every setting. Each other
    setting has a group of its own, with its own reference.
    """
    grid = [_floor(PRIMARY), *_setting(PRIMARY)]
    for experts in OTHERS:
        if active_lora(experts) not in {contestant.name for contestant in grid}:
            grid.append(_loras(experts)[0])
        grid.append(_mixture("lmoe", "lmoe_mixture", experts))
    return {"grid": grid, **{f"E={e.num_experts} r={e.rank}": _setting(e) for e in OTHERS}}


def layer_contestants() -> list[Contestant]:
    """One layer; X-LoRA stays out, since its classifier needs a whole model."""
    return [_floor(PRIMARY), *(c for c in _setting(PRIMARY) if c.peer != "peft_xlora")]


def expert_ffn_contestants(experts: Experts, *, compiled: bool = False) -> list[Contestant]:
    """One FFN turned into experts that are whole FFNs.

    Args:
        compiled: lmoe's once more, as compiled code.
    """
    families = {"lmoe": "lmoe_expert_ffn", "mixlora": "mixlora_expert_ffn", "eulerforge": "eulerforge_expert_ffn"}
    families |= {"lmoe compiled": "lmoe_compiled_ffn"} if compiled else {}
    peers = {"frozen FFN": ("frozen", Experts(0, 0, 0))}
    peers |= {mixture(f"{family} FFN", experts): (peer, experts) for family, peer in families.items()}
    return [
        Contestant(name=name, peer=peer, experts=setting, reference="frozen FFN")
        for name, (peer, setting) in peers.items()
    ]


def native_contestants(experts: Experts) -> list[Contestant]:
    """LoRA on the experts of a model that has E of its own."""
    reference = f"frozen model E={experts.num_experts}"
    families = {"lmoe native": "lmoe_native", "peft target_parameters": "peft_target_parameters"}
    return [
        Contestant(name=reference, peer="frozen", experts=Experts(0, 0, 0), reference=reference),
        *(
            Contestant(name=mixture(family, experts), peer=peer, experts=experts, reference=reference)
            for family, peer in families.items()
        ),
    ]


def find(name: str) -> Contestant:
    """The contestant of a name.

    Raises:
        KeyError: no such contestant.
    """
    for group in step_groups().values():
        for contestant in group:
            if contestant.name == name:
                return contestant
    raise KeyError(f"no contestant {name!r}")
