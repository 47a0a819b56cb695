"""A callback of the user's own: its module is named on the command line, and nowhere else."""

import pytest

from tests.micro import saved_config

MODULE = """\
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

print("the module is run")


class Counts(Callback):
    def __init__(self, file: str, start: int = 0) -> None:
        self.file, self.steps = file, start

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps += 1

    def on_train_end(self, trainer, pl_module) -> None:
        with open(self.file, "a") as file:
            file.write(f"{self.steps} ")

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict) -> None:
        self.steps = state_dict["steps"]


class Saves(ModelCheckpoint):
    pass


class Other:
    pass
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a file that no test before has imported."""
    file = tmp_path / f"mine_{abs(hash(tmp_path))}.py"
    file.write_text(MODULE, encoding="utf-8")
    return file


def counting(module, tmp_path) -> tuple[str, ...]:
    return (f"+callbacks.counts._target_={module.stem}.Counts", f"+callbacks.counts.file={tmp_path / 'steps'}")


@pytest.mark.parametrize("by", ["file", "name"])
def test_it_is_called_and_on_resume_its_module_is_named_again(train, module, tmp_path, monkeypatch, by):
    monkeypatch.syspath_prepend(str(tmp_path))
    trust = f"callbacks_from={module if by == 'file' else module.stem}"
    done = train(trust, *counting(module, tmp_path), "+callbacks.counts.start=100", "trainer.max_steps=3")
    assert done.code == 0, done.text
    assert (tmp_path / "steps").read_text() == "103 "
    assert saved_config(done.run)["callbacks_from"] is None
    longer = (f"resume={done.run}", "trainer.max_steps=5")
    again = train(*longer, settings=False)
    assert again.code == 1
    assert f"callbacks.counts._target_ is '{module.stem}.Counts'; allowed: lightning.pytorch.callbacks." in again.text
    assert "callbacks_from=<module> on this command line" in again.text
    again = train(*longer, trust, settings=False)
    assert again.code == 0, again.text
    assert (tmp_path / "steps").read_text() == "103 105 "


def test_a_file_that_came_with_a_run_gives_no_trust(train, own_run, module, tmp_path):
    config = own_run / "config.yaml"
    text = config.read_text(encoding="utf-8")
    own = f"callbacks: {{c: {{_target_: {module.stem}.Counts, file: {tmp_path / 'steps'}}}}}"
    config.write_text(text.replace("callbacks: {}", own).replace("callbacks_from: null", f"callbacks_from: {module}"))
    done = train(f"resume={own_run}", settings=False)
    assert done.code == 1
    assert f"callbacks_from={module} is set by a file; its code is run only where the command line itself says" in (
        done.text
    )
    assert "the module is run" not in done.text


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("Nope", "is no callback of Lightning"),
        ("Other", "is no callback of Lightning"),
        ("Saves", "Saves writes checkpoints, which checkpoint=… decides; leave it out"),
        ("sub.Counts", "allowed: lightning.pytorch.callbacks.<class>, or"),
    ],
)
def test_what_cannot_work_is_named(train, module, target, said):
    done = train(f"callbacks_from={module}", f"+callbacks.mine._target_={module.stem}.{target}")
    assert done.code == 1
    assert said in done.text and "callbacks.mine" in done.text and "Traceback" not in done.text
    assert not done.run.exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("callbacks_from=no_such_module", "+callbacks.mine._target_=no_such_module.A"), "no such module; install it"),
        (("callbacks_from=/no/such.py", "+callbacks.mine._target_=such.A"), "callbacks_from=/no/such.py: no such file"),
        (("callbacks_from=torch",), "callbacks_from=torch has no effect: no callback is of it"),
        (("callbacks_from=torch", "optim.lr=-1"), "config: 2 problems"),
    ],
)
def test_a_module_that_is_not_there_or_not_used_is_named(train, overrides, said):
    done = train(*overrides)
    assert done.code == 1
    assert said in done.text and "Traceback" not in done.text
