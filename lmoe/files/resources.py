"""Where conf/ and data/ are: at the top of a checkout, or inside an installed package."""

from pathlib import Path


def resource_dir(name: str) -> Path:
    """Folder `name` (conf, data/tiny, data/sft) of this installation."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_share" / name
    return installed if installed.exists() else package.parent / name
