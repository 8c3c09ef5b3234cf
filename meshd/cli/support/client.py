"""A client of a daemon's HTTP API. It uses the standard library's client, which starts ten times faster than aiohttp."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from meshd.cli.support.arguments import settings_of
from meshd.config import Settings
from meshd.errors import ConfigError, MeshdError, NotReady, Overloaded, RemoteFailure, Unavailable, UnknownModel
from meshd.settings import API_PORT
from meshd.values import Address, parse_address

if TYPE_CHECKING:
    from meshd.state import Holder

CONNECT_S = 5.0
ANSWER_S = 30.0
STREAM_SILENCE_S = 600.0
_MAX_DOCUMENT_BYTES = 64 * 2**20
_MAX_EVENT_BYTES = 8 * 2**20
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


class Stream:
    """A response that streams: its headers, and the data of its server-sent events until `[DONE]`."""

    def __init__(self, response: HTTPResponse, url: str) -> None:
        self.headers = _headers(response)
        self._response = response
        self._url = url

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events. Raises: RemoteFailure for an error event, Unavailable if the stream ends before `[DONE]`."""
        for data in self._data():
            if data == "[DONE]":
                return
            event = json.loads(data)
            if isinstance(event, dict) and "error" in event:
                raise _failure(0, event, self.headers)
            yield event
        raise Unavailable(
            f"the daemon at {self._url} broke off in the middle of its answer",
            hint="ask again; `meshd status` shows which peers are alive",
        )

    def _data(self) -> Iterator[str]:
        lines: list[str] = []
        while line := self._line():
            text = line.decode(errors="replace").rstrip("\r\n")
            if text.startswith("data:"):
                lines.append(text[5:].removeprefix(" "))
            elif not text and lines:
                yield "\n".join(lines)
                lines = []

    def _line(self) -> bytes:
        try:
            line = self._response.readline(_MAX_EVENT_BYTES)
        except (OSError, HTTPException) as error:
            raise _unreachable(self._url, error) from None
        return line


