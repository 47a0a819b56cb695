"""The routes of a server over a scripted engine: OpenAI's shapes, mixtures by request, limits, keys, experts."""

import asyncio
import json
import random
import re
from contextlib import contextmanager

import pytest
from starlette.testclient import TestClient

from lmoe.serve.http.app import make_app
from lmoe.serve.http.auth import Keys
from lmoe.serve.http.service import Phase
from lmoe.serve.request import Condition, Mixable, Refused, RefusedError
from tests.serve.fake_engine import SAID, FakeEngine, service, tokenizer

ASK = {"model": "lmoe", "messages": [{"role": "user", "content": "Hi!"}]}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ADMIN = {"Authorization": "Bearer admin-token"}


@contextmanager
def client(engine=None, **options):
    """A client of a server, which it has as `service`."""
    made = service(engine or FakeEngine(), **options)
    with TestClient(make_app(made), raise_server_exceptions=True) as found:
        found.service, found.engine = made, made.engine  # type: ignore[attr-defined]
        yield found


@pytest.fixture(scope="module")
def shared():
    with client() as found:
        yield found


def events(response) -> list:
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    return error


def test_a_conversation_is_answered_as_openai_does(shared):
    response = shared.post(CHAT, json=ASK)
    body = response.json()
    assert body["object"] == "chat.completion" and body["model"] == "lmoe"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    asked = shared.engine.asked[-1].request
    assert "Hi!" in tokenizer().decode(asked.prompt)
    tokens = len(tokenizer().encode(SAID, add_special_tokens=False)) + 1
    used = {"prompt_tokens": len(asked.prompt), "completion_tokens": tokens}
    assert body["usage"] == used | {"total_tokens": sum(used.values())}
    assert response.headers["x-request-id"].startswith("req-")
    assert "lmoe" not in body


