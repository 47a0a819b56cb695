"""What lmoe states to need is read from a checkout, or from the metadata of an installed package."""

from email.message import Message

from lmoe.run import packages
from lmoe.run.packages import installed_version, stated_packages

LINES = ["torch>=2.11", 'tomli; python_version < "3"', 'peft>=0.18; extra == "peft"', 'lmoe[peft]; extra == "dev"']


def test_a_checkout_is_asked_for_its_file_as_its_metadata_may_be_old(monkeypatch):
    monkeypatch.setattr(packages, "requires", lambda name: [])
    stated = stated_packages()
    assert "torch" in {r.name for r in stated.needed}
    assert {"dev", "eval", "gguf", "launchers", "peft", "quantised", "serve", "study", "triton"} == set(stated.extras)
    assert all(stated.extras.values())
    assert "lmoe" not in {r.name for r in stated.extras["dev"]}


def test_an_installed_package_is_asked_for_its_metadata(monkeypatch, tmp_path):
    about = Message()
    about["Provides-Extra"], about["Provides-Extra"] = "peft", "dev"
    monkeypatch.setattr(packages, "requires", lambda name: LINES)
    monkeypatch.setattr(packages, "metadata", lambda name: about)
    stated = stated_packages(tmp_path / "pyproject.toml")
    assert [r.name for r in stated.needed] == ["torch"]
    assert {extra: [r.name for r in group] for extra, group in stated.extras.items()} == {"peft": ["peft"], "dev": []}


def test_a_package_that_is_missing_has_no_version():
    assert installed_version("no-such-package-of-anybody") is None
    assert installed_version("torch")
