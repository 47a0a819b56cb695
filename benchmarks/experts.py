"""How many experts of which rank a contestant has."""

from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Experts:
    """A setting; a plain LoRA is one expert.

    Args:
        num_experts: E; 0 for no adapter.
        rank: r of each.
        top_k: k, chosen for each token.
    """

    num_experts: int
    rank: int
    top_k: int = 2

    @property
    def active_rank(self) -> int:
        """k*r: the rank of a LoRA with as many multiplications for a token as the chosen experts have."""
        return self.top_k * self.rank

    @property
    def full_rank(self) -> int:
        """E*r: the rank of a LoRA with as many parameters as all experts have."""
        return self.num_experts * self.rank

    @property
    def alpha(self) -> float:
        """Numerator of the scaling, for which every contestant takes 2."""
        return 2.0 * self.rank
