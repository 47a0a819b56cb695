"""Licences that are stated on this machine: of a base in the card beside it, of the rows that ship with lmoe."""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from yaml import YAMLError

from lmoe.config.data import BUNDLED, BUNDLED_FOLDERS
from lmoe.errors import LmoeError
from lmoe.files.hub import HUB_NAME
from lmoe.files.places import expanded, is_dir, is_file
from lmoe.files.resources import named_base, resource_dir
from lmoe.files.small_file import Reader

CARD = "README.md"
CARDS = Reader(most=4_000_000, what="a card")
ROWS_OF_DOMAIN = re.compile(r"\| `(?P<domain>\w+)` \|.*\| (?P<licence>[^|]+) \|")
ELSEWHERE = "see below"
"""What the table of rows says where the sources of a domain differ."""


def base_licence(name: str) -> str | None:
    """The licence in the card of a base: in its folder, or downloaded with it; None: no card there states one.

    Args:
        name: hub name, local directory, or a base that has a name of ours.
    """
    folder = named_base(name) or expanded(name)
    card = folder / CARD if is_dir(folder) else _downloaded(name)
    if card is None or not is_file(card):
        return None
    metadata = card_metadata(card)
    licence = metadata.get("license")
    named = metadata.get("license_name") if licence == "other" else licence
    return str(named or licence) if isinstance(named or licence, str) else None


def _downloaded(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CARD) if HUB_NAME.fullmatch(name) else None
    return Path(found) if isinstance(found, str) else None


def card_metadata(card: Path) -> dict[str, Any]:
    """The front matter of a card, which others may have written; {} where there is none that can be read."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard(CARDS.text(card)).data.to_dict()
    except (LmoeError, YAMLError, ValueError, TypeError, KeyError):
        return {}


@dataclass(slots=True, frozen=True)
class BundledRows:
    """Rows of one domain that ship with lmoe.

    Args:
        folder: in data/: sft, or preference.
        domain: as the rows name it.
    """

    folder: str
    domain: str

    @property
    def name(self) -> str:
        """What a card calls them: instructions by their domain, others by their folder too."""
        return self.domain if self.folder == BUNDLED_FOLDERS[BUNDLED] else f"{self.folder}/{self.domain}"


@cache
def bundled_rows() -> dict[str, BundledRows]:
    """What each file of rows holds that ships with lmoe, by the SHA-256 of the file."""
    return {
        hashlib.sha256(file.read_bytes()).hexdigest(): BundledRows(folder, file.stem)
        for folder in BUNDLED_FOLDERS.values()
        for file in sorted(resource_dir(f"data/{folder}").glob("*/*.jsonl"))
    }


@cache
def bundled_licences() -> dict[BundledRows, str]:
    """Licences of the rows that ship with lmoe, from data/README.md; {} where that file is missing."""
    page = resource_dir("data/README.md")
    if not is_file(page):
        return {}
    text = CARDS.text(page)
    return {
        BundledRows(folder, found["domain"]): found["licence"].strip().replace(ELSEWHERE, "several, by source")
        for folder in BUNDLED_FOLDERS.values()
        for found in ROWS_OF_DOMAIN.finditer(text.partition(f"## {folder}/")[2].partition("\n## ")[0])
    }
