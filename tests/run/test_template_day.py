"""The day that a chat template reads is that on which the run begins."""

from datetime import date

import pytest

from lmoe.errors import ConfigError
from lmoe.run.template_day import with_template_day
from tests.data.chats.templates import DATED
from tests.micro import saved_config


def dated(tmp_path) -> list[str]:
    file = tmp_path / "dated.jinja"
    file.write_text(DATED, encoding="utf-8")
    return [f"data.chat_template={file}", "data.max_length=64", "trainer.max_steps=2"]


def test_a_run_says_and_saves_the_day_on_which_it_begins(train, tmp_path):
    done = train(*dated(tmp_path))
    assert done.code == 0, done.text
    today = date.today().isoformat()
    assert f"the chat template reads the date: {today} for this run (data.template_date)" in done.text
    assert saved_config(done.run)["data"]["template_date"] == today


def test_a_run_that_goes_on_keeps_its_day(train, tmp_path):
    done = train(*dated(tmp_path), "data.template_date=2020-01-31")
    assert done.code == 0, done.text
    again = train(f"resume={done.run}", "data=custom", *dated(tmp_path)[:2], "trainer.max_steps=3")
    assert again.code == 0, again.text
    assert "the chat template reads the date: 2020-01-31" in again.text
    assert saved_config(done.run)["data"]["template_date"] == "2020-01-31"


def test_a_day_for_a_template_that_reads_none_is_refused(micro, tokenizer_of_micro):
    config = micro.config("data.template_date=2020-01-31")
    with pytest.raises(ConfigError, match=r"data\.template_date=2020-01-31 has no effect"):
        with_template_day(config, tokenizer_of_micro, None)
    assert with_template_day(micro.config(), tokenizer_of_micro, None).data.template_date is None


def test_another_process_of_a_run_takes_the_day_that_the_first_has_written(micro, tokenizer_of_micro, tmp_path):
    tokenizer_of_micro.chat_template = DATED
    (tmp_path / "config.yaml").write_text("data:\n  template_date: '2020-01-31'\n", encoding="utf-8")
    assert with_template_day(micro.config(), tokenizer_of_micro, tmp_path).data.template_date == "2020-01-31"
    (tmp_path / "config.yaml").write_text("data:\n  template_date: null\n", encoding="utf-8")
    today = date.today().isoformat()
    assert with_template_day(micro.config(), tokenizer_of_micro, tmp_path).data.template_date == today


@pytest.fixture
def tokenizer_of_micro(micro):
    from lmoe.backbones.load import load_tokenizer

    return load_tokenizer(micro.config().backbone)
