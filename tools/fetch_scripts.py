"""Fetch the scripts of others that are checked in, from npm, each by the digest of its package.

    python -m tools.fetch_scripts

A script is one file that a page holds whole. To take another version, change its entry here (`npm view NAME@VERSION
dist.integrity` says the digest), run this, and commit what it writes.
"""

import base64
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(slots=True, frozen=True, kw_only=True)
class Script:
    """A file of a package.

    Args:
        package, version: of npm.
        integrity: of the package, as npm says it.
        member: the script in the package.
        licence: its licence in the package.
        folder: where both go, below the root.
    """

    package: str
    version: str
    integrity: str
    member: str
    licence: str
    folder: str

    @property
    def place(self) -> Path:
        """The script in this checkout."""
        return ROOT / self.folder / Path(self.member).name

    @property
    def licence_place(self) -> Path:
        """The place of its licence, with the name and version on top."""
        return ROOT / self.folder / f"{Path(self.member).name}.licence.txt"

    def files(self, archive: bytes) -> dict[Path, bytes]:
        """What is checked in, from the package.

        Raises:
            ValueError: another package than the pinned one.
        """
        kind, _, wanted = self.integrity.partition("-")
        found = base64.b64encode(hashlib.new(kind, archive).digest()).decode()
        if found != wanted:
            raise ValueError(f"{self.package} {self.version}: its {kind} is {found}, and {wanted} is pinned")
        with tarfile.open(fileobj=io.BytesIO(archive)) as package:
            script, licence = (_member(package, name) for name in (self.member, self.licence))
        head = (
            f"{self.package} {self.version}, {Path(self.member).name}\nsha256 {hashlib.sha256(script).hexdigest()}\n\n"
        )
        return {self.place: script, self.licence_place: head.encode() + licence}


SCRIPTS = (
    Script(
        package="chart.js",
        version="4.5.1",
        integrity="sha512-GIjfiT9dbmHRiYi6Nl2yFCq7kkwdkp1W/lp2J99rX0yo9tgJGn3lKQATztIjb5tVtevcBtIdICNWqlq5+E8/Pw==",
        member="package/dist/chart.umd.min.js",
        licence="package/LICENSE.md",
        folder="lmoe/report/pages/vendor",
    ),
    Script(
        package="axe-core",
        version="4.11.0",
        integrity="sha512-ilYanEU8vxxBexpJd8cWM4ElSQq4QctCLKih0TSfjIfCQTeyH/6zVrmIJfLPrKTKJRbiG+cfnZbQIjAlJmF1jQ==",
        member="package/axe.min.js",
        licence="package/LICENSE",
        folder="tests/browser/vendor",
    ),
)
"""Chart.js draws the charts of pages that have some; axe-core looks for what keeps people out, in tests alone."""


def main() -> None:
    """Write every script and its licence."""
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            name = f"{script.package}@{script.version}"
            done = subprocess.run(
                ["npm", "pack", "--silent", "--pack-destination", folder, name],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            )
            archive = (Path(folder) / done.stdout.strip()).read_bytes()
        for place, content in script.files(archive).items():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            sys.stdout.write(f"{place.relative_to(ROOT)}: {len(content):,} bytes\n")


def _member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(name)
    assert file is not None, f"{name} is a folder"
    return file.read()


if __name__ == "__main__":
    main()
