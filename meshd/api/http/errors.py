"""Turn errors into HTTP responses in OpenAI's shape. No other module does.

| error                                   | status | type                  |
|-----------------------------------------|--------|-----------------------|
| UnknownModel, UnknownSession            | 404    | invalid_request_error |
| UsageError                              | 400    | invalid_request_error |
| Overloaded                              | 429    | rate_limit_error      |
| Unavailable, OutOfMemory, Cancelled     | 503    | server_error          |
| PeerFault, DownloadError                | 502    | server_error          |
| all other                               | 500    | server_error          |

`code` is the error's own stable code. Every `Unavailable` carries Retry-After. If the failed answer can be resumed, the
message says how.
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
    """What went wrong, for a client."""

    message: str
    type: str
    param: str | None
    """The request's field that is wrong, e.g. `messages[0].role`."""
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer with a status of 400 or more, and the last event of a stream that failed."""

    error: ErrorDetail


class HttpProblem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as an HTTP response."""

    status: int
    detail: ErrorDetail
    headers: dict[str, str] = {}

    @property
    def name(self) -> str:
        """Return the error code; the status if it has none."""
        return self.detail.code or str(self.status)

    def body(self) -> bytes:
        """Encode the body as JSON."""
        return msgspec.json.encode(ErrorBody(self.detail))

    def response(self) -> web.Response:
        """Make the response."""
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=self.headers)


_STATUS: dict[type[BaseException], int] = {
    UnknownModel: 404,
    UnknownSession: 404,
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
class KeptAnswer:
    """An answer whose record is stored, so that a client can resume its stream after an error or at another peer."""

    id: str
    generation: Generation

    def way_on(self, last: int = -1) -> str:
        """Say how a client that has the events up to `last` resumes; empty if the answer has ended."""
        if self.generation.status in ENDED:
            return ""
        after = f"&starting_after={last}" if last >= 0 else ""
        return f"go on with GET /v1/responses/{self.id}?stream=true{after} at any peer"


KEPT = web.RequestKey("kept", KeptAnswer)
"""Where a request keeps its answer, if that can be resumed."""


def problem_for_client(request: web.Request, error: BaseException, last: int = -1) -> HttpProblem:
    """Describe an error to the client of this request, who has the events up to `last`."""
    kept = request.get(KEPT)
    return problem(error, request.path, kept.way_on(last) if kept else "")


def problem(error: BaseException, path: str = "", way_on: str = "") -> HttpProblem:
    """Describe an error to a client of the route `path`. An unforeseen error is logged, and its details are not sent."""
    if isinstance(error, MeshdError):
        return _meshd_problem(error, path, way_on)
    if isinstance(error, web.HTTPException):
        return _http_problem(error, path)
    logger.error("unforeseen error", extra={"path": path}, exc_info=error)
    return _problem(500, "this peer failed: an unforeseen error, see its log", code="internal_error")


def _meshd_problem(error: MeshdError, path: str, way_on: str) -> HttpProblem:
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    headers = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))} if isinstance(error, Unavailable) else {}
    message = f"{error}; {way_on}" if way_on else str(error)
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
