"""What `lmoe doctor` finds: versions, devices, memory, places, accounts, and whether what ships with lmoe loads.

Each question is asked under a guard and imports what it needs itself: what cannot be found out is a finding that says
why. Nothing is downloaded, and no secret is read into a finding.
"""

import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from lmoe.config.data import BUNDLED_FOLDERS
from lmoe.run.findings import GB, Finding, State, findings_of
from lmoe.run.hardware import gpus, memory, processor

TINY_FINGERPRINT = "312df21f5146f17f8c0bf81376281725"
"""Of the base in data/tiny, as adapters that were trained on it keep it."""
BESIDE = {"torchao": "only models that were quantised with it need it"}
"""Packages that no extra brings, and what they are for."""
SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")
SHIPPED = (
    ("conf", "*.yaml"),
    *((f"data/{folder}/{part}", "*.jsonl") for folder in BUNDLED_FOLDERS.values() for part in ("train", "val")),
)
"""Folders that ship with lmoe, and what is in them."""
LITTLE = 2e9
"""Bytes of free disk below which a run may not end well."""


def findings() -> Iterator[Finding]:
    """Everything but how threads wait, which the command line decides."""
    yield from findings_of("versions", "lmoe", own_version)
    yield from findings_of("versions", "revision", revision)
    yield from findings_of("versions", "packages", packages)
    yield from findings_of("devices", "processor", processor)
    yield from findings_of("devices", "torch", gpus, cure="install torch again; README.md says how lmoe is set up")
    yield from findings_of("memory", "memory", memory)
    yield from findings_of("places", "tokenised rows", rows_cache)
    yield from findings_of("places", "hub cache (HF_HOME)", hub_cache)
    yield from findings_of("places", "runs", runs)
    yield from findings_of("places", "real base", real_base)
    yield from findings_of("accounts", "switches", switches)
    yield from findings_of("accounts", "hub token", hub_token)
    yield from findings_of("accounts", "W&B", wandb_account, cure="pip install wandb; logger=none trains without")
    yield from findings_of("what ships with lmoe", "files", shipped_files, cure=_how_to_restore("conf data"))
    imported = list(
        findings_of("what ships with lmoe", "code", code, cure="install lmoe again; in a checkout: make setup")
    )
    yield from imported
    if imported[-1].state is State.fine:
        yield from findings_of("what ships with lmoe", "base", base, cure=_how_to_restore("data/tiny"))
    else:
        value = "not tried, as the code cannot be imported"
        yield Finding(section="what ships with lmoe", name="base", value=value, state=State.unknown)


def own_version() -> Iterator[Finding]:
    """lmoe, Python and the system."""
    import lmoe

    yield Finding(section="versions", name="lmoe", value=f"{lmoe.__version__}, {Path(lmoe.__file__).parent}")
    yield Finding(section="versions", name="python", value=f"{platform.python_version()}, {sys.executable}")
    yield Finding(section="versions", name="system", value=platform.platform())


def revision() -> Iterator[Finding]:
    """The revision of a checkout; an installed package has none."""
    from lmoe.run.packages import PYPROJECT
    from lmoe.run.provenance import git_revision

    found = git_revision() if PYPROJECT.is_file() else None
    if found is not None:
        changed = ", with changes since" if found["uncommitted_changes"] else ""
        yield Finding(section="versions", name="revision", value=f"{found['revision'][:12]}{changed}")


