"""Public packages that are not there skip the tests that read them, and fail them where they are required."""

import shutil

import pytest

from tests.public_packages import PINS, READY, importable, pinned, public_folder


def test_packages_that_are_missing_skip_a_test_and_name_the_command(tmp_path, monkeypatch):
    monkeypatch.delenv("LMOE_REQUIRE_PACKAGES", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"are not in .*run `make setup`.*tests\.public_packages"):
        public_folder(tmp_path)


def test_packages_of_other_versions_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("LMOE_REQUIRE_PACKAGES", raising=False)
    shutil.copyfile(PINS, tmp_path / READY)
    assert public_folder(tmp_path) == tmp_path
    with (tmp_path / READY).open("a", encoding="utf-8") as file:
        file.write("# another comment\n")
    assert public_folder(tmp_path) == tmp_path
    with (tmp_path / READY).open("a", encoding="utf-8") as file:
        file.write("other==1\n")
    with pytest.raises(pytest.skip.Exception, match="other versions"):
        public_folder(tmp_path)


def test_packages_that_are_required_fail_a_test_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("LMOE_REQUIRE_PACKAGES", "1")
    with pytest.raises(pytest.fail.Exception, match="run `make setup`"):
        public_folder(tmp_path)


def test_a_package_that_is_imported_brings_none_of_those_beside_it(tmp_path):
    packages, links = tmp_path / "packages", tmp_path / "links"
    for name in ("one", "one-1.0.dist-info", "one_more", "one_more-1.0.dist-info", "other", "other-2.dist-info"):
        (packages / name).mkdir(parents=True)
    links.mkdir()
    shutil.copyfile(PINS, packages / READY)
    assert sorted(found.name for found in importable("one", links, packages).iterdir()) == ["one", "one-1.0.dist-info"]


def test_every_package_is_pinned():
    lines = pinned(PINS)
    assert len(lines) >= 5 and all(line.count("==") == 1 for line in lines)


def test_what_reads_gguf_is_pinned_as_the_environment_has_it():
    constraints = (PINS.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in PINS.read_text(encoding="utf-8").splitlines() if line.startswith("gguf==")] == [
        line for line in constraints if line.startswith("gguf==")
    ]
