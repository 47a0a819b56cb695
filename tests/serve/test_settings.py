"""Settings of a server: checked all at once, read from a file, keys from the environment alone."""

import pytest
from starlette.datastructures import Headers

from lmoe.errors import ConfigError
from lmoe.serve.http.auth import Keys, keys_of
from lmoe.serve.http.problem import Problem
from lmoe.serve.settings import ServeSettings, read_settings


def test_all_settings_that_cannot_be_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        ServeSettings(
            port=70_000,
            max_queue=-1,
            timeout=float("nan"),
            name=" ",
            warm_up="no",  # type: ignore[arg-type]
            max_n=True,
            log_file="/no/such/folder/log",
            allow_origin=("example.org", "https://example.org/page", "*", "http://localhost:3000"),
        )
    said = str(caught.value)
    names = ["port", "max_queue", "timeout", "name", "warm_up", "max_n", "log_file"]
    assert all(f"{name} is" in said for name in names)
    assert said.count("allow_origin is") == 2
    assert len(caught.value.problems) == 9


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_it_is_known_whether_others_can_reach_a_server(host, local):
    assert ServeSettings(host=host).is_local is local


def test_a_file_holds_settings_with_either_spelling_and_what_speaks(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("max-queue: 3\ntimeout: 5\nallow_origin: '*'\nmodel: tiny\nexperts: {code: DIR}\n")
    settings, others = read_settings(str(file), ["model", "experts"])
    assert ServeSettings(**settings) == ServeSettings(max_queue=3, timeout=5, allow_origin=("*",))
    assert others == {"model": "tiny", "experts": {"code": "DIR"}}


def test_a_file_with_unknown_keys_or_secrets_is_refused_by_name(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("max_que: 3\napi_key: abc\nadmin_token: def\nport: 1\nport: 1\n")
    with pytest.raises(ConfigError):
        read_settings(str(file))
    file.write_text("max_que: 3\napi_key: abc\nadmin_token: def\n")
    with pytest.raises(ConfigError) as caught:
        read_settings(str(file))
    first, second, third = caught.value.problems
    assert "max_que: no such key; did you mean max_queue?" in first
    assert "api_key: keys and tokens do not belong into a file" in second and "LMOE_API_KEY" in second
    assert "admin_token" in third
    assert "abc" not in str(caught.value) and "def" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such file"):
        read_settings(str(tmp_path / "none.yaml"))


def test_keys_come_from_the_environment_or_from_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("three\n\nfour\n")
    keys = keys_of({"LMOE_API_KEY": "one, two", "LMOE_ADMIN_TOKEN_FILE": str(file)})
    assert keys == Keys(api=(b"one", b"two"), admin=(b"three", b"four"))
    assert "one" not in repr(keys)
    assert keys_of({}) == Keys()


def test_a_key_that_is_set_and_empty_does_not_open_the_server(tmp_path):
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError) as caught:
        keys_of({"LMOE_API_KEY": " ", "LMOE_ADMIN_TOKEN_FILE": str(tmp_path / "empty")})
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="LMOE_API_KEY and LMOE_API_KEY_FILE are both set"):
        keys_of({"LMOE_API_KEY": "a", "LMOE_API_KEY_FILE": "b"})
    with pytest.raises(ConfigError, match="LMOE_API_KEY_FILE"):
        keys_of({"LMOE_API_KEY_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Bearer ke", "Bearer keyy", "Basic key", "Bearer kéy"])
def test_only_the_whole_key_opens(given):
    keys = Keys(api=(b"key",))
    keys.check(Headers({"authorization": "bearer key"}))
    with pytest.raises(Problem) as caught:
        keys.check(Headers({"authorization": given}))
    assert caught.value.status == 401
