"""Python that comes with a model or stands in a module runs only where this command line, or this call, says so.

A file may ask for it, whoever wrote it: a run's config.yaml, an adapter, an experiment. It is refused with the name of
what would run.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lmoe.errors import LmoeError
from lmoe.files.places import expanded, is_dir, is_file
from lmoe.files.resources import BASES
from lmoe.files.run_folder import CONFIG_FILE
from lmoe.files.small_file import Reader, texts
from lmoe.files.wording import quoted

TRUST, ATTENTION, OWN_CALLBACKS = "backbone.trust_remote_code", "backbone.attn_implementation", "callbacks_from"
"""Settings that count only on the command line."""
NAMES_CODE = ("config.json", "tokenizer_config.json")
"""Files of a model or a tokenizer whose auto_map names Python beside them."""
KERNEL = "/"
"""In a name of attention: it is none of Transformers' own but a kernel, whose code is fetched from the hub and run."""
GENERATE = "custom_generate/generate.py"
"""Which Transformers runs without being told by a config."""
MODEL_FILE = Reader(finite=False, most=64_000_000, what="such a file")


def trust_problems(config: Any, named: Collection[str]) -> list[str]:
    """Code that a config asks to run, and no setting of this command line.

    Args:
        config: of a run, or of a pre-training, which runs none.
        named: keys that this command line sets.
    """
    problems, backbone = [], getattr(config, "backbone", None)
    place = str(Path(config.resume) / CONFIG_FILE) if backbone is not None and config.resume else "a file"
    if backbone is not None and backbone.trust_remote_code and TRUST not in named:
        code = would_run(backbone.model_name) or f"whatever Python {backbone.model_name} brings"
        problems.append(
            f"{TRUST}=true is set by {place}, and not on this command line: {code} would run. Where you trust it, add "
            f"{TRUST}=true"
        )
    attention = None if backbone is None else backbone.attn_implementation
    if attention is not None and KERNEL in attention and ATTENTION not in named:
        problems.append(
            f"{ATTENTION}={attention} is set by {place}, and not on this command line: it names a kernel, whose code "
            f"would be fetched from the hub and run. Where you trust it, add {ATTENTION}={attention}"
        )
    given = getattr(config, "callbacks_from", None)
    if given is not None and OWN_CALLBACKS not in named:
        problems.append(
            f"callbacks_from={given} is set by a file; its code is run only where the command line itself says "
            "callbacks_from=…"
        )
    return problems


def would_run(model_name: str, tokenizer: Path | None = None) -> str | None:
    """What Python would run with a model that is trusted, in words; None: a local folder that names none.

    Args:
        model_name: hub name, local folder, or a base that has a name of ours.
        tokenizer: another folder with a tokenizer that is loaded too.
    """
    folder = expanded(model_name)
    found: list[str] = []
    if is_dir(folder):
        found += list(_named_code(folder))
    elif model_name not in BASES:
        found.append(f"whatever Python {model_name} brings")
    found += list(_named_code(tokenizer)) if tokenizer is not None else []
    return ", ".join(dict.fromkeys(found)) or None


def kernels(content: dict[str, Any]) -> dict[str, str]:
    """Kernels that a model's config.json names: key -> name on the hub."""
    return {key: text for key, text in texts(content) if "_implementation" in key and KERNEL in text}


def _named_code(folder: Path) -> Iterator[str]:
    if is_file(folder / GENERATE):
        yield str(folder / GENERATE)
    for name in NAMES_CODE:
        if not is_file(folder / name):
            continue
        try:
            content = MODEL_FILE.json(folder / name)
        except LmoeError:
            continue  # it is refused by name when it is loaded
        if named_kernels := dict.fromkeys(kernels(content).values()):
            yield f"{', '.join(map(quoted, named_kernels))} ({folder / name})"
        entries = content.get("auto_map")
        named = entries.values() if isinstance(entries, dict) else [] if entries is None else [entries]
        flat = [item for entry in named for item in (entry if isinstance(entry, list) else [entry]) if item]
        if flat:
            yield f"{', '.join(dict.fromkeys(map(str, flat)))} ({folder / name})"
