"""Reads streamed answers as a client does, with the time of each event, and resumes them at another peer if needed."""

import contextlib
import http.client
import json
import math
import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from real_daemons.mesh import MODEL, MeshBroken, http_to
from real_daemons.sites import Site


@dataclass(frozen=True, slots=True)
class Spec:
    """The path and body of one request, which can be sent to any peer. `name` is for messages of the test."""

    name: str
    path: str
    body: dict[str, Any]


class Refused(Exception):
    """The daemon responded with an error instead of a stream."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code = status, code


class Interrupted(Exception):
    """The stream ended with an error event or without its last event."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Token:
    """A token with its logprobs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(slots=True)
class Answer:
    """What a client has received of one answer so far, in the first stream and in those that resumed it."""

    spec: Spec
    session: str = ""
    id: str = ""
    """The answer's id in its events and in requests to resume it."""
    last_event: int | None = None
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""
    completion_tokens: int | None = None
    ended: bool = False
    plan: str = ""
    predicted: dict[str, float] = field(default_factory=dict)
    """Predicted seconds from the headers of the first response: `ttft` and `tpot`."""
    asked_at: float = 0.0
    begun_at: float = 0.0
    """Time when the first response began, with which the session exists. 0: not yet."""
    times: list[float] = field(default_factory=list)
    """Time when each event with text or tokens arrived (`time.monotonic`)."""
    repeated: int = 0
    """Number of events that had already arrived before."""
    skipped: int = 0
    """Number of events that never arrived."""

    def differences_from(self, expected: "Answer") -> list[str]:
        """Return a line for each difference from the expected answer. Empty: the answers are equal."""
        found = [f"{self.repeated} events repeated"] * bool(self.repeated)
        found += [f"{self.skipped} events left out"] * bool(self.skipped)
        if self.tokens != expected.tokens:
            found.append(f"tokens differ: {_difference(self.tokens, expected.tokens)}")
        if self.text != expected.text:
            found.append(f"text differs: {_difference(list(self.text), list(expected.text))}")
        if self.finish != expected.finish:
            found.append(f"the finish reason is {self.finish!r}, not {expected.finish!r}")
        if self.completion_tokens != expected.completion_tokens:
            found.append(f"the usage is {self.completion_tokens} completion tokens, not {expected.completion_tokens}")
        return found

    def take(self, number: int | None, event: dict[str, Any], at: float) -> None:
        """Add one event of the stream. Raises: Interrupted if the event is an error."""
        if event.get("error"):
            raise Interrupted(str(event["error"].get("code")), str(event["error"].get("message")))
        if number is not None and not self._is_next(number):
            return
        if "type" in event:
            self._take_response(event, at)
        else:
            self._take_chunk(event, at)

    def _is_next(self, number: int) -> bool:
        if self.last_event is not None:
            if number <= self.last_event:
                self.repeated += 1
                return False
            self.skipped += number - self.last_event - 1
        self.last_event = number
        return True

    def _take_chunk(self, event: dict[str, Any], at: float) -> None:
        if event.get("usage"):
            self.completion_tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            self._add(text, _tokens_of(choice.get("logprobs")), at)
            self.finish = choice["finish_reason"] or self.finish

    def _take_response(self, event: dict[str, Any], at: float) -> None:
        match event["type"]:
            case "response.output_text.delta":
                self._add(event["delta"], [_token(one) for one in event.get("logprobs") or ()], at)
            case "response.completed" | "response.incomplete":
                response = event["response"]
                self.finish = response["status"]
                self.completion_tokens = response["usage"]["output_tokens"]
                self.ended = True
            case "response.failed" | "error":
                error = event.get("response", event).get("error") or event
                raise Interrupted(str(error.get("code")), str(error.get("message")))

    def _add(self, text: str, tokens: list[Token], at: float) -> None:
        if text or tokens:
            self.text += text
            self.tokens.extend(tokens)
            self.times.append(at)


def ask(
    site: Site,
    at: str,
    answer: Answer,
    mesh: dict[str, Any],
    *,
    silence_s: float,
    headers_s: float | None = None,
    inside: bool = False,
) -> None:
    """Send the request and read its answer to the end. `inside`: from the daemon's own host.

    silence_s: how long the client waits without any data. headers_s: how long it waits for the headers; None: `silence_s`.
    Raises: Refused, Interrupted, OSError, HTTPException.
    """
    answer.asked_at = time.monotonic()
    body = answer.spec.body | {"stream": True, "mesh": mesh}
    _read(site, at, "POST", answer.spec.path, body, answer, silence_s, headers_s or silence_s, inside=inside)


def resume(site: Site, at: str, answer: Answer, *, silence_s: float, headers_s: float | None = None) -> None:
    """Resume an answer at any peer, after the last event that arrived. Raises: as `ask`."""
    after = "" if answer.last_event is None else f"&starting_after={answer.last_event}"
    _read(site, at, "GET", f"/v1/responses/{answer.id}?stream=true{after}", None, answer, silence_s, headers_s or silence_s)


