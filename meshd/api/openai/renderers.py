"""What a route needs to render its answers on any peer.

A renderer holds everything beside the answer itself that a route's objects and events need. It travels with the request as
`GenerationRequest.renderer` and is stored in the session's record, so that any peer renders the same answer under the same id with
the same events, numbered from 0.
"""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import msgspec

from meshd import __version__
from meshd.agents.service import Finished, TextDelta
from meshd.api.http.errors import ErrorBody, HttpProblem
from meshd.api.http.services import Services


class StreamedEvent(msgspec.Struct, frozen=True):
    """One event of a stream."""

    body: object
    number: int | None = None
    """Its place in a stream that can be resumed. None: the stream can't be."""
    name: str = ""
    """The value of its `event:` line; empty: no such line."""


class EventWriter(Protocol):
    """Makes the events of one request. Deterministic: the same answers give the same events on any peer."""

    def begin(self) -> list[StreamedEvent]:
        """Return the events that precede all answers."""
        ...

    def take(self, index: int, item: TextDelta | Finished) -> list[StreamedEvent]:
        """Return the events of the next delta, or of the end, of answer `index`. Raises: Cancelled if it was cut short."""
        ...

    def fail(self, failure: HttpProblem, last: int, *, for_good: bool) -> StreamedEvent:
        """Return the last event of a stream that fails after event `last`. `for_good`: no peer can resume the answer."""
        ...


class Renderer(msgspec.Struct, frozen=True, kw_only=True, tag_field="form"):
    """Fields of all renderers. The id of a single answer is `prefix` and its session's id."""

    created: int
    model: str
    system_fingerprint: str
    store: bool = True
    """Whether clients may read the record, and resume the stream, by the answer's id."""
    background: bool = False
    answers: int = 1
    per_prompt: int = 1
    """Answers to each prompt."""

    prefix: ClassVar[str]
    object_name: ClassVar[str]
    """`object` of the whole answer."""
    says_done: ClassVar[bool] = True
    """Whether its streams end with `[DONE]`."""

    def head(self, answer_id: str) -> dict[str, Any]:
        """Return the fields of `ObjectHeader`."""
        return {"id": answer_id, "created": self.created, "model": self.model, "system_fingerprint": self.system_fingerprint}

    def numbers(self) -> Iterator[int | None]:
        """Return the numbers of its events. Several answers interleave by chance, so their events have none."""
        return itertools.count() if self.answers == 1 else itertools.repeat(None)


def error_event(failure: HttpProblem) -> StreamedEvent:
    """Make the last event of a stream that failed."""
    return StreamedEvent(ErrorBody(failure.detail))


def model_fields(services: Services, model: str) -> dict[str, Any]:
    """Return a renderer's first fields: the time, the model's own name, the fingerprint of its weights and of this version."""
    card = next((card for card in services.coordinator.models() if model in (card.name, card.id, card.ref)), None)
    weights = card.id if card else model
    return {
        "created": int(services.clock.wall()),
        "model": card.name if card else model,
        "system_fingerprint": f"fp_{hashlib.sha256(f'{__version__}:{weights}'.encode()).hexdigest()[:10]}",
    }
