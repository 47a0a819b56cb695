"""llama.cpp for Node (the npm package node-llama-cpp): found or installed, and asked."""

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "3.21.1"
PACKAGE = "node-llama-cpp"
BINARIES = {("Linux", "x86_64"): "@node-llama-cpp/linux-x64", ("Linux", "aarch64"): "@node-llama-cpp/linux-arm64"}
"""Packages with what was compiled, by system and processor."""
LEAST_NODE = 20
MOST_SECONDS = 180
"""Of the installation of a package, or of all prompts of one model."""
CANNOT_RUN = 3
"""Exit code of the script where what was compiled does not run on this machine."""
SCRIPT = Path(__file__).with_suffix(".mjs")


class Unavailable(Exception):
    """The engine is not here and cannot be had; the message says why."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Prompt:
    """What an engine is asked.

    Args:
        text, ids: the same, for Transformers.
    """

    text: str
    ids: list[int]


@dataclass(slots=True, frozen=True, kw_only=True)
class Answer:
    """What it says.

    Args:
        ids: of the prompt's text.
        generated: tokens behind the prompt's ids, the last one perhaps a token that ends an answer.
    """

    ids: list[int]
    generated: list[int]


@dataclass(slots=True, frozen=True, kw_only=True)
class LlamaCpp:
    """The engine.

    Args:
        node: the program.
        packages: folder with node_modules.
    """

    node: str
    packages: Path

    def answers(self, model: Path, prompts: Sequence[Prompt], tokens: int, *, lora: Path | None = None) -> list[Answer]:
        """Ask for the greedy tokens after each prompt, computed with a cache of keys and values in float32.

        Args:
            model, lora: GGUF files.
            tokens: at most, for each prompt.

        Raises:
            Unavailable: it does not run on this machine.
            RuntimeError: it fails, for instance because it refuses the file.
        """
        request: dict[str, Any] = {
            "model": str(model.resolve()),
            "lora": None if lora is None else str(lora.resolve()),
            "tokens": tokens,
            "prompts": [{"text": prompt.text, "ids": prompt.ids} for prompt in prompts],
        }
        with tempfile.TemporaryDirectory(prefix="engines") as place:
            asked, answered = Path(place, "request.json"), Path(place, "answer.json")
            asked.write_text(json.dumps(request), encoding="utf-8")
            command = [self.node, str(SCRIPT), str(self.packages), str(asked), str(answered)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
            if done.returncode == CANNOT_RUN:
                raise Unavailable(f"{PACKAGE} does not run on this machine: {done.stderr.strip()[-500:]}")
            if done.returncode or not answered.exists():
                raise RuntimeError(f"llama.cpp failed on {model.name}: {done.stderr.strip()[-2000:]}")
            found = json.loads(answered.read_text(encoding="utf-8"))
        return [Answer(ids=one["ids"], generated=one["generated"]) for one in found["answers"]]


def llama_cpp() -> LlamaCpp:
    """The engine, which is installed into the user's cache the first time (84 MB).

    Raises:
        Unavailable: no Node, no npm, no package for this machine, or no network.
    """
    node, binary = shutil.which("node"), BINARIES.get((platform.system(), platform.machine()))
    if node is None:
        raise Unavailable("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if not (major := version.removeprefix("v").partition(".")[0]).isdecimal() or int(major) < LEAST_NODE:
        raise Unavailable(f"node is {version or 'broken'}, must be at least {LEAST_NODE}")
    if binary is None:
        raise Unavailable(f"no compiled package is named for {platform.system()} on {platform.machine()}")
    packages = cache_folder() / f"{PACKAGE}-{VERSION}"
    if not (packages / "node_modules" / binary).is_dir():
        _install(packages, binary)
    return LlamaCpp(node=node, packages=packages)


def cache_folder() -> Path:
    """Where npm's packages are kept: lmoe/ in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lmoe"


def _install(packages: Path, binary: str) -> None:
    """Install under another name, then rename the folder.

    NOTE without --ignore-scripts it would compile for minutes where the binary is not there yet.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise Unavailable(f"npm is not installed, which would install {PACKAGE} into {packages}")
    print(f"installing {PACKAGE} {VERSION} into {packages} (84 MB)", flush=True)
    packages.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(packages, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="installing", dir=packages.parent) as place:
        new = Path(place, packages.name)
        new.mkdir()
        (new / "package.json").write_text('{"private": true}\n', encoding="utf-8")  # npm would search for one
        quiet = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund", "--no-update-notifier"]
        quiet += ["--fetch-retries=1", "--fetch-timeout=60000"]
        for package in (PACKAGE, binary):
            command = [npm, "install", "--save-exact", *quiet, f"{package}@{VERSION}"]
            try:
                done = subprocess.run(
                    command, cwd=new, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                raise Unavailable(f"npm did not install {package} within {MOST_SECONDS} s") from None
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.strip()]
                raise Unavailable(
                    f"npm could not install {package}@{VERSION}: {lines[0] if lines else 'no reason given'}"
                )
        os.replace(new, packages)
