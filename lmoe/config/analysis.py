"""What is measured about routers beside the usual metrics."""

from dataclasses import dataclass

from lmoe.vocabulary import KnockOut


@dataclass(slots=True, kw_only=True)
class AnalysisConfig:
    """Costlier measurements of what experts do."""

    knock_out: KnockOut = KnockOut.none
    """At the end of the run, the change of each domain's validation loss with one expert silenced. experts: expert e of
    all sites together, one validation for each; sites: each expert of each site, which is many; none."""
    permutations: int = 200
    """Permutations of the rows' domains that the mutual information of domain and expert is compared with."""
