"""What the parts of a feed-forward block are called."""

from dataclasses import dataclass


@dataclass(slots=True, frozen=True, kw_only=True)
class FfnNames:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate.

    Args:
        up: the Linear that is not activated, or the only one; where `fused`, gate and up in one, gate first.
        down: the last Linear.
        gate: the Linear that is activated; None: there is none, or it is in `up`.
        fused: `up` holds both gate and up.
        activation: the module between them.
        dropout: a module after `down`, or None.
    """

    up: str = "up_proj"
    down: str = "down_proj"
    gate: str | None = "gate_proj"
    fused: bool = False
    activation: str = "act_fn"
    dropout: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """The Linears, in the order in which they are used."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)

    def formula(self) -> str:
        """What the block computes, in the names of its parts."""
        if self.gate is not None:
            return f"{self.down}({self.activation}({self.gate}(x)) * {self.up}(x))"
        if self.fused:
            return f"{self.down}({self.activation}(gate) * up), [gate, up] = {self.up}(x)"
        return f"{self.down}({self.activation}({self.up}(x)))"
