"""Scripts of others come from the package that was pinned, or not at all."""

import base64
import hashlib
import io
import tarfile

import pytest

from tools.fetch_scripts import SCRIPTS, Script


def package(**files: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as made:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def test_a_package_with_another_digest_is_refused_and_the_right_one_gives_script_and_licence() -> None:
    archive = package(script=b"run()", licence=b"free")
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    script = Script(
        package="a",
        version="1.0",
        integrity=f"sha512-{digest}",
        member="package/script",
        licence="package/licence",
        folder="x",
    )
    files = script.files(archive)
    assert files[script.place] == b"run()" and files[script.licence_place].startswith(b"a 1.0, script\nsha256 ")
    assert files[script.licence_place].endswith(b"\n\nfree")
    with pytest.raises(ValueError, match="a 1.0: its sha512 is .* is pinned"):
        script.files(archive + b" ")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.package)
def test_what_is_checked_in_is_what_was_fetched(script: Script) -> None:
    licence = script.licence_place.read_text(encoding="utf-8")
    assert licence.startswith(f"{script.package} {script.version}, ")
    assert hashlib.sha256(script.place.read_bytes()).hexdigest() in licence
    assert ("Mozilla Public License" if script.package == "axe-core" else "MIT License") in licence
