"""What is wrong with a request of a client, and the status and the body that say so as OpenAI's API does."""

from typing import Any

from lmoe.serve.request import Refused, RefusedError

RETRY_AFTER = 1
"""Seconds after which a client that was turned away may ask again."""
STATUS = {
    Refused.invalid: 400,
    Refused.unknown_expert: 404,
    Refused.conflict: 409,
    Refused.full: 429,
    Refused.stopping: 503,
    Refused.unavailable: 503,
    Refused.failed: 500,
}
KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""Types of errors by status; of the others `invalid_request_error`."""


class Problem(Exception):
    """A request that is not answered.

    Args:
        status: of the response.
        message: for the client.
        param: field of the body that is to blame.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def failure(request_id: str) -> Problem:
    """The problem of a request that failed through no fault of the client, who learns where to ask about it."""
    message = f"the server failed at this request; its log has the reason under {request_id}"
    return Problem(500, message, code="server_failed")


def refused(error: RefusedError, request_id: str) -> Problem:
    """The problem of what the engine or the prompt's reader refuses."""
    if error.reason is Refused.failed:
        return failure(request_id)
    later = (Refused.full, Refused.stopping, Refused.unavailable)
    headers = {"retry-after": str(RETRY_AFTER)} if error.reason in later else {}
    codes = {Refused.unknown_expert: "model_not_found", Refused.full: "queue_full", Refused.unavailable: "unavailable"}
    code = codes.get(error.reason)
    return Problem(STATUS[error.reason], str(error), error.field, code, headers)
