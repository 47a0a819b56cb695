"""What silencing an expert does to the loss of each domain: specialisation by cause, not by count.

The loop that silences experts and evaluates is elsewhere; this is the arithmetic. Losses are nats per label token.
"""

from collections.abc import Mapping
from typing import NamedTuple

ALL_SITES = "all sites"


class Silenced(NamedTuple):
    """An expert whose output was taken out.

    Args:
        site: where; ALL_SITES for the experts of that number at every site.
        expert: its number, from 0.
    """

    site: str
    expert: int


KnockOutTable = dict[Silenced, dict[str, float]]
"""{silenced: {domain: loss with it silenced - loss with nothing silenced}}."""


def knock_out_table(intact: Mapping[str, float], silenced: Mapping[Silenced, Mapping[str, float]]) -> KnockOutTable:
    """Loss change of each domain: above 0 where the expert helped, below 0 where it harmed.

    The ablation of single units of Morcos et al. (1803.06959), here of experts and by domain. What routing counts say
    of an expert need not predict it.

    Args:
        intact: loss of each domain with nothing silenced.
        silenced: the same with one expert silenced.

    Raises:
        ValueError: an evaluation has other domains than the intact one.
    """
    for key, losses in silenced.items():
        if differing := sorted(losses.keys() ^ intact.keys()):
            raise ValueError(
                f"with expert {key.expert} of {key.site} silenced the domains differ from those with nothing silenced; "
                f"first difference: {differing[0]}. Evaluate both on the same rows"
            )
    return {key: {domain: losses[domain] - intact[domain] for domain in intact} for key, losses in silenced.items()}


def specialisation_of(table: KnockOutTable) -> dict[Silenced, str | None]:
    """The domain that each expert matters most for: the largest loss change, the first of equal ones.

    None where silencing the expert raises no domain's loss: it matters for none.
    """
    found: dict[Silenced, str | None] = {}
    for key, changes in table.items():
        domain = max(changes, key=lambda name: changes[name], default=None)
        found[key] = domain if domain is not None and changes[domain] > 0 else None
    return found