def test_a_stream_holds_the_same_answer_and_ends_in_usage_and_done(shared):
    got = events(shared.post(CHAT, json=ASK | {"stream": True, "stream_options": {"include_usage": True}}))
    assert got.pop() == "[DONE]"
    used = got.pop()
    assert used["choices"] == [] and used["usage"]["completion_tokens"] > 5
    deltas = [one["choices"][0]["delta"] for one in got]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {} and got[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(delta.get("content", "") for delta in deltas) == SAID
    assert {one["object"] for one in got} == {"chat.completion.chunk"}
    assert len({one["id"] for one in got}) == 1


def test_several_answers_have_seeds_of_their_own_and_come_side_by_side(shared):
    before = len(shared.engine.asked)
    got = events(shared.post(CHAT, json=ASK | {"stream": True, "n": 3, "seed": 7}))
    assert [one.request.sampling.seed for one in shared.engine.asked[before:]] == [7, 8, 9]
    order = [one["choices"][0]["index"] for one in got[:-1]]
    assert order != sorted(order)
    for index in range(3):
        own = [one["choices"][0] for one in got[:-1] if one["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == SAID


def test_texts_and_tokens_are_continued(shared):
    ids = tokenizer().encode("one two", add_special_tokens=False)
    one = shared.post(COMPLETIONS, json={"prompt": "one two", "echo": True}).json()
    assert one["object"] == "text_completion"
    assert one["choices"][0]["text"].startswith("one two" + SAID[:3])
    assert one["choices"][0]["finish_reason"] == "length"  # 16 tokens, as in OpenAI's API
    assert list(shared.engine.asked[-1].request.prompt) == tokenizer()("one two")["input_ids"]
    both = shared.post(COMPLETIONS, json={"prompt": [ids, ids], "n": 2, "max_tokens": 60}).json()
    assert [(choice["index"], choice["text"]) for choice in both["choices"]] == [(n, SAID) for n in range(4)]
    assert both["usage"]["prompt_tokens"] == 2 * len(ids)
    assert len(shared.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}).json()["choices"]) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it_and_frees_the_row(shared, stream):
    ask = ASK | {"stop": ["rld €", "never"], "stream": stream}
    response = shared.post(CHAT, json=ask)
    if stream:
        chunks = [one["choices"][0] for one in events(response)[:-1]]
        text, why = "".join(one["delta"].get("content", "") for one in chunks), chunks[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, why = choice["message"]["content"], choice["finish_reason"]
    assert (text, why) == ("Hello, wö", "stop")
    running = shared.engine.asked[-1]
    assert running.cancelled
    assert len(running.script) > len(tokenizer().encode("Hello, wörld €", add_special_tokens=False))


def test_an_answer_that_is_cut_by_its_length_says_so(shared):
    body = shared.post(CHAT, json=ASK | {"max_completion_tokens": 2}).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_log_probabilities_come_in_the_shape_of_each_api(shared):
    body = shared.post(CHAT, json=ASK | {"logprobs": True, "top_logprobs": 2}).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content) == SAID.encode()
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    whole = shared.post(COMPLETIONS, json={"prompt": "a", "logprobs": 1, "max_tokens": 60}).json()
    logprobs = whole["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(content)
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"][-1] == len(SAID) - 1
    streamed = events(shared.post(CHAT, json=ASK | {"logprobs": True, "stream": True}))[:-1]
    said = [one["choices"][0]["logprobs"] for one in streamed]
    assert sum(len(one["content"]) for one in said if one) == len(content)
    cut = shared.post(CHAT, json=ASK | {"logprobs": True, "stop": " wörld"}).json()["choices"][0]
    assert "".join(one["token"] for one in cut["logprobs"]["content"]) == cut["message"]["content"] == "Hello,"


@pytest.mark.parametrize(
    ("names", "mixture"),
    [
        ({"model": "lmoe"}, None),
        ({}, None),
        ({"model": "code"}, {"code": 1.0}),
        ({"model": "code*0.7+chat*0.3"}, {"code": 0.7, "chat": 0.3}),
        ({"model": "code + chat * -2"}, {"code": 1.0, "chat": -2.0}),
        ({"model": "code*1e+1+chat*1e-1"}, {"code": 10.0, "chat": 0.1}),
        ({"experts": {"chat": 0.25}}, {"chat": 0.25}),
        ({"model": "lmoe", "experts": {"chat": 1, "code": 0}}, {"chat": 1.0, "code": 0.0}),
    ],
)
def test_a_request_names_its_mixture(shared, names, mixture):
    ask = {"messages": ASK["messages"], "lmoe": True, **names}
    body = shared.post(CHAT, json=ask).json()
    assert shared.engine.asked[-1].request.mixture == mixture
    assert body["lmoe"] == {"weights": mixture, "load": {"0": 0.25, "1": 0.75}}
    assert body["model"] == names.get("model", "lmoe")
    last = events(shared.post(CHAT, json=ask | {"stream": True}))[-2]
    assert last["lmoe"] == body["lmoe"]


def weighed(tokens: list[dict], text: str) -> list[tuple[str, dict]]:
    """Each token's part of a text, and what the experts weighed there."""
    ends = [token["offset"] for token in tokens[1:]] + [len(text)]
    return [(text[token["offset"] : end], token["weights"]) for token, end in zip(tokens, ends, strict=True)]


def test_tokens_come_with_the_weights_of_the_experts_where_each_was_chosen_streamed_or_not():
    def weigh(number: int) -> dict[str, float]:
        return {"code": number / 100, "chat": 0.0, "sql": 1 - number / 100}

    with client(FakeEngine(weigh=weigh)) as found:
        ask = ASK | {"lmoe": "tokens", "experts": {"code": 1}}
        body = found.post(CHAT, json=ask).json()
        assert body["lmoe"] == {"weights": {"code": 1.0}, "load": {"0": 0.25, "1": 0.75}}
        (choice,) = body["choices"]
        ids = tokenizer().encode(SAID, add_special_tokens=False)
        whole = choice["lmoe"]["tokens"]
        assert [token["id"] for token in whole] == ids and choice["logprobs"] is None
        assert [token["weights"] for token in whole] == [
            {name: round(weight, 6) for name, weight in weigh(number).items() if weight} for number in range(len(ids))
        ]
        parts = weighed(whole, SAID)
        assert "".join(part for part, _ in parts) == SAID
        chunks = [one["choices"][0] for one in events(found.post(CHAT, json=ask | {"stream": True}))[:-1]]
        streamed = [token for chunk in chunks for token in chunk.get("lmoe", {}).get("tokens", [])]
        assert streamed == whole
        assert all("lmoe" in chunk for chunk in chunks if chunk["delta"].get("content"))
        text = found.post(COMPLETIONS, json={"prompt": "a", "lmoe": "tokens", "max_tokens": 60, "logprobs": 1}).json()
        (choice,) = text["choices"]
        assert choice["lmoe"]["tokens"] == whole and len(choice["logprobs"]["tokens"]) == len(whole)
        two = found.post(CHAT, json=ask | {"n": 2}).json()
        assert "lmoe" not in two
        for choice in two["choices"]:
            assert choice["lmoe"] == {"tokens": whole, "weights": {"code": 1.0}, "load": {"0": 0.25, "1": 0.75}}
        stopped = found.post(CHAT, json=ask | {"stop": " wörld"}).json()["choices"][0]
        assert "".join(part for part, _ in weighed(stopped["lmoe"]["tokens"], "Hello,")) == "Hello,"
        plain = found.post(CHAT, json=ASK | {"lmoe": True}).json()
        assert "lmoe" not in plain["choices"][0] and not found.engine.asked[-1].request.expert_weights


def test_the_server_says_what_it_is_and_lets_do():
    with client(keys=Keys(api=(b"key",), admin=(b"admin-token",)), upload_size=7) as found:
        about = found.get("/v1/server", headers={"Authorization": "Bearer key"}).json()
        assert about == {
            "object": "server",
            "version": about["version"],
            "model": "lmoe",
            "chat": True,
            "context": 512,
            "max_tokens": 64,
            "own_mixture": "code*0.5+chat*0.5",
            "own_weights": {"code": 0.5, "chat": 0.5},
            "experts": ["code", "chat"],
            "weights_by_request": True,
            "experts_change": True,
            "admin": False,
            "upload_size": 7,
        }
        assert found.get("/v1/server", headers=ADMIN).json()["admin"] is True


@pytest.mark.parametrize(
    ("names", "status", "said"),
    [
        ({"model": "gpt-4"}, 404, "no model or expert gpt-4; the experts are chat, code; the model is lmoe"),
        ({"model": "code*0.5+maths*0.5"}, 404, "maths"),
        ({"experts": {"maths": 1}}, 404, "no expert maths"),
        ({"model": "code*nan"}, 400, "must be a finite number"),
        ({"model": "code*1_0"}, 400, "must be a finite number"),
        ({"model": "code*0.5+code*0.5"}, 400, "names code twice"),
        ({"model": "code*0.5+"}, 400, "names no expert"),
        ({"model": "code", "experts": {"chat": 1}}, 400, "both name a mixture"),
        ({"experts": {}}, 400, "experts is empty"),
        ({"experts": {"code": "much"}}, 400, "the weight of code is much, must be a finite number"),
        ({"experts": {"code": True}}, 400, "must be a finite number"),
        ({"experts": {"code": 10**400}}, 400, "must be a finite number"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(shared, names, status, said):
    assert said in error_of(shared.post(CHAT, json=ASK | names), status)["message"]


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temprature": 1}, "temprature", "no such field; did you mean temperature?"),
        ({"temperature": 3}, "temperature", "temperature is 3, must be less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "must be a valid number"),
        ({"temperature": 1e-9}, "temperature", "0, or 1e-06 or more"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "older name of max_completion_tokens"),
        ({"n": 9}, "n", "n is 9, must be at most 8"),
        ({"n": True}, "n", "valid integer"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"stop": ""}, "stop[0]", "at least 1 character"),
        ({"top_logprobs": 3}, "top_logprobs", "no effect without logprobs"),
        ({"tool_choice": "required"}, "tool_choice", "must be none or auto"),
        ({"response_format": {"type": "json_object"}}, "response_format", "plain text"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "no id of a token"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias", "there is no token 9999999"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "no effect without stream"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "'user'"),
        ({"messages": [{"role": "user"}]}, "messages[0]", "content is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "only text"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"lmoe": "words"}, "lmoe", "lmoe is words, must be true, false, or tokens"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_what_may_be(shared, change, param, said):
    error = error_of(shared.post(CHAT, json=ASK | change), 400)
    assert error["param"] == param
    assert said in error["message"]


def test_all_problems_of_a_body_come_at_once(shared):
    message = error_of(shared.post(CHAT, json={"temperature": 9, "n": 0, "suffix": "x"}), 400)["message"]
    assert all(name in message for name in ("temperature", "n is 0", "messages is missing", "suffix"))


def test_what_has_no_effect_and_what_says_nothing_is_taken(shared):
    idle = {"user": "me", "metadata": {}, "store": False, "parallel_tool_calls": True, "service_tier": "auto"}
    plain = {"response_format": {"type": "text"}, "seed": None, "tools": None, "tool_choice": "none"}
    assert shared.post(CHAT, json=ASK | idle | plain).status_code == 200


def test_turns_as_clients_give_them_back_and_texts_in_parts_reach_the_template(shared):
    answer = shared.post(CHAT, json=ASK).json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}]
    turns = [{"role": "developer", "content": "Be brief."}, *ASK["messages"], answer | {"tool_calls": None}]
    response = shared.post(CHAT, json={"messages": [*turns, {"role": "user", "content": parts}]})
    assert response.status_code == 200, response.text
    asked = tokenizer().decode(shared.engine.asked[-1].request.prompt)
    assert SAID in asked and "And\nnow?" in asked and "Be brief." in asked


@pytest.mark.parametrize(
    ("content", "headers", "status", "said"),
    [
        (b"{", {}, 400, "malformed JSON"),
        (b"", {}, 400, "malformed JSON"),
        (b"[1]", {}, 400, "must be a JSON object"),
        (b'{"temperature": NaN}', {}, 400, "NaN is no finite number"),
        (b'{"temperature": 1e999}', {}, 400, "too large"),
        (b'{"n": ' + b"9" * 5000 + b"}", {}, 400, "digits"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", {}, 400, "nested more than"),
        (b"[" * 90_000, {}, 400, ""),
        (b'{"n": 1, "n": 2}', {}, 400, "comes twice"),
        (b'{"messages": "\\ud800"}', {}, 400, "surrogate"),
        (b"\xff\xfe", {}, 400, "UTF-8"),
        (b"a" * 200_000, {}, 413, "more than 100,000 bytes"),
        (b"{}", {"content-type": "text/plain"}, 415, "Content-Type: application/json"),
    ],
)
def test_a_body_that_is_none_is_refused(shared, content, headers, status, said):
    response = shared.post(CHAT, content=content, headers={"content-type": "application/json"} | headers)
    assert said in error_of(response, status)["message"]


def test_a_body_of_no_stated_length_is_measured_as_it_comes(shared):
    def chunks():
        for _ in range(1_000):
            yield b" " * 10_000

    response = shared.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
    error_of(response, 413)


def test_a_prompt_beyond_the_context_is_refused_and_an_answer_gets_what_room_there_is():
    with client(FakeEngine(context=40)) as found:
        long = error_of(found.post(COMPLETIONS, json={"prompt": [5] * 40}), 400)
        assert long["code"] == "context_length_exceeded"
        assert long["message"] == "the prompt has 40 tokens, and the model holds 40 with the answer; shorten it"
        found.post(COMPLETIONS, json={"prompt": [5] * 37, "max_tokens": 30})
        assert found.engine.asked[-1].request.max_tokens == 3
        assert "no token 99999999" in error_of(found.post(COMPLETIONS, json={"prompt": [99999999]}), 400)["message"]
        found.post(CHAT, json=ASK)
        assert found.engine.asked[-1].request.max_tokens < 40
    with client(FakeEngine(context=40, limited_by_cache=True)) as found:
        long = error_of(found.post(COMPLETIONS, json={"prompt": [5] * 40}), 400)
        assert "this server holds 40 with the answer, by its cache_tokens; shorten it" in long["message"]


def test_a_template_that_refuses_says_why(shared):
    own, shared.service.prompts._reading.chat_template = (
        shared.service.prompts._reading.chat_template,
        "{{ raise_exception('turns must alternate') }}",
    )
    try:
        error = error_of(shared.post(CHAT, json=ASK), 400)
        tools = [{"type": "function", "function": {"name": "look"}}]
        without = error_of(shared.post(CHAT, json=ASK | {"tools": tools}), 400)
    finally:
        shared.service.prompts._reading.chat_template = own
    assert "turns must alternate" in error["message"] and error["param"] == "messages"
    assert "shows the model no tools" in without["message"]


def test_tools_and_calls_reach_the_template_with_arguments_as_objects(shared):
    reading = shared.service.prompts._reading
    own, reading.chat_template = (
        reading.chat_template,
        "{{ tools | tojson }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}",
    )
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    turns = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "1", "content": "blue"})
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    try:
        response = shared.post(CHAT, json={"messages": turns, "tools": tools})
        bad = [*turns[:1], {"role": "assistant", "tool_calls": [call | {"function": {"name": "f", "arguments": "{"}}]}]
        error = error_of(shared.post(CHAT, json={"messages": bad}), 400)
    finally:
        reading.chat_template = own
    assert response.status_code == 200, response.text
    asked = tokenizer().decode(shared.engine.asked[-1].request.prompt)
    assert '"name": "look"' in asked and 'look({"at": "sky"})' in asked
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (RefusedError(Refused.full, "64 requests wait, which is all there is room for"), 429),
        (RefusedError(Refused.stopping, "the server is stopping"), 503),
        (RefusedError(Refused.invalid, "temperature cannot be", "temperature"), 400),
        (RefusedError(Refused.failed, "/secret/path has no tensor"), 500),
        (ValueError("/secret/path"), 500),
    ],
    ids=["full", "stopping", "invalid", "failed", "bug"],
)
def test_what_the_engine_refuses_has_its_status_and_no_detail_of_a_failure(refusal, status):
    with client(FakeEngine(refusal=refusal)) as found:
        response = found.post(CHAT, json=ASK)
        error = error_of(response, status)
        assert "secret" not in response.text
        assert ("retry-after" in response.headers) == (status in (429, 503))
        if status == 500:
            request_id = response.headers["x-request-id"]
            assert request_id in error["message"]
            assert [one for one, _ in found.service.log.failures] == [request_id]
        assert found.get("/health").status_code == 200


def failing_at(number: int, error: Exception):
    async def step(at: int) -> None:
        if at == number:
            raise error

    return step


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_midway_ends_the_answer_in_an_error(stream):
    with client(FakeEngine(step=failing_at(2, RuntimeError("/secret")))) as found:
        response = found.post(CHAT, json=ASK | {"stream": stream, "n": 2})
        if stream:
            last = events(response)[-1]
            assert last["error"]["type"] == "server_error"
        else:
            error_of(response, 500)
        assert "secret" not in response.text
        assert len(found.service.log.failures) == 1
        assert all(one.cancelled for one in found.engine.asked)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(stream):
    async def step(at: int) -> None:
        await asyncio.sleep(0 if at < 2 else 30)

    with client(FakeEngine(step=step), timeout=0.2) as found:
        response = found.post(CHAT, json=ASK | {"stream": stream})
        error = events(response)[-1]["error"] if stream else error_of(response, 504)
        assert error["type"] == "timeout_error" and "0.2 s" in error["message"]
        assert found.engine.asked[0].cancelled


def test_the_models_are_the_served_one_and_each_expert(shared):
    listed = shared.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [one["id"] for one in listed["data"]] == ["lmoe", "code", "chat"]
    assert shared.get("/v1/models/code").json()["id"] == "code"
    assert shared.get("/v1/models/code*0.5+chat*0.5").json()["lmoe"]["weights"] == {"code": 0.5, "chat": 0.5}
    assert error_of(shared.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_experts_that_no_request_may_weigh_are_no_models():
    decides = Mixable(names=["code", "chat"], own_weights=None, by_request=False, changes=False)
    with client(FakeEngine(mixable_of=decides)) as found:
        assert [one["id"] for one in found.get("/v1/models").json()["data"]] == ["lmoe"]
        for name in ("code", "code*0.5+chat*0.5"):
            assert "no experts can be weighed here" in error_of(found.get(f"/v1/models/{name}"), 404)["message"]
        assert [one["name"] for one in found.get("/v1/experts").json()["data"]] == ["code", "chat"]


def test_a_prompt_without_tokens_is_refused_under_the_name_of_its_field():
    assert tokenizer().encode("") == []
    with client() as found:
        assert error_of(found.post(COMPLETIONS, json={"prompt": ""}), 400)["param"] == "prompt"
        found.service.prompts._reading.chat_template = "{{ '' }}"
        assert error_of(found.post(CHAT, json=ASK), 400)["param"] == "messages"


def test_experts_are_added_replaced_renamed_and_removed_while_the_server_runs():
    with client(keys=Keys(admin=(b"admin-token",))) as found:
        found.headers.update(ADMIN)
        added = found.post("/v1/experts", json={"name": "sql", "place": "dir"})
        assert (added.status_code, added.json()["name"]) == (201, "sql")
        error_of(found.post("/v1/experts", json={"name": "sql", "place": "dir"}), 409)
        assert (
            "does not fit" in error_of(found.post("/v1/experts", json={"name": "x", "place": "broken"}), 400)["message"]
        )
        assert found.put("/v1/experts/sql", json={"place": "other"}).json()["version"] == 2
        assert found.post("/v1/experts/sql/roll_back").json()["version"] == 1
        error_of(found.post("/v1/experts/sql/roll_back"), 409)
        assert found.patch("/v1/experts/sql", json={"name": "db"}).json()["name"] == "db"
        assert found.post("/v1/experts/db/unload").json()["loaded"] is False
        assert found.delete("/v1/experts/db").json() == {"object": "expert", "name": "db", "deleted": True}
        error_of(found.delete("/v1/experts/db"), 404)
        error_of(found.get("/v1/experts/db"), 404)
        names = [one["name"] for one in found.get("/v1/experts").json()["data"]]
        assert names == ["code", "chat"]


CHANGES = [
    ("POST", "/v1/experts"),
    ("PUT", "/v1/experts/code"),
    ("PATCH", "/v1/experts/code"),
    ("DELETE", "/v1/experts/code"),
    ("POST", "/v1/experts/code/unload"),
    ("POST", "/v1/experts/code/roll_back"),
    ("POST", "/v1/experts/code/files"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_nobody_changes_experts_without_the_admin_token(method, path):
    body = {"name": "code", "place": "elsewhere"}
    with client(keys=Keys(api=(b"key",))) as found:
        key = {"Authorization": "Bearer key"}
        assert "LMOE_ADMIN_TOKEN" in error_of(found.request(method, path, json=body, headers=key), 403)["message"]
    with client(keys=Keys(api=(b"key",), admin=(b"admin-token",))) as found:
        error_of(found.request(method, path, json=body, headers=key), 401)
        error_of(found.request(method, path, json=body), 401)
        assert found.engine.places == {"code": ["a"], "chat": ["b"]} and "code" in found.engine.loaded


def test_nobody_asks_without_a_key_where_there_is_one():
    with client(keys=Keys(api=(b"one", b"two"), admin=(b"admin-token",))) as found:
        for given in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}, {"Authorization": "one"}):
            response = found.post(CHAT, json=ASK, headers=given)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/models", "/v1/experts", "/metrics", "/version", "/nothing"):
                error_of(found.get(path, headers=given), 401)
        for given in ("one", "two", "admin-token"):
            assert found.post(CHAT, json=ASK, headers={"Authorization": f"Bearer {given}"}).status_code == 200
        assert found.get("/health").json() == {"status": "ready"}


def test_other_paths_and_methods_are_refused_in_the_same_shape(shared):
    assert error_of(shared.get("/v1/nothing"), 404)["code"] == "not_found"
    response = shared.get(CHAT)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert {*shared.delete("/v1/experts").headers["allow"].split(", ")} == {"GET", "HEAD", "POST"}
    error_of(shared.options("/v1/models"), 405)
    assert shared.head("/v1/models").status_code == 200
    error_of(shared.post(f"{CHAT}/", json=ASK), 404)


def test_health_follows_the_life_of_the_server(shared):
    try:
        for phase, status in ((Phase.starting, 503), (Phase.stopping, 503), (Phase.ready, 200)):
            shared.service.phase = phase
            response = shared.get("/health")
            assert (response.status_code, response.json()) == (status, {"status": str(phase)})
            asked = shared.post(CHAT, json=ASK)
            assert asked.status_code == (503 if phase is Phase.stopping else 200)
    finally:
        shared.service.phase = Phase.ready


def test_health_notices_an_engine_that_does_not_answer(shared):
    try:
        for condition in (Condition.restarting, Condition.failing):
            shared.engine.condition = condition
            response = shared.get("/health")
            assert (response.status_code, response.json()) == (503, {"status": str(condition)})
    finally:
        shared.engine.condition = Condition.ready
    assert shared.get("/health").status_code == 200


def test_the_metrics_name_the_route_of_a_request_that_is_turned_away_before_it():
    with client(keys=Keys(api=(b"key",))) as found:
        found.post(CHAT, json=ASK)
        found.get("/v1/models/some*0.5", headers={"Authorization": "Bearer no"})
        found.get(CHAT, headers={"Authorization": "Bearer key"})
        text = found.get("/metrics", headers={"Authorization": "Bearer key"}).text
    for route, status in ((CHAT, 401), ("/v1/models/{name}", 401), (CHAT, 405)):
        assert f'lmoe_requests_total{{route="{route}",status="{status}"}} 1.0' in text


def test_no_expert_takes_the_name_of_the_whole_model():
    with client(keys=Keys(admin=(b"admin-token",))) as found:
        for call, path in ((found.post, "/v1/experts"), (found.patch, "/v1/experts/code")):
            body = {"name": "lmoe"} | ({"place": "/some/where"} if call == found.post else {})
            assert "is the name of the served model" in error_of(call(path, json=body, headers=ADMIN), 409)["message"]


def test_the_metrics_count_what_was_done():
    with client() as found:
        found.post(CHAT, json=ASK | {"model": "code*0.7+chat*0"})
        found.get("/v1/" + "x" * 100)
        text = found.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['lmoe_requests_total{route="/v1/chat/completions",status="200"}'] == "1.0"
    assert values['lmoe_requests_total{route="none",status="404"}'] == "1.0"
    assert values['lmoe_expert_requests_total{expert="code"}'] == "1.0"
    assert 'lmoe_expert_requests_total{expert="chat"}' not in values
    assert (values["lmoe_running"], values["lmoe_waiting"], values["lmoe_cached_tokens"]) == ("2.0", "1.0", "30.0")
    for name in ("time_to_first_token", "time_per_token", "queue_time"):
        assert values[f"lmoe_{name}_seconds_count"] == "1.0"
    assert float(values["lmoe_generated_tokens_total"]) > 5
    assert float(values["process_resident_memory_bytes"]) > 1e6


def test_the_log_says_what_was_done_and_nothing_of_what_was_said():
    with client() as found:
        response = found.post(CHAT, json=ASK | {"experts": {"code": 0.7}})
        found.post(CHAT, json=ASK | {"temperature": 9})
        done, refused = found.service.log.lines
    assert done["id"] == response.headers["x-request-id"]
    assert (done["route"], done["status"], done["experts"]) == (CHAT, 200, {"code": 0.7})
    assert done["prompt_tokens"] > 0 and done["generated_tokens"] > 5 and not done["gone"]
    assert (refused["status"], refused["code"]) == (400, "invalid_value")
    text = json.dumps([done, refused])
    assert "Hi!" not in text and "Hello" not in text


def test_pages_of_other_origins_may_ask_only_where_they_are_allowed():
    origin = {"Origin": "https://example.org"}
    preflight = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    with client() as found:
        assert "access-control-allow-origin" not in found.post(CHAT, json=ASK, headers=origin).headers
        assert found.options(CHAT, headers=preflight).status_code == 405
    with client(allow_origin=("https://example.org",), keys=Keys(api=(b"key",))) as found:
        assert found.options(CHAT, headers=preflight).status_code == 200
        response = found.post(CHAT, json=ASK, headers=origin)  # it can read why
        assert response.status_code == 401
        assert response.headers["access-control-allow-origin"] == "https://example.org"


FIELDS = (
    *("model", "messages", "tools", "tool_choice", "stop", "stream", "stream_options", "max_tokens", "temperature"),
    *("top_p", "n", "seed", "logprobs", "top_logprobs", "logit_bias", "experts", "top_k", "lmoe", "prompt", "echo"),
    *("response_format", "repetition_penalty", "presence_penalty", "nonsense", "name", "place"),
)


def any_value(draw: random.Random, depth: int = 0):
    kinds = [
        lambda: draw.choice([None, True, False, 0, 1, -1, 2**40, -(2**70), 10**400, 0.5, 1e300, "", "code", "lmoe"]),
        lambda: draw.choice(["role", "user", "/etc/passwd", "x" * 3_000, "\x00", "💥", "code*nan", "a*b*c+", "+" * 50]),
        lambda: [any_value(draw, depth + 1) for _ in range(draw.randrange(3))],
        lambda: {draw.choice([*FIELDS, "role", "content", "type", "code"]): any_value(draw, depth + 1) for _ in "ab"},
        lambda: [{"role": draw.choice(["user", "tool"]), "content": any_value(draw, depth + 1)}],
    ]
    return draw.choice(kinds if depth < 4 else kinds[:2])()


def test_no_body_ends_the_server_fails_or_learns_a_path():
    draw, statuses = random.Random(3), []
    paths = re.compile(r"(/home|/usr|/tmp|/root|site-packages|\.py\b|Traceback)")
    with client(keys=Keys(admin=(b"admin-token",))) as found:
        for number in range(600):
            body = {name: any_value(draw) for name in draw.sample(FIELDS, draw.choice((0, 1, 1, 2, 4, 6)))}
            body = {**ASK, **body} if draw.random() < 0.7 else body
            method, path = draw.choice([("POST", CHAT)] * 4 + [("POST", COMPLETIONS), *CHANGES])
            content = json.dumps(body).encode()
            if draw.random() < 0.2:
                content = content[: draw.randrange(len(content) + 1)] + draw.randbytes(3)
            headers = {"content-type": "application/json"} | (ADMIN if number % 2 else {})
            response = found.request(method, path, content=content, headers=headers)
            statuses.append(response.status_code)
            assert response.status_code < 500, (method, path, content, response.text)
            assert not paths.search(response.text), (content, response.text)
        assert not found.service.log.failures
        assert found.post(CHAT, json=ASK).status_code == 200
    assert statuses.count(400) > 100 and statuses.count(200) > 10
