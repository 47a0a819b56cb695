"""What all routes of a server share."""

import time
from dataclasses import dataclass, field
from enum import StrEnum

from lmoe.serve.http.auth import Keys
from lmoe.serve.http.metrics import Metrics
from lmoe.serve.http.playground import Playground
from lmoe.serve.http.request_log import RequestLog
from lmoe.serve.http.uploads import Uploads
from lmoe.serve.prompts import Prompts
from lmoe.serve.request import Engine
from lmoe.serve.settings import ServeSettings


class Phase(StrEnum):
    """Of a server's life."""

    starting = "starting"
    ready = "ready"
    stopping = "stopping"


@dataclass(slots=True, kw_only=True)
class Service:
    """A server's parts.

    Args:
        engine: what answers.
        prompts: what makes prompts for it.
        settings: of the server.
        keys: who may ask.
        metrics, log: what it says of its work.
        phase: of its life.
        created: when it began, in seconds since 1970.
        playground: its page; None: it has none.
        uploads: experts that came as files.
    """

    engine: Engine
    prompts: Prompts
    settings: ServeSettings
    keys: Keys = field(default_factory=Keys)
    metrics: Metrics = field(default_factory=Metrics)
    log: RequestLog = field(default_factory=RequestLog)
    phase: Phase = Phase.ready
    created: int = field(default_factory=lambda: int(time.time()))
    playground: Playground | None = None
    uploads: Uploads = field(default_factory=Uploads)

    def experts(self) -> list[str]:
        """Names of the experts that come, go, and are weighed by requests or by a router of the blend."""
        return [expert.name for expert in self.engine.experts()]

    def weighable(self) -> list[str]:
        """Names of the experts that a request may ask for as a model, or in a mixture."""
        return self.experts() if self.engine.mixable.by_request else []

    def close(self) -> None:
        """Let go of files, folders and threads; harmless when that is done."""
        self.prompts.close()
        self.log.close()
        self.uploads.close()
        if self.playground is not None:
            self.playground.close()
