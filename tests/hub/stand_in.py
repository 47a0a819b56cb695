"""A stand-in of the Hugging Face hub on this machine: the calls that huggingface_hub makes to create, write and read.

Repositories live in memory. Small files come with the commit, safetensors by the LFS protocol, as on the hub.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_secret_that_nobody_may_see"
"""The only token that it takes."""
LARGE = ".safetensors"
DROP = -1
"""In place of a status: the connection breaks without an answer."""


@dataclass
class Repository:
    """Branches and commits of one model: name or SHA -> the files, by path."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Add a commit on a branch; returns its SHA."""
        sha = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Those of a branch or a commit."""
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class StandIn:
    """What is there, what was asked, and what is to fail.

    Args:
        url: where it listens.
        objects: contents of the LFS store by SHA-256.
        asked: method and path of each request.
        fails: (method, end of the path) -> statuses of the next answers to it, or DROP.
        received: every byte that was sent to it, but for the tokens in headers.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    fails: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    received: list[bytes] = field(default_factory=list)

    def uploads(self) -> int:
        """Number of objects that were sent to the LFS store."""
        return sum(method == "PUT" for method, _ in self.asked)


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """It listens while the block runs."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        self.hub.asked.append((self.command, path))
        self.hub.received += [self.path.encode(), body]
        for (method, end), statuses in self.hub.fails.items():
            if method == self.command and path.endswith(end) and statuses:
                return self._fail(statuses.pop(0))
        return self._answer(path, body)

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline(), 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _fail(self, status: int) -> None:
        if status == DROP:
            self.close_connection = True
            self.connection.close()
        else:
            self._json({"error": f"no, {self.headers.get('Authorization')}"}, status)  # an answer that tells the token

    def _answer(self, path: str, body: bytes) -> None:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if parts[0] == "lfs":
            self.hub.objects[parts[1]] = body
            return self._json({})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if parts[0] != "api":
            name = "/".join(parts[:2]).removesuffix(".git")
            if "info" in parts:
                return self._batch(json.loads(body))
            return self._resolve(name, parts[3], "/".join(parts[4:]))
        name, rest = "/".join(parts[2:4]), parts[4:]
        repository = self._repository(name)
        if repository is None:
            return None
        if not rest or rest[0] == "revision":
            return self._info(name, repository, rest[1] if rest else "main")
        if rest[0] == "tree":
            return self._tree(repository, rest[1])
        if not self._may_write():
            return None
        if rest[0] == "preupload":
            return self._preupload(repository, rest[1], json.loads(body))
        if rest[0] == "branch":
            repository.branches.setdefault(rest[1], repository.branches["main"])
            return self._json({})
        if rest[0] != "commit":
            return self._json({"error": f"{path} is not stood in for"}, 404)
        return self._commit(name, repository, rest[1], body)

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_write(self) -> bool:
        if not self._signed_in():
            self._json({"error": "Invalid username or password."}, 401)
        return self._signed_in()

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._signed_in()):
            self._json({"error": "Repository not found"}, 404 if self._signed_in() else 401, code="RepoNotFound")
            return None
        return found

    def _create(self, asked: dict) -> None:
        if not self._may_write():
            return
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = made = Repository(private=asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}"})

    def _info(self, name: str, repository: Repository, revision: str) -> None:
        if (files := repository.files(revision)) is None:
            return self._json({"error": "Revision not found"}, 404, code="RevisionNotFound")
        sha = repository.branches.get(revision, revision)
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    def _tree(self, repository: Repository, revision: str) -> None:
        entries = []
        for path, content in (repository.files(revision) or {}).items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git_id(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 100}
            entries.append(entry)
        self._json(entries)

    def _preupload(self, repository: Repository, revision: str, asked: dict) -> None:
        there = repository.files(revision) or {}
        answers = []
        for file in asked["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
            if path in there:
                answer["oid"] = _sha256(there[path]) if path.endswith(LARGE) else _git_id(there[path])
            answers.append(answer)
        self._json({"files": answers})

    def _batch(self, asked: dict) -> None:
        if not self._may_write():
            return
        objects = []
        for one in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
            objects.append(one | ({} if one["oid"] in self.hub.objects else upload))
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.files(branch) or {})
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.received.append(files[value["path"]])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (repository := self._repository(name)) is None:
            return
        content = (repository.files(revision) or {}).get(path)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, code="EntryNotFound")
        etag = _sha256(content) if path.endswith(LARGE) else _git_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.branches.get(revision, revision)}
        self._send(200, content, headers | {"Content-Type": "application/octet-stream"})

    def _json(self, content: object, status: int = 200, *, code: str | None = None) -> None:
        headers = {"Content-Type": "application/json"} | ({} if code is None else {"X-Error-Code": code})
        self._send(status, json.dumps(content).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
