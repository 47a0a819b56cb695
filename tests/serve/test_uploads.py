"""Experts that come as files: only theirs, as large as they may be, and gone when nobody reads them."""

import asyncio
import copy
import errno
import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

import lmoe
from lmoe.serve.engine.mixing import BlendMixing, RunMixing
from lmoe.serve.http import uploads
from lmoe.serve.http.app import make_app
from lmoe.serve.http.auth import Keys
from lmoe.serve.http.service import Service
from lmoe.serve.settings import ServeSettings
from tests.peft_experts import write_peft
from tests.serve.engines import alone, answered, asked, serving
from tests.serve.fake_engine import FakeEngine, LogLines, prompts, service
from tests.tiny_models import randomise, tiny_model

ADMIN = {"Authorization": "Bearer admin-token"}
KEYS = Keys(admin=(b"admin-token",))
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"tensors"}
URL = "/v1/experts/sql/files"


def form(files) -> list:
    return [("files", (name, content)) for name, content in (files.items() if isinstance(files, dict) else files)]


@contextmanager
def client(engine=None, **options):
    made = service(engine or FakeEngine(), **({"keys": KEYS, "upload_size": 10_000} | options))
    with TestClient(make_app(made), headers=ADMIN) as found:
        found.service, found.engine = made, made.engine  # type: ignore[attr-defined]
        yield found


def kept(made: Service) -> list[Path]:
    """Folders of uploads that are there."""
    root = made.uploads._root
    return [] if root is None or not root.exists() else sorted(root.iterdir())


def test_an_expert_comes_as_files_and_its_folder_goes_with_it():
    with client() as found:
        answer = found.post(URL, files=form(FILES))
        assert (answer.status_code, answer.json()["name"]) == (201, "sql")
        [place] = found.engine.places["sql"]
        assert {file.name: file.read_bytes() for file in Path(place).iterdir()} == FILES
        assert Path(place).stat().st_mode & 0o077 == 0 and Path(place).parent.stat().st_mode & 0o077 == 0
        found.patch("/v1/experts/sql", json={"name": "db"})
        assert Path(place).exists()
        found.delete("/v1/experts/db")
        assert not Path(place).exists() and kept(found.service) == []


def test_uploads_go_on_where_their_folder_was_cleaned_away():
    with client() as found:
        found.post(URL, files=form(FILES))
        shutil.rmtree(found.service.uploads._root)
        assert found.post(URL.replace("sql", "other"), files=form(FILES)).status_code == 201


def test_a_disk_that_is_full_is_a_507_also_for_what_was_held_back(monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(ExitStack):
        closed = 0

        def close(self):
            super().close()
            self.closed += 1
            if self.closed == len(FILES) + 1:  # of the last file
                full()

    with client() as found:
        with monkeypatch.context() as patch:
            patch.setattr(uploads.tempfile, "mkdtemp", full)
            assert found.post(URL, files=form(FILES)).status_code == 507
        monkeypatch.setattr(uploads, "ExitStack", Full)
        answer = found.post(URL, files=form(FILES))
        assert answer.status_code == 507 and "No space left" in answer.json()["error"]["message"]


def test_all_uploads_go_when_the_server_ends():
    with client() as found:
        found.post(URL, files=form(FILES))
        root = found.service.uploads._root
        assert root.exists()
    assert not root.exists()


def test_an_expert_that_was_replaced_keeps_its_files_while_there_is_a_way_back():
    class Forgetting(FakeEngine):
        def folders(self):
            return {Path(place) for places in self.places.values() for place in places[-2:]}

    with client(Forgetting()) as found:
        found.post(URL, files=form(FILES))
        place = Path(found.engine.places["sql"][0])
        found.put("/v1/experts/sql", json={"place": "other"})
        assert place.exists()
        found.put("/v1/experts/sql", json={"place": "third"})
        assert not place.exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": b"{}"}, "the files of one expert are adapter_config.json (of PEFT)"),
        ({"adapter_model.safetensors": b""}, "got adapter_model.safetensors"),
        (FILES | {"lmoe_config.json": b"{}"}, "the files of one expert are"),
        (FILES | {"adapter_model.bin": b""}, "adapter_model.bin is no file of an expert"),
        (FILES | {"evil.py": b""}, "evil.py is no file of an expert"),
        (FILES | {"../x.safetensors": b""}, "without folders in their names"),
        (FILES | {"/etc/x.safetensors": b""}, "without folders in their names"),
        (FILES | {"a\\x.safetensors": b""}, "no file of an expert"),
        (FILES | {".safetensors": b""}, "no file of an expert"),
        (FILES | {"x.safetensors\n": b""}, "no file of an expert"),
        (FILES | {"ADAPTER_CONFIG.JSON": b""}, "no file of an expert"),
        ([*FILES.items(), ("adapter_config.json", b"{}")], "adapter_config.json comes twice"),
        ({}, "Content-Type: multipart/form-data"),
    ],
)
def test_other_files_than_those_of_an_expert_are_refused_and_leave_nothing(files, said):
    with client() as found:
        answer = found.post(URL, files=form(files))
        assert answer.status_code in (400, 415) and said in answer.json()["error"]["message"]
        assert kept(found.service) == [] and "sql" not in found.engine.places


