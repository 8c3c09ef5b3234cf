"""Convert errors to HTTP responses in OpenAI's format. No other module does this.

| error                                   | status | type                  |
|-----------------------------------------|--------|-----------------------|
| UnknownModel, UnknownSession            | 404    | invalid_request_error |
| NotPermitted                            | 403    | invalid_request_error |
| UsageError (all others)                 | 400    | invalid_request_error |
| Overloaded                              | 429    | rate_limit_error      |
| Unavailable, OutOfMemory, Cancelled     | 503    | server_error          |
| PeerFault, DownloadError                | 502    | server_error          |
| all other errors                        | 500    | server_error          |

`code` is the error's stable code. The response to an `Unavailable` has a Retry-After header. If the failed answer can be resumed,
the message says how.
"""

import logging
import math
from dataclasses import dataclass

import msgspec
from aiohttp import web

from meshd.agents.service import Generation
from meshd.api.openai.common_objects import ENDED
from meshd.errors import (
    Cancelled,
    ContextTooLong,
    DownloadError,
    InvalidRequest,
    MeshdError,
    NotPermitted,
    OutOfMemory,
    Overloaded,
    PeerFault,
    Unavailable,
    UnknownModel,
    UnknownSession,
    UsageError,
)

logger = logging.getLogger(__name__)


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An error, as a client receives it."""

    message: str
    type: str
    param: str | None
    """The wrong field of the request, such as `messages[0].role`. None: no single field is wrong."""
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an error response. Also the last event of a failed stream, unless the stream is that of a `Response`."""

    error: ErrorDetail


class HttpProblem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as an HTTP response."""

    status: int
    detail: ErrorDetail
    headers: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The error's code, or the HTTP status if the error has no code."""
        return self.detail.code or str(self.status)

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=self.headers)


_STATUS: dict[type[BaseException], int] = {
    UnknownModel: 404,
    UnknownSession: 404,
    NotPermitted: 403,
    UsageError: 400,
    Overloaded: 429,
    Unavailable: 503,
    OutOfMemory: 503,
    Cancelled: 503,
    PeerFault: 502,
    DownloadError: 502,
}

_HTTP_CODES = {
    401: "invalid_api_key",
    403: "forbidden_origin",
    404: "unknown_route",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
}

_PROMPT_FIELDS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}


@dataclass(frozen=True, slots=True)
class ResumableAnswer:
    """An answer whose record is stored, so that a client can resume its stream after an error or at another peer."""

    id: str
    generation: Generation

    def resume_hint(self, last: int = -1) -> str:
        """Describe how a client that has the events up to number `last` resumes the stream; empty if the answer has ended."""
        if self.generation.status in ENDED:
            return ""
        after = f"&starting_after={last}" if last >= 0 else ""
        return f"resume the answer with GET /v1/responses/{self.id}?stream=true{after} at any peer"


RESUMABLE = web.RequestKey("resumable", ResumableAnswer)
"""Key under which a request stores its answer, if the answer's record is stored."""


def problem_for_client(request: web.Request, error: BaseException, last: int = -1) -> HttpProblem:
    """Convert an error for the client of this request, which has received the events up to number `last`."""
    resumable = request.get(RESUMABLE)
    return problem(error, request.path, resumable.resume_hint(last) if resumable else "")


def problem(error: BaseException, path: str = "", resume_hint: str = "") -> HttpProblem:
    """Convert an error for a client of the route `path`. An unexpected error is logged, and its details are not sent."""
    if isinstance(error, MeshdError):
        return _meshd_problem(error, path, resume_hint)
    if isinstance(error, web.HTTPException):
        return _http_problem(error, path)
    logger.error("unexpected error", extra={"path": path}, exc_info=error)
    return _problem(500, "this peer failed with an unexpected error: see its log", code="internal_error")


def _meshd_problem(error: MeshdError, path: str, resume_hint: str) -> HttpProblem:
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))} if isinstance(error, Unavailable) else {}
    message = f"{error}; {resume_hint}" if resume_hint else str(error)
    return _problem(status, message, code=error.code, param=_param(error, path), headers=headers)


def _param(error: MeshdError, path: str) -> str | None:
    match error:
        case InvalidRequest():
            return error.param
        case UnknownModel():
            return "model"
        case ContextTooLong():
            return _PROMPT_FIELDS.get(path)
        case _:
            return None


def _http_problem(error: web.HTTPException, path: str) -> HttpProblem:
    messages = {
        404: f"no route {path}: see /openapi.json for all routes",
        405: f"{path} does not take this method: see the Allow header",
        413: "the body is too large: shorten the prompt",
    }
    headers = {name: error.headers[name] for name in ("Allow", "WWW-Authenticate") if name in error.headers}
    message = messages.get(error.status) or error.text or error.reason
    return _problem(error.status, message, code=_HTTP_CODES.get(error.status), headers=headers)


def _problem(
    status: int, message: str, *, code: str | None, param: str | None = None, headers: dict[str, str] | None = None
) -> HttpProblem:
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    detail = ErrorDetail(message=message, type=kind, param=param, code=code)
    return HttpProblem(status=status, detail=detail, headers=headers or {})