class Daemon:
    """A client of one daemon."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """`url` is `http(s)://host[:port][/path]`; the path is put before those of requests. Raises: ConfigError."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1:
            raise ConfigError(f"setting api is wrong: {url!r} is no URL like http://127.0.0.1:{API_PORT}")
        self.url = url.rstrip("/")
        self.api_key = api_key or ""
        self._connection_type = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = parts.hostname, port
        self._prefix = parts.path.rstrip("/")
        self._headers = {"accept": "application/json", "content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def is_at(self, address: str) -> bool:
        """Whether this is the daemon of this machine whose API listens on `address`, as `HOST:PORT`."""
        if not address:
            return False
        here = parse_address(address, API_PORT)
        reached = urlsplit(url_of(here))
        same_host = self._host == reached.hostname or {self._host, reached.hostname} <= _LOOPBACK
        return same_host and self._port == reached.port

    def get(self, path: str, *, timeout_s: float = ANSWER_S) -> Any:
        """Get the JSON document at `path`.

        Raises: Unavailable if no daemon answers or the daemon is busy, RemoteFailure or UnknownModel for other errors.
        """
        return self._document("GET", path, None, timeout_s)

    def rows(self, path: str) -> list[dict[str, Any]]:
        """Get the list object at `path` and return its `data`."""
        rows: list[dict[str, Any]] = self.get(path)["data"]
        return rows

    def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float = ANSWER_S) -> Any:
        """Post `body` and return the JSON document of the response. Raises: as `get`."""
        return self._document("POST", path, body, timeout_s)

    def delete(self, path: str, *, timeout_s: float = ANSWER_S) -> Any:
        """Delete what is at `path` and return the JSON document of the response. Raises: as `get`."""
        return self._document("DELETE", path, None, timeout_s)

    @contextmanager
    def stream(self, path: str, body: Mapping[str, Any] | None, *, silence_s: float = STREAM_SILENCE_S) -> Iterator[Stream]:
        """Post `body`, or get `path` if it is None, and open the event stream of the response.

        A stream that is silent for `silence_s` has ended.

        Leaving the block closes the stream, and the daemon stops its work.

        Raises: as `get`.
        """
        with self._exchange("GET" if body is None else "POST", path, body, silence_s) as response:
            yield Stream(response, self.url)

    def _document(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Any:
        with self._exchange(method, path, body, timeout_s) as response:
            try:
                return json.loads(response.read(_MAX_DOCUMENT_BYTES) or b"null")
            except (OSError, HTTPException) as error:
                raise _unreachable(self.url, error) from None
            except ValueError:
                why = f"the server at {self.url}{path} is no meshd daemon: it did not send JSON"
                raise RemoteFailure(why, hint="check --api") from None

    @contextmanager
    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> Iterator[HTTPResponse]:
        connection = self._connection_type(self._host, self._port, timeout=CONNECT_S)
        try:
            response = self._request(connection, method, path, body, timeout_s)
            if response.status >= 400:
                raise _failure(response.status, _json_or_none(response), _headers(response))
            yield response
        finally:
            connection.close()

    def _request(
        self, connection: HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> HTTPResponse:
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._prefix + path, payload, self._headers)
            return connection.getresponse()
        except (OSError, HTTPException) as error:
            raise _unreachable(self.url, error) from None


def daemon_of(args: Namespace) -> Daemon:
    """Return a client of the daemon that this command names. Raises: ConfigError."""
    settings = settings_of(args)
    return Daemon(api_url(settings), api_key(settings))


def local_daemon(settings: Settings) -> Daemon | None:
    """Return a client of the daemon that uses the state folder, with its local key; None if none runs or listens yet."""
    holder = _listening(settings)
    return None if holder is None else Daemon(_url_of_holder(holder), holder.key or settings["api-key"].value)


def api_key(settings: Settings) -> str | None:
    """Return the API key to send: that of a flag or the environment, else the local one of the daemon that uses the state folder.

    The local key is sent only to that daemon, on this machine.
    """
    chosen = settings["api-key"]
    if not chosen.chosen and settings.named("api") is None and (holder := _listening(settings)) and holder.key:
        return holder.key
    key: str | None = chosen.value
    return key


def api_url(settings: Settings) -> str:
    """Return `--api` or `MESHD_API` if given, else the URL of the daemon that uses the state folder, else the configured one."""
    named = settings.named("api")
    if named is not None and named.startswith("https://"):
        return named
    if named is None and (running := running_api(settings)):
        return running
    address: Address = settings["api"].value
    return url_of(address)


def running_api(settings: Settings) -> str | None:
    """Return the URL of the daemon that uses the state folder; None if none runs, or its API does not listen yet."""
    holder = _listening(settings)
    return None if holder is None else _url_of_holder(holder)


def _listening(settings: Settings) -> "Holder | None":
    """Return what the daemon that uses the state folder says of itself; None if none runs, or its API does not listen yet."""
    from meshd.state import read_holder

    holder = read_holder(settings["state"].value)
    return holder if holder and holder.api else None


def _url_of_holder(holder: "Holder") -> str:
    return url_of(parse_address(holder.api, API_PORT))


def url_of(address: Address) -> str:
    """Return the URL at which this machine reaches an API that listens on `address`."""
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return f"http://{Address(anywhere.get(address.host, address.host), address.port)}"


def _unreachable(url: str, error: Exception) -> Unavailable:
    if isinstance(error, TimeoutError):
        return Unavailable(f"the daemon at {url} did not answer in time", hint="see its log, or restart it")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Unavailable(f"no daemon answers at {url}: {reason}", hint="start one with `meshd up`, or name it with --api")


def _headers(response: HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def _json_or_none(response: HTTPResponse) -> Any:
    try:
        return json.loads(response.read(_MAX_DOCUMENT_BYTES))
    except (OSError, HTTPException, ValueError):
        return None


def _failure(status: int, document: Any, headers: Mapping[str, str]) -> MeshdError:
    """Make the exception for an error response, by its HTTP status and the `code` in its document."""
    error = document.get("error") if isinstance(document, dict) else None
    fields = error if isinstance(error, dict) else {}
    message = str(fields.get("message") or f"the daemon answered with HTTP status {status}")
    code = str(fields.get("code") or "")
    if status == 401:
        return RemoteFailure(message, remote_code=code, hint="give the key with --api-key or MESHD_API_KEY")
    waits: dict[str, type[Unavailable]] = {"overloaded": Overloaded, "model_loading": NotReady}
    if code in waits:
        return waits[code](message, retry_after_s=_seconds(headers.get("retry-after")))
    return UnknownModel(message) if code == "model_not_found" else RemoteFailure(message, remote_code=code)


def _seconds(text: str | None) -> float:
    """Parse a Retry-After header; 1 if it is absent or not a number."""
    try:
        return float(text or 1.0)
    except ValueError:
        return 1.0
