"""The rows of some domains; and domains that say nothing of the rows, as a control."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lmoe.config.data import DataConfig
from lmoe.data.encoded import EncodedRows
from lmoe.errors import DataError
from lmoe.files.wording import shown

NAMED = 10
"""Domains that a message names."""


def domain_places(names: Iterable[str], among: Sequence[str]) -> list[int]:
    """Where names stand in a list of all of them."""
    place = {name: index for index, name in enumerate(among)}
    return [place[name] for name in names]


def check_chosen(chosen: Sequence[str], there: Collection[str]) -> None:
    """Refuse a choice of domains that names one without rows.

    Args:
        chosen: data.domains.
        there: names of the domains of all rows.

    Raises:
        DataError: names what there is.
    """
    found = {*there}
    if missing := [name for name in chosen if name not in found]:
        raise DataError(
            f"data.domains names {names_of(missing)}, of which there is no row; the rows are of {names_of(there)}"
        )


def check_some_left(train: int | None, val: int, config: DataConfig) -> None:
    """Refuse a choice of domains that leaves nothing to train or to validate on.

    Args:
        train, val: rows of the chosen domains; train None: they are read while training.
        config: with data.domains.

    Raises:
        DataError: says how to get some.
    """
    chosen = names_of(config.domains or [])
    if train == 0:
        raise DataError(
            f"data.domains={chosen}: all rows of these domains are validation rows; name others, or add rows"
        )
    if val == 0:
        cure = (
            "raise data.val_fraction, or set data.val_path" if config.val_path is None else "add some to data.val_path"
        )
        raise DataError(f"data.domains={chosen}: no validation row is of these domains; {cure}")


def of_domains(rows: EncodedRows, domains: Sequence[str], chosen: Collection[str]) -> tuple[EncodedRows, Tensor]:
    """The rows of some domains, and which of all rows they are, (N,) int64.

    Args:
        domains: sorted names, rows.domains points into it.
        chosen: those to keep; the rows returned point into their sorted names, as far as `domains` has them.
    """
    wanted = {*chosen}
    is_kept = torch.tensor([name in wanted for name in domains], dtype=torch.bool)
    which = is_kept[rows.domains].nonzero().flatten()
    place = {name: index for index, name in enumerate(name for name in domains if name in wanted)}
    new_index = [place.get(name, -1) for name in domains]
    return rows.subset(which).with_domains(new_index), which


def dealt_anew(rows: EncodedRows) -> EncodedRows:
    """The same rows, where each has the domain of another one; each domain has as many rows as before.

    In the order of their digests, which are a hash of their tokens, each row gets the domain of the one half of all
    rows further on. So the same rows always get the same domains, whatever the seed, the process and their order;
    equal rows stand side by side, which is why it is not the next one.
    """
    order = rows.digests.argsort(stable=True)
    dealt = torch.empty_like(rows.domains)
    dealt[order] = rows.domains[order].roll(-(len(rows) // 2))
    return replace(rows, domains=dealt)


def check_several(rows: EncodedRows, domains: Sequence[str]) -> None:
    """Refuse to deal one domain anew.

    Args:
        rows: training rows.
        domains: names, rows.domains points into it.

    Raises:
        DataError: all rows are of one domain.
    """
    if len(there := rows.domains.unique().tolist()) < 2:
        raise DataError(
            f"data.permute_domains=true: all training rows are of the domain {shown(domains[there[0]])}, so there is "
            "nothing to deal; give the rows domains, or set it to false"
        )


def names_of(domains: Collection[str]) -> str:
    """The first names of some domains, sorted, for messages."""
    names = sorted(domains)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(shown(name) for name in names[:NAMED]) + more
