"""Clients of the chaos run: they send requests, read answers, and resume at another peer when a connection breaks."""

import http.client
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from real_daemons.mesh import MODEL
from real_daemons.sites import Site
from real_daemons.streams import Answer, Interrupted, Refused, Spec, ask, resume

HEADERS_S, SILENCE_S = 30.0, 12.0
"""Seconds without headers, and then without any data, after which a client turns to another peer: somewhat more than a daemon that
works takes for its headers and between two comments (`ClientLimits`). A client with less patience gives up prompts that are being
computed, and has them computed again from the start."""
ANSWER_S = 150.0
"""Seconds after which an answer that has not ended counts as a failure."""
_RETRY_S = 0.3
_INTERRUPTIONS = (Interrupted, OSError, http.client.HTTPException, ValueError)

_PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: Who wrote Hamlet?\nA:",
    "The difference between TCP and UDP is that",
    "My favourite season is autumn, because",
    "¿Cuál es la capital de España?",
    "def fibonacci(n):\n    ",
)
_LONG = "The history of the lighthouse, told by those who kept it. "
_CUTS = ((10, 20), (10,), (20,))
"""Layers at which a model is split. There are only three variants, so that peers load few different ranges."""


def make_specs(seed: int, count: int, tokens: tuple[int, int]) -> list[Spec]:
    """Return `count` requests over all API routes: greedy and sampled, with and without penalties, with and without logprobs."""
    rng = random.Random(seed)
    specs = []
    for number in range(count):
        prompt = f"{_PROMPTS[number % len(_PROMPTS)]}"
        body: dict[str, Any] = {"model": MODEL, "temperature": 0}
        if number % 2:
            body |= {"temperature": 0.9, "top_p": 0.95, "seed": rng.randrange(2**31)}
        if number % 4 == 3:
            body |= {"frequency_penalty": 0.6, "presence_penalty": 0.3, "repetition_penalty": 1.1}
        length = rng.randint(*tokens)
        specs.append(_spec(f"short {number}", number % 3, body, prompt, length, logprobs=number % 4 != 2))
    return specs


