"""The routes of a server, and what stands in front of them: keys, errors in OpenAI's shape, the log, the metrics."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmoe import __version__
from lmoe.files.wording import shown
from lmoe.serve.http.answers import decided_json, expert_json, list_json, model_json, server_json
from lmoe.serve.http.auth import OPEN
from lmoe.serve.http.bodies import ChatBody, CompletionBody, NewExpert, OtherName, OtherPlace, body_of
from lmoe.serve.http.limits import read_body
from lmoe.serve.http.mixture_names import mixture_of
from lmoe.serve.http.playground import check_host
from lmoe.serve.http.problem import RETRY_AFTER, Problem, failure, refused
from lmoe.serve.http.questions import chat_question, completion_question
from lmoe.serve.http.request_log import GONE, Record
from lmoe.serve.http.responding import ClientGone, Responding, unless_gone
from lmoe.serve.http.service import Phase, Service
from lmoe.serve.http.uploads import receive_expert
from lmoe.serve.request import Condition, Decided, RefusedError

RECORD = "lmoe.record"
"""In the scope of a request."""
EXPERT = "/v1/experts/{name}"
PAGE = "/"
PLACEHOLDER = re.compile(r"\{(\w+):path\}")
SHOWN_HEADERS = ["x-request-id", "retry-after"]
Changed = TypeVar("Changed")
Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service) -> Starlette:
    """The ASGI application of a server; see docs/SERVING.md for its routes.

    Args:
        service: what answers, and its settings.
    """
    routes = Routes(service)
    every = routes.all()
    middleware = [Middleware(Front, service=service, routes=every)]
    if service.settings.allow_origin:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=service.settings.allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=SHOWN_HEADERS,
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=every,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, Problem: _problem},
        lifespan=_lifespan(service),
    )
    app.router.redirect_slashes = False
    return app


def _lifespan(service: Service) -> Callable[[Starlette], Any]:
    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            service.close()

    return lifespan


class Routes:
    """What each route does.

    Args:
        service: what answers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Route]:
        """Routes with what each of their methods does."""
        return [
            _route("/v1/chat/completions", POST=self.chat),
            _route("/v1/completions", POST=self.completions),
            _route("/v1/server", GET=self.server),
            _route("/v1/models", GET=self.models),
            _route("/v1/models/{name:path}", GET=self.model),
            _route("/v1/experts", GET=self.experts, POST=self.add_expert),
            _route(
                EXPERT,
                GET=self.expert,
                PUT=self.replace_expert,
                PATCH=self.rename_expert,
                DELETE=self.remove_expert,
            ),
            _route(f"{EXPERT}/unload", POST=self.unload_expert),
            _route(f"{EXPERT}/roll_back", POST=self.roll_back_expert),
            _route(f"{EXPERT}/files", POST=self.upload_expert),
            _route("/health", GET=self.health),
            _route("/version", GET=self.version),
            _route("/metrics", GET=self.metrics),
            *([] if self._service.playground is None else [_route(PAGE, GET=self.page)]),
        ]

    async def page(self, _: Request) -> Response:
        """Give the playground."""
        assert self._service.playground is not None
        return self._service.playground.response()

    async def server(self, request: Request) -> Response:
        """Say what the server is, and what it lets whoever asks do."""
        return JSONResponse(server_json(self._service, admin=self._service.keys.let_change(request.headers)))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        self._check_open()
        body = body_of(ChatBody, await read_body(request, self._service.settings))
        question = await unless_gone(request.receive, chat_question(self._service, body))
        return await Responding(service=self._service, question=question, record=_record(request)).response(
            request.receive
        )

    async def completions(self, request: Request) -> Response:
        """Continue one or several texts."""
        self._check_open()
        body = body_of(CompletionBody, await read_body(request, self._service.settings))
        question = await unless_gone(request.receive, completion_question(self._service, body))
        return await Responding(service=self._service, question=question, record=_record(request)).response(
            request.receive
        )

    async def models(self, _: Request) -> Response:
        """List what can be asked as a model: the served one, and each expert where requests may weigh them."""
        names = [self._service.settings.name, *self._service.weighable()]
        return JSONResponse(list_json([model_json(name, self._service.created) for name in names]))

    async def model(self, request: Request) -> Response:
        """Describe what can be asked as a model, mixtures included."""
        name = request.path_params["name"]
        mixture = mixture_of(name, None, served=self._service.settings.name, known=self._service.weighable())
        described = model_json(name, self._service.created)
        return JSONResponse(described | {"lmoe": decided_json(Decided(weights=mixture))})

    async def experts(self, _: Request) -> Response:
        """List the experts, and how requests are mixed that name none."""
        found = list_json([expert_json(expert) for expert in self._service.engine.experts()])
        return JSONResponse(found | {"own_mixture": self._service.engine.own_mixture})

    async def expert(self, request: Request) -> Response:
        """Describe an expert."""
        return self._expert(request.path_params["name"])

    async def add_expert(self, request: Request) -> Response:
        """Take one more expert."""
        body = body_of(NewExpert, await self._admin_body(request))
        self._check_name(body.name)
        engine = self._service.engine

        async def added() -> Response:
            await engine.add(body.name, body.place)
            return self._expert(body.name, status=201)  # as it came, though another may rename or remove it at once

        return await self._change(added())

    async def upload_expert(self, request: Request) -> Response:
        """Take one more expert, whose files come with the request."""
        name, service = self._admin(request), self._service
        self._check_upload(name)
        folder = service.uploads.begin()

        async def added() -> Response:
            try:
                await service.engine.add(name, str(folder))
            finally:
                service.uploads.done(folder, service.engine.folders())
            return self._expert(name, status=201)

        try:
            settings = service.settings
            await receive_expert(request, folder, most=settings.upload_size, seconds=settings.timeout)
        except BaseException:
            service.uploads.done(folder, service.engine.folders())
            raise
        return await self._change(added())

    async def replace_expert(self, request: Request) -> Response:
        """Take another expert under a name."""
        name, body = request.path_params["name"], body_of(OtherPlace, await self._admin_body(request))
        await self._changed(self._service.engine.replace(name, body.place))
        return self._expert(name)

    async def rename_expert(self, request: Request) -> Response:
        """Give an expert another name."""
        name, body = request.path_params["name"], body_of(OtherName, await self._admin_body(request))
        self._check_name(body.name)
        await self._change(self._service.engine.rename(name, body.name))
        return self._expert(body.name)

    async def remove_expert(self, request: Request) -> Response:
        """Take an expert away."""
        name = self._admin(request)
        await self._changed(self._service.engine.remove(name))
        return JSONResponse({"object": "expert", "name": name, "deleted": True})

    async def unload_expert(self, request: Request) -> Response:
        """Drop the tensors of an idle expert."""
        name = self._admin(request)
        await self._change(self._service.engine.unload(name))
        return self._expert(name)

    async def roll_back_expert(self, request: Request) -> Response:
        """Go back to the expert before the last replacement."""
        name = self._admin(request)
        await self._changed(self._service.engine.roll_back(name))
        return self._expert(name)

    async def health(self, _: Request) -> Response:
        """Say whether requests are answered."""
        phase, condition = self._service.phase, self._service.engine.state().condition
        answers = phase is Phase.ready and condition is Condition.ready
        status = condition if phase is Phase.ready else phase
        return JSONResponse({"status": str(status)}, status_code=200 if answers else 503)

    async def version(self, _: Request) -> Response:
        """Say which version answers."""
        return JSONResponse({"name": "lmoe", "version": __version__})

    async def metrics(self, _: Request) -> Response:
        """Give Prometheus the counts."""
        text = self._service.metrics.exposition(self._service.engine.state())
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    def _expert(self, name: str, status: int = 200) -> Response:
        found = next((expert for expert in self._service.engine.experts() if expert.name == name), None)
        if found is None:
            raise Problem(404, f"there is no expert {name!r}"[:200], code="expert_not_found")
        return JSONResponse(expert_json(found), status_code=status)

    def _check_open(self) -> None:
        """Turn requests away from a server that stops.

        Raises:
            Problem: it does.
        """
        if self._service.phase is Phase.stopping:
            headers = {"retry-after": str(RETRY_AFTER)}
            raise Problem(503, "the server is stopping and takes no more requests", code="stopping", headers=headers)

    def _admin(self, request: Request) -> str:
        """The expert that an administrator names.

        Raises:
            Problem: it is none, or the server stops.
        """
        self._service.keys.check_admin(request.headers)
        self._check_open()
        return request.path_params.get("name", "")

    async def _admin_body(self, request: Request) -> bytes:
        self._admin(request)
        return await read_body(request, self._service.settings)

    def _check_name(self, name: str) -> None:
        """See that an expert does not hide behind the name of the whole model.

        Raises:
            Problem: it would.
        """
        if name == self._service.settings.name:
            raise Problem(409, f"{name} is the name of the served model; choose another", "name")

    def _check_upload(self, name: str) -> None:
        """See that an expert may come by this name, before its files do.

        Raises:
            Problem: uploads are off, experts do not come here, or the name is taken.
        """
        if not self._service.settings.upload_size:
            raise Problem(403, "experts cannot be uploaded here: the server's upload_size is 0", code="uploads_off")
        if not self._service.engine.mixable.changes:
            raise Problem(409, "experts neither come nor go here", code="experts_fixed")
        self._check_name(name)
        if name in self._service.experts():
            raise Problem(409, f"there is an expert {shown(name)} already; remove it, or choose another name", "name")

    async def _changed(self, change: Awaitable[None]) -> None:
        """A change of experts, behind which files that were uploaded may be nobody's."""

        async def whole() -> None:
            try:
                await change
            finally:
                self._service.uploads.sweep(self._service.engine.folders())

        await self._change(whole())

    async def _change(self, change: Awaitable[Changed]) -> Changed:
        """NOTE a change of experts goes on to its end when the client goes away: half of it would be neither."""
        return await asyncio.shield(asyncio.ensure_future(change))


