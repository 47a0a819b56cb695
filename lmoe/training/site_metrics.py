"""Names of what is measured of each site in a validation."""

from collections.abc import Mapping


def site_metrics(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """val/routing/<name>, the mean over the sites, and val/routing/<site>/<name>; nothing without sites.

    Args:
        name: of the metric.
        values: by site.
    """
    rows = {f"val/routing/{site}/{name}": value for site, value in values.items()}
    return {f"val/routing/{name}": sum(values.values()) / len(values)} | rows if values else {}