def test_what_is_too_large_is_turned_away_as_it_comes_and_leaves_nothing():
    with client() as found:
        files = FILES | {"adapter_model.safetensors": b"x" * 20_000}
        request = httpx.Request("POST", "http://testserver" + URL, files=form(files), headers=ADMIN)
        stated = found.post(URL, files=form(files))
        body, kind = request.read(), request.headers["content-type"]

        def chunks():
            for at in range(0, len(body), 700):
                yield body[at : at + 700]

        unstated = found.post(URL, content=chunks(), headers={"content-type": kind})
        for answer in (stated, unstated):
            assert answer.status_code == 413 and "more than 10,000 bytes" in answer.json()["error"]["message"]
        assert kept(found.service) == []


def test_uploads_are_off_unless_they_are_asked_for_and_names_are_checked_before_files_come():
    with client(upload_size=0) as found:
        answer = found.post(URL, files=form(FILES))
        assert answer.status_code == 403 and "upload_size is 0" in answer.json()["error"]["message"]
    assert ServeSettings().upload_size == 0
    with client() as found:
        for name in ("code", "lmoe"):
            assert found.post(f"/v1/experts/{name}/files", files=form(FILES)).status_code == 409
        assert found.post(URL, files=form(FILES), headers={"Authorization": "Bearer no"}).status_code == 401
        assert found.service.uploads._root is None  # nothing was received
    with client(keys=Keys()) as found:
        assert found.post(URL, files=form(FILES)).status_code == 403


def test_files_that_do_not_arrive_in_time_are_refused():
    async def slow():
        yield b"--b"
        await asyncio.sleep(30)

    async def work():
        made = service(FakeEngine(), keys=KEYS, upload_size=10_000, timeout=0.2)
        transport = httpx.ASGITransport(make_app(made))
        kind = {"content-type": "multipart/form-data; boundary=b"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=ADMIN | kind) as found:
            return made, await found.post(URL, content=slow())

    made, answer = asyncio.run(work())
    assert answer.status_code == 408 and kept(made) == []


@pytest.fixture(scope="module")
def base():
    model = tiny_model(max_position_embeddings=256)
    model.generation_config.eos_token_id = None
    return model


def over_http(model, mixing, work):
    """What some work with a client returns, of a server over a real engine."""

    async def with_client(engine):
        settings = ServeSettings(upload_size=1_000_000)
        made = Service(engine=engine, prompts=prompts(), settings=settings, keys=KEYS, log=LogLines())  # type: ignore[arg-type]
        transport = httpx.ASGITransport(make_app(made))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=ADMIN) as found:
            try:
                return await work(found, engine, made)
            finally:
                made.uploads.close()

    return serving(model, mixing, with_client)


def test_an_uploaded_expert_answers_as_one_from_a_folder(base, tmp_path):
    folder = write_peft(base, tmp_path / "new", seed=5)
    files = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    model = copy.deepcopy(base)
    blend = lmoe.Blend(model, {"first": write_peft(base, tmp_path / "first", seed=1)})

    async def work(found, engine, made):
        assert (await found.post(URL, files=form(files))).status_code == 201
        ids, _ = await answered(engine, asked([1, 2, 3], mixture={"sql": 1.0}))
        await found.post("/v1/experts/sql/unload")
        again, _ = await answered(engine, asked([1, 2, 3], mixture={"sql": 1.0}))  # read from its folder once more
        await found.delete("/v1/experts/sql")
        return ids, again, kept(made)

    ids, again, left = over_http(model, BlendMixing(model, blend), work)
    other = copy.deepcopy(base)
    lmoe.Blend(other, {"new": folder}, {"new": 1.0})
    assert ids == again == alone(other, asked([1, 2, 3])) and left == []


def test_damaged_files_are_a_400_without_a_path_and_leave_nothing(base, tmp_path):
    folder = write_peft(base, tmp_path / "new", seed=5)
    config, tensors = ((folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors"))
    damaged = {
        "cut": (config, tensors[:-100]),
        "no tensors": (config, b""),
        "garbage": (config, b"\xff" * 500),
        "a huge header": (config, (2**62).to_bytes(8, "little") + b"{}"),
        "no JSON": (b"{", tensors),
        "an option that cannot be": (json.dumps(json.loads(config) | {"use_dora": True}).encode(), tensors),
        "a deep config": (b"[" * 50_000, tensors),
    }
    model = copy.deepcopy(base)
    blend = lmoe.Blend(model, {"first": write_peft(base, tmp_path / "first", seed=1)})

    async def work(found, engine, made):
        answers = {}
        for name, (settings, content) in damaged.items():
            files = {"adapter_config.json": settings, "adapter_model.safetensors": content}
            answers[name] = await found.post(URL, files=form(files))
        return answers, kept(made), list(blend.names), await answered(engine, asked([1, 2, 3]))

    answers, left, names, _ = over_http(model, BlendMixing(model, blend), work)
    for name, answer in answers.items():
        assert answer.status_code == 400, (name, answer.text)
        assert "/tmp" not in answer.text and "lmoe-uploads" not in answer.text, name
    assert left == [] and names == ["first"]


def test_a_trained_mixture_takes_no_expert(base):
    model = tiny_model(max_position_embeddings=256)
    lmoe.inject(model, {"lora_r": 4, "num_experts": 2, "top_k": 1}, {})
    randomise(model, std=0.3)

    async def work(found, engine, made):
        answer = await found.post(URL, files=form(FILES))
        return answer, (await found.get("/v1/server")).json()

    answer, about = over_http(model.eval(), RunMixing(model), work)
    assert answer.status_code == 409 and not about["experts_change"] and not about["weights_by_request"]
    assert about["experts"] == ["expert0", "expert1"] and about["own_weights"] is None