def packages() -> Iterator[Finding]:
    """Each package that lmoe needs, then each extra."""
    from lmoe.run.packages import installed_version, stated_packages

    stated = stated_packages()
    for requirement in stated.needed:
        found = installed_version(requirement.name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        yield Finding(
            section="versions",
            name=requirement.name,
            value=found or "not installed",
            state=State.fine if fits else State.broken,
            advice="" if fits else f"pip install '{requirement}'",
        )
    for extra, requirements in stated.extras.items():
        found = {r: installed_version(r.name) for r in requirements}
        unfit = [str(r) for r, v in found.items() if v is None or not r.specifier.contains(v, prereleases=True)]
        yield Finding(
            section="versions",
            name=f"extra {extra}",
            value=", ".join(f"{r.name} {version or 'not installed'}" for r, version in found.items()),
            state=State.note if any(v and str(r) in unfit for r, v in found.items()) else State.fine,
            advice=f"pip install 'lmoe[{extra}]' brings {', '.join(unfit)}" if unfit else "",
        )
    for name, use in BESIDE.items():
        found = installed_version(name)
        yield Finding(section="versions", name=name, value=found or "not installed", advice="" if found else use)


def rows_cache() -> Iterator[Finding]:
    """Where tokenised rows are kept."""
    from lmoe.files.places import cache_folder

    yield from place("tokenised rows", cache_folder(None), "data.cache_dir=… keeps them elsewhere")


def hub_cache() -> Iterator[Finding]:
    """Where models and data sets from the hub are kept."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    yield from place("hub cache (HF_HOME)", Path(HF_HOME), "HF_HOME=… keeps it elsewhere")
    if Path(HF_HUB_CACHE).parent != Path(HF_HOME):
        yield from place("models (HF_HUB_CACHE)", Path(HF_HUB_CACHE), "HF_HUB_CACHE=… keeps them elsewhere")


def runs() -> Iterator[Finding]:
    """Where runs are written."""
    yield from place("runs", Path("outputs"), "hydra.run.dir=… writes a run elsewhere")


def real_base() -> Iterator[Finding]:
    """Whether smollm2_q4, the base that does not ship with lmoe, has been written here."""
    from lmoe.files.resources import REAL_BASE, missing_base, named_base

    missing = missing_base(REAL_BASE)
    value = "not there" if missing else str(named_base(REAL_BASE))
    yield Finding(section="places", name=f"real base ({REAL_BASE})", value=value, advice=missing or "")


def place(name: str, folder: Path, elsewhere: str) -> Iterator[Finding]:
    """Where a folder is, or would be made, and what is free there.

    Args:
        name: of the finding.
        folder: may be missing.
        elsewhere: how another is chosen, for one that cannot be written.
    """
    from lmoe.run.machine import disk

    found = disk(folder)
    there = "" if folder.exists() else " (not there yet)"
    trouble = "cannot be written" if not found.writable else "little is free" if found.free < LITTLE else ""
    yield Finding(
        section="places",
        name=name,
        value=f"{folder.absolute()}{there}, {found.free / GB:.1f} GB free",
        state=State.note if trouble else State.fine,
        advice=f"{trouble}; {elsewhere}" if trouble else "",
    )


def switches() -> Iterator[Finding]:
    """Variables of the environment that keep the hub and W&B off the network."""
    for name in SWITCHES:
        yield Finding(section="accounts", name=name, value=os.environ.get(name) or "not set")


def hub_token() -> Iterator[Finding]:
    """Whether there is a token of the hub."""
    from huggingface_hub import get_token

    yield Finding(section="accounts", name="hub token", value="no" if get_token() is None else "yes")


def wandb_account() -> Iterator[Finding]:
    """Whether there is a key of W&B, and how a run would be recorded."""
    from lmoe.errors import ConfigError
    from lmoe.run.wandb_run import check_environment, has_api_key, wandb_mode
    from lmoe.vocabulary import WandbMode

    yield Finding(section="accounts", name="W&B API key", value="yes" if has_api_key() else "no")
    try:
        mode = wandb_mode(WandbMode.auto)
        check_environment()
    except ConfigError as error:
        yield Finding(
            section="accounts",
            name="W&B run",
            value=" ".join(str(error.without_config()).split()),
            state=State.broken,
            advice="logger=none trains without W&B",
        )
        return
    advice = "wandb login, for runs that are online" if mode == "offline" and not has_api_key() else ""
    yield Finding(section="accounts", name="W&B run", value=f"would be {mode}", advice=advice)


def code() -> Iterator[Finding]:
    """Whether what trains can be imported, with every library that it uses."""
    from lmoe.run.announce import quiet_libraries

    quiet_libraries()
    yield Finding(section="what ships with lmoe", name="code", value="can be imported")


def shipped_files() -> Iterator[Finding]:
    """Whether conf/ and the bundled rows are there."""
    from lmoe.files.resources import resource_dir

    for name, pattern in SHIPPED:
        folder = resource_dir(name)
        there = any(folder.rglob(pattern))
        yield Finding(
            section="what ships with lmoe",
            name=name,
            value=str(folder) if there else f"{folder} is missing or empty",
            state=State.fine if there else State.broken,
            advice="" if there else _how_to_restore(name),
        )


def base() -> Iterator[Finding]:
    """Whether the bundled base loads and has the weights that it was shipped with."""
    from lmoe.backbones.fingerprint import fingerprint
    from lmoe.backbones.load import load_model, load_tokenizer
    from lmoe.config.backbone import BackboneConfig
    from lmoe.files.resources import TINY

    config = BackboneConfig(model_name=TINY)
    load_tokenizer(config)
    found = fingerprint(load_model(config))
    own = found == TINY_FINGERPRINT
    yield Finding(
        section="what ships with lmoe",
        name="base",
        value="loads, with the weights that it was shipped with" if own else f"loads, with other weights ({found})",
        state=State.fine if own else State.broken,
        advice="" if own else _how_to_restore("data/tiny"),
    )


def _how_to_restore(place: str) -> str:
    """What to do where a file that ships with lmoe is damaged or missing."""
    return f"install lmoe again; in a checkout: git restore {place}"