def _read(
    site: Site,
    at: str,
    method: str,
    path: str,
    body: Any,
    answer: Answer,
    silence_s: float,
    headers_s: float,
    *,
    inside: bool = False,
) -> None:
    connection, response = http_to(site, at, method, path, body, timeout_s=headers_s, inside=inside)
    with contextlib.closing(connection):
        if connection.sock is not None:  # None: the daemon closes the connection after this response
            connection.sock.settimeout(silence_s)
        if response.status != 200:
            error = _error_of(response.read())
            raise Refused(response.status, str(error.get("code")), str(error.get("message")))
        answer.begun_at = answer.begun_at or time.monotonic()
        answer.session = response.headers.get("x-meshd-session") or answer.session
        answer.id = response.headers.get("x-meshd-answer") or answer.id
        answer.plan = response.headers.get("x-meshd-plan") or answer.plan
        answer.predicted = answer.predicted or _predicted(response)
        for number, event in _events(response):
            if event is None:
                answer.ended = True
            else:
                answer.take(number, event, time.monotonic())
            if answer.ended:
                return
    raise Interrupted("torn", "the stream ended without its last event")


def _predicted(response: http.client.HTTPResponse) -> dict[str, float]:
    headers = {what: response.headers.get(f"x-meshd-predicted-{what}-ms") for what in ("ttft", "tpot")}
    return {what: float(value) / 1000 for what, value in headers.items() if value is not None}


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[int | None, dict[str, Any] | None]]:
    """Yield (number, event); number is None if the event has none, event is None for `[DONE]`. Raises: OSError after a silence."""
    number: int | None = None
    while line := response.readline():
        name, _, value = line.decode().rstrip("\r\n").partition(": ")
        if name == "id":
            number = int(value)
        elif name == "data":
            yield (number, None) if value == "[DONE]" else (number, json.loads(value))
            number = None


def _tokens_of(logprobs: Any) -> list[Token]:
    """Parse the logprobs of a chat completion or of a completion."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [_token(one) for one in logprobs["content"]]
    tops = logprobs["top_logprobs"] or [{}] * len(logprobs["tokens"])
    return [
        Token(text, logprob, tuple(sorted(top.items())))
        for text, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    ]


def _token(shown: dict[str, Any]) -> Token:
    return Token(shown["token"], shown["logprob"], tuple((top["token"], top["logprob"]) for top in shown.get("top_logprobs") or ()))


def _error_of(data: bytes) -> dict[str, Any]:
    try:
        error: dict[str, Any] = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return {"code": "unreadable", "message": data[:200].decode(errors="replace")}
    return error


def _difference(got: list[Any], wanted: list[Any]) -> str:
    for index, (one, other) in enumerate(zip(got, wanted, strict=False)):
        if one != other:
            kind = "wrong"
            if got[index : index + 8] == wanted[index + 1 : index + 9]:
                kind = "lost"
            elif got[index + 1 : index + 9] == wanted[index : index + 8]:
                kind = "repeated"
            return f"{kind} at {index}: {one!r} for {other!r}"
    return f"{len(got)} for {len(wanted)}"


class Streaming:
    """Reads an answer in a background thread, while a test disturbs the mesh."""

    def __init__(
        self, site: Site, at: str, spec: Spec, mesh: dict[str, Any], *, silence_s: float = 60.0, inside: bool = False
    ) -> None:
        self.answer = Answer(spec)
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(site, at, mesh, silence_s, inside), daemon=True)
        self._thread.start()

    def _run(self, site: Site, at: str, mesh: dict[str, Any], silence_s: float, inside: bool) -> None:
        try:
            ask(site, at, self.answer, mesh, silence_s=silence_s, inside=inside)
        except (Refused, Interrupted, OSError, http.client.HTTPException) as error:
            self.error = error

    def wait_for(self, tokens: int, within_s: float = 60.0) -> None:
        """Wait until `tokens` tokens have arrived. Raises: MeshBroken if they do not arrive in time or the stream ends."""
        until = time.monotonic() + within_s
        while len(self.answer.times) < tokens:
            if time.monotonic() > until or not self._thread.is_alive():
                raise MeshBroken(f"only {len(self.answer.times)} of {tokens} tokens arrived: {self.error or self.answer.finish}")
            time.sleep(0.001)

    def end(self, within_s: float = 120.0) -> Answer:
        """Wait for the end of the answer. Returns: the answer. Raises: MeshBroken if it ends with an error or not in time."""
        self._thread.join(within_s)
        if self.error is not None or not self.answer.ended:
            raise MeshBroken(f"session {self.answer.session} did not finish: {self.error or 'no end in time'}")
        return self.answer


def longest_gap_s(answer: Answer, at: float) -> float:
    """Return the longest wait for a token after time `at`, in seconds. Tokens in transit at this time may still arrive first."""
    return max(later - max(earlier, at) for earlier, later in pairwise(answer.times) if later > at)


def step_s(answer: Answer, before: float, steps: int = 16) -> float:
    """Return the median seconds between consecutive tokens, over the last `steps` steps before time `before`."""
    times = [time for time in answer.times if time <= before][-steps - 1 :]
    return statistics.median(later - earlier for earlier, later in pairwise(times))


def of_length(tokens: int, answer_tokens: int, seed: int = 0) -> Spec:
    """Return a greedy request with a prompt of exactly `tokens` tokens. Each token of the answer arrives as one event."""
    rng = random.Random(f"{tokens} {seed}")
    prompt = [rng.randrange(1000, 30000) for _ in range(tokens)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": answer_tokens, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    return Spec(f"{tokens} tokens", "/v1/completions", body)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest of the values that at least this share (0 to 1) of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
