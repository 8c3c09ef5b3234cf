"""Clients of the chaos run: they ask, read, and continue at another peer when a connection breaks, as any client may."""

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
from real_daemons.streams import Answer, Interrupted, Refused, Spec, ask, go_on

SILENCE_S = 8.0
"""A client that hears nothing for so long turns to another peer."""
ANSWER_S = 150.0
"""An answer that has not ended by then never will."""
_AGAIN_S = 0.3
_BROKEN = (Interrupted, OSError, http.client.HTTPException, ValueError)

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
"""A few cuts only, so that few different ranges of layers are loaded."""


def make_specs(seed: int, count: int, tokens: tuple[int, int]) -> list[Spec]:
    """Requests of all routes, greedy and drawn, with penalties, with logprobs and without."""
    rng = random.Random(seed)
    specs = []
    for number in range(count):
        prompt = f"{_PROMPTS[number % len(_PROMPTS)]}"
        body: dict[str, Any] = {"model": MODEL, "temperature": 0}
        if number % 2:
            body |= {"temperature": 0.9, "top_p": 0.95, "seed": rng.randrange(2**31)}
        if number % 4 == 3:
            body |= {"frequency_penalty": 0.6, "presence_penalty": 0.3, "repetition_penalty": 1.1}
        wanted = rng.randint(*tokens)
        specs.append(_spec(f"short {number}", number % 3, body, prompt, wanted, logprobs=number % 4 != 2))
    return specs


def make_long(seed: int, words: int) -> Spec:
    """One whose prefill takes seconds."""
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


def with_stop(spec: Spec, calm: Answer) -> Spec | None:
    """The same request, stopped two thirds into its answer by a string from there; None if it is too short for one."""
    at = 2 * len(calm.text) // 3
    stop = calm.text[at : at + 6]
    if len(stop) < 6:
        return None
    return Spec(spec.name + " with stop", spec.path, spec.body | {"stop": [stop]})


@dataclass(slots=True)
class Asked:
    """One answer that a client wanted, and how it got it."""

    answer: Answer
    order: "Order | None" = None
    resumed: int = 0
    anew: int = 0
    """Asked again from the start, before any event of it had come."""
    problem: str = ""
    story: list[dict[str, Any]] = field(default_factory=list)
    """What the mesh remembers of it, if a fault hit it."""
    ended_at: float = 0.0

    @property
    def methods(self) -> list[str]:
        """How it went on after changes of its plan: `mirror`, `replay`, ..."""
        return [row["method"] for row in self.story if row["what"] == "goes on"]

    @property
    def heard_at(self) -> float:
        """When it last made progress."""
        return self.answer.times[-1] if self.answer.times else self.answer.asked_at


@dataclass(slots=True)
class Order:
    """A request that the driver wants one of the clients to make next."""

    spec: Spec
    at: str
    mesh: dict[str, Any]
    asked: Asked | None = None


@dataclass
class Crowd:
    """All clients, and what they share."""

    site: Site
    specs: list[Spec]
    well: Callable[[], set[str]]
    """Peers without a fault now: requests name only these as stages."""
    on_end: Callable[[Asked], None]
    seed: int
    front: frozenset[str] = frozenset()
    """If any are named, only these are asked for new answers."""
    orders: "queue.Queue[Order]" = field(default_factory=lambda: queue.Queue(8))
    now: dict[int, Asked] = field(default_factory=dict)
    ended: list[Asked] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    """Refusals and interruptions by what they said."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, count: int) -> None:
        for number in range(count):
            thread = threading.Thread(target=self._run, args=(number,), name=f"client {number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Let each finish its answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(ANSWER_S + 2 * SILENCE_S)

    def stalled(self, longer_than_s: float) -> list[Asked]:
        """Answers that wait for a token for longer than that."""
        now = time.monotonic()
        return [asked for asked in list(self.now.values()) if now - asked.heard_at > longer_than_s]

    def _run(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while not self._stop.is_set():
            try:
                order = self.orders.get_nowait()
            except queue.Empty:
                order = None
            asked = self._one(number, rng, order)
            asked.ended_at = time.monotonic()
            del self.now[number]
            self.ended.append(asked)
            self.on_end(asked)

    def _one(self, number: int, rng: random.Random, order: Order | None) -> Asked:
        spec = order.spec if order else rng.choice(self.specs)
        asked = self.now[number] = Asked(Answer(spec, asked_at=time.monotonic()), order)
        if order:
            order.asked = asked
        until = time.monotonic() + ANSWER_S
        at = order.at if order else self._door(rng)
        while not asked.answer.ended and not asked.problem:
            try:
                if asked.answer.last_event is not None or asked.answer.times:
                    asked.resumed += 1
                    go_on(self.site, at, asked.answer, silence_s=SILENCE_S)
                else:
                    asked.anew += asked.answer.begun_at > 0
                    asked.answer = Answer(spec)
                    ask(self.site, at, asked.answer, order.mesh if order else self._mesh(rng), silence_s=SILENCE_S)
            except Refused as refused:
                self.told[f"refused {refused.status} {refused.code}"] += 1
                self._check(asked, refused)
                time.sleep(_AGAIN_S)
            except _BROKEN as error:
                code = error.code if isinstance(error, Interrupted) else type(error).__name__
                self.told[f"interrupted {code}"] += 1
                time.sleep(_AGAIN_S / 3)
            if time.monotonic() > until:
                asked.problem = f"it did not end within {ANSWER_S:.0f} s"
            order, at = None, self._door(rng, at)
        return asked

    def _check(self, asked: Asked, refused: Refused) -> None:
        """A refusal is fine while another try can help."""
        if refused.status in (400, 401, 403, 405, 500) and asked.answer.last_event is not None:
            asked.problem = f"refused for good: {refused}"

    def _door(self, rng: random.Random, other_than: str = "") -> str:
        return rng.choice([name for name in sorted(self.front or self.site.names) if name != other_than])

    def _mesh(self, rng: random.Random) -> dict[str, Any]:
        """The planner's choice, or stages over some of the peers; sometimes with a mirror."""
        mirror = {"mirror": True} if rng.random() < 0.4 else {}
        well = sorted(self.well())
        cuts = rng.choice(_CUTS)
        if rng.random() < 0.3 or len(well) <= len(cuts):
            return mirror
        return mirror | {"stages": stages_over(rng.sample(well, len(cuts) + 1), cuts)}


def stages_over(names: list[str], cuts: tuple[int, ...]) -> str:
    """`h1:0-10,h2:10-30`."""
    edges = (0, *cuts, 30)
    return ",".join(f"{name}:{start}-{end}" for name, start, end in zip(names, edges[:-1], edges[1:], strict=True))