def make_long(seed: int, words: int) -> Spec:
    """Return a request whose prefill takes seconds."""
    body = {"model": MODEL, "temperature": 0.8, "seed": seed}
    return _spec("long", 0, body, _LONG * (words // 12), 32, logprobs=True)


def _spec(name: str, route: int, body: dict[str, Any], prompt: str, tokens: int, *, logprobs: bool) -> Spec:
    match route:
        case 0:
            body |= {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream_options": {"include_usage": True}}
            return Spec(name, "/v1/completions", body | ({"logprobs": 2} if logprobs else {}))
        case 1:
            body |= {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": tokens, "ignore_eos": True}
            body |= {"stream_options": {"include_usage": True}}
            return Spec(name, "/v1/chat/completions", body | ({"logprobs": True, "top_logprobs": 2} if logprobs else {}))
        case _:
            body |= {"input": prompt, "max_output_tokens": tokens, "ignore_eos": True}
            shown = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
            return Spec(name, "/v1/responses", body | (shown if logprobs else {}))


def with_stop(spec: Spec, undisturbed: Answer) -> Spec | None:
    """Copy a request and add a stop string, taken from two thirds into its answer. Returns: None if the answer is too short."""
    at = 2 * len(undisturbed.text) // 3
    stop = undisturbed.text[at : at + 6]
    if len(stop) < 6:
        return None
    return Spec(spec.name + " with stop", spec.path, spec.body | {"stop": [stop]})


@dataclass(slots=True)
class ClientRequest:
    """One request of a client, its answer, and how the client got it."""

    answer: Answer
    order: "Order | None" = None
    resumed: int = 0
    """How many times the client resumed the answer after an interruption."""
    restarted: int = 0
    """How many times the client sent the request again, because no event of the answer had arrived."""
    problem: str = ""
    story: list[dict[str, Any]] = field(default_factory=list)
    """The session's story as the mesh recorded it."""
    ended_at: float = 0.0

    @property
    def methods(self) -> list[str]:
        """The method by which the answer continued after each change of its plan, such as `mirror` or `replay`."""
        return [row["method"] for row in self.story if row["what"] == "goes on"]

    @property
    def last_progress_at(self) -> float:
        """When the last token arrived, or when the request was sent."""
        return self.answer.times[-1] if self.answer.times else self.answer.asked_at


@dataclass(slots=True)
class Order:
    """A given request, which the next free client sends instead of a random one."""

    spec: Spec
    at: str
    mesh: dict[str, Any]
    request: ClientRequest | None = None
    """Set when a client has taken the order."""


@dataclass
class ClientPool:
    """Runs all clients, one thread each, and collects their requests."""

    site: Site
    specs: list[Spec]
    healthy: Callable[[], set[str]]
    """Returns the peers without a fault now. Requests place stages only on these."""
    on_end: Callable[[ClientRequest], None]
    seed: int
    entry_peers: frozenset[str] = frozenset()
    """The peers that clients send requests to. Empty: all."""
    orders: "queue.Queue[Order]" = field(default_factory=lambda: queue.Queue(8))
    current: dict[int, ClientRequest] = field(default_factory=dict)
    """The present request of each client, by the client's number."""
    ended: list[ClientRequest] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    """Refusals and interruptions, by status and code."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, count: int) -> None:
        for number in range(count):
            thread = threading.Thread(target=self._run, args=(number,), name=f"client {number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Wait until each client has finished its current answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(ANSWER_S + 2 * HEADERS_S)

    def stalled(self, longer_than_s: float) -> list[ClientRequest]:
        """Return the running requests whose last token, or whose start, is more than `longer_than_s` ago."""
        now = time.monotonic()
        return [request for request in list(self.current.values()) if now - request.last_progress_at > longer_than_s]

    def _run(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self._stop.is_set():
            try:
                order = self.orders.get_nowait()
            except queue.Empty:
                order = None
            request = self._request(number, rng, order)
            request.ended_at = time.monotonic()
            del self.current[number]
            self.ended.append(request)
            self.on_end(request)

    def _request(self, number: int, rng: random.Random, order: Order | None) -> ClientRequest:
        """Send one request and read its answer to the end, at several peers if needed. Record a failure in its `problem`."""
        spec = order.spec if order else rng.choice(self.specs)
        request = self.current[number] = ClientRequest(Answer(spec, asked_at=time.monotonic()), order)
        if order:
            order.request = request
        until = time.monotonic() + ANSWER_S
        at = order.at if order else self._entry_peer(rng)
        while not request.answer.ended and not request.problem:
            try:
                if request.answer.last_event is not None or request.answer.times:
                    request.resumed += 1
                    resume(self.site, at, request.answer, silence_s=SILENCE_S, headers_s=HEADERS_S)
                else:
                    request.restarted += request.answer.begun_at > 0
                    request.answer = Answer(spec)
                    mesh = order.mesh if order else self._mesh(rng)
                    ask(self.site, at, request.answer, mesh, silence_s=SILENCE_S, headers_s=HEADERS_S)
            except Refused as refused:
                self.errors[f"refused {refused.status} {refused.code}"] += 1
                self._check(request, refused)
                time.sleep(_RETRY_S)
            except _INTERRUPTIONS as error:
                code = error.code if isinstance(error, Interrupted) else type(error).__name__
                self.errors[f"interrupted {code}"] += 1
                time.sleep(_RETRY_S / 3)
            if time.monotonic() > until:
                request.problem = f"it did not end within {ANSWER_S:.0f} s"
            order, at = None, self._entry_peer(rng, at)
        return request

    def _check(self, request: ClientRequest, refused: Refused) -> None:
        """Record a refusal to resume as the request's problem if retrying cannot help."""
        if refused.status in (400, 401, 403, 405, 500) and request.answer.last_event is not None:
            request.problem = f"refused for good: {refused}"

    def _entry_peer(self, rng: random.Random, other_than: str = "") -> str:
        return rng.choice([name for name in sorted(self.entry_peers or self.site.names) if name != other_than])

    def _mesh(self, rng: random.Random) -> dict[str, Any]:
        """Return random `mesh` options: stages on healthy peers, or no stages so that the planner chooses; sometimes a mirror."""
        mirror = {"mirror": True} if rng.random() < 0.4 else {}
        healthy = sorted(self.healthy())
        cuts = rng.choice(_CUTS)
        if rng.random() < 0.3 or len(healthy) <= len(cuts):
            return mirror
        return mirror | {"stages": stages_over(rng.sample(healthy, len(cuts) + 1), cuts)}


def stages_over(names: list[str], cuts: tuple[int, ...]) -> str:
    """Return a stage list over these peers, split at `cuts`, such as `h1:0-10,h2:10-30`."""
    edges = (0, *cuts, 30)
    return ",".join(f"{name}:{start}-{end}" for name, start, end in zip(names, edges[:-1], edges[1:], strict=True))