def _route(path: str, **endpoints: Endpoint) -> Route:
    """A path with what each of its methods does."""

    async def endpoint(request: Request) -> Response:
        return await endpoints["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, endpoint, methods=list(endpoints))


def _record(request: Request) -> Record:
    return request.scope[RECORD]


class Front:
    """Stands in front of the routes: asks for the key, turns what goes wrong into a response, and writes the log.

    Args:
        app: the routes.
        service: what answers.
        routes: by which requests are counted, those too that never reach one.
    """

    def __init__(self, app: ASGIApp, service: Service, routes: Sequence[Route]) -> None:
        self._app, self._service, self._routes = app, service, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whatever happens in it, the server goes on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(method=scope["method"])
        if (route := next((one for one in self._routes if one.matches(scope)[0] is not Match.NONE), None)) is not None:
            record.route = PLACEHOLDER.sub(r"{\1}", route.path)
        scope[RECORD] = record

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", record.id.encode())]}
            await send(message)

        try:
            await self._answer(scope, receive, noted, record)
        except (ClientGone, ClientDisconnect):
            record.gone = True
        except asyncio.CancelledError:
            record.gone = True
            raise
        finally:
            record.status = record.status or (GONE if record.gone else 500)
            self._count(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        problem: Problem | None = None
        try:
            headers = Request(scope).headers
            if self._service.playground is not None:
                check_host(headers, self._service.settings)
            if scope["path"] not in OPEN and not self._is_page(scope):
                self._service.keys.check(headers)
            await self._app(scope, receive, send)
        except Problem as error:
            problem = error
        except RefusedError as error:
            problem = refused(error, record.id)
            if problem.status == 500:
                self._service.log.failure(record.id, error)
        except (ClientGone, ClientDisconnect):
            raise
        except Exception as error:  # no request may end the server, nor learn more than the log's name for it
            self._service.log.failure(record.id, error)
            problem = failure(record.id)
        if problem is not None and record.status == 0:
            record.code = problem.code
            await _response(problem)(scope, receive, send)

    def _is_page(self, scope: Scope) -> bool:
        """Whether the playground is asked for, in which there is nothing to hide."""
        return self._service.playground is not None and scope["path"] == PAGE

    def _count(self, record: Record) -> None:
        metrics = self._service.metrics
        metrics.requests.labels(record.route, str(record.status)).inc()
        metrics.whole.observe(record.seconds)
        metrics.gone.inc(record.gone)
        self._service.log.request(record)


def _response(problem: Problem) -> Response:
    return JSONResponse(problem.body(), status_code=problem.status, headers=problem.headers)


async def _problem(request: Request, error: Exception) -> Response:
    problem = cast(Problem, error)
    _record(request).code = problem.code
    return _response(problem)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: a path that is none, a method that a path lacks."""
    found = cast(HTTPException, error)
    headers = dict(found.headers or {})
    if found.status_code == 404:
        problem = Problem(404, "there is no such path; docs/SERVING.md lists them", code="not_found")
    elif found.status_code == 405:
        allowed = headers.get("Allow", "")
        said = f"{request.method[:20]} cannot be asked of this path; it takes {allowed}"
        problem = Problem(405, said, code="method_not_allowed", headers=headers)
    else:
        problem = Problem(found.status_code, found.detail, headers=headers)
    return await _problem(request, problem)
