"""Renderers, which convert answers to the objects and events of a route.

A renderer has all data that these objects and events need, except the answer itself. It is sent with the request as
`GenerationRequest.renderer` and stored in the session's record. So any peer can render the answer, with the same id and the same
events, numbered from 0.
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
from meshd.types import SamplingDefaults


class StreamedEvent(msgspec.Struct, frozen=True):
    """One event of a stream."""

    body: object
    number: int | None = None
    """Number of the event in its stream. None: the stream can't be resumed."""
    name: str = ""
    """Value of the event's `event:` line. Empty: the event has no such line."""


class EventWriter(Protocol):
    """Makes the events of one stream. The same answers must give the same events on every peer."""

    def begin(self) -> list[StreamedEvent]:
        """Return the events before the first delta."""
        ...

    def take(self, index: int, item: TextDelta | Finished) -> list[StreamedEvent]:
        """Return the events for the next delta or the end of answer `index`. Raises: Cancelled if its session ended early."""
        ...

    def fail(self, failure: HttpProblem, last: int, *, for_good: bool) -> StreamedEvent:
        """Return the last event of a stream that fails after event `last`. `for_good`: no peer can resume the answer."""
        ...


class Renderer(msgspec.Struct, frozen=True, kw_only=True, tag_field="form"):
    """The fields of all renderers. The id of a single answer is `prefix` followed by the answer's secret."""

    created: int
    model: str
    system_fingerprint: str
    store: bool = True
    """Whether clients may read the answer again, or resume its stream, by its id."""
    background: bool = False
    answers: int = 1
    per_prompt: int = 1
    """Number of answers to each prompt."""

    prefix: ClassVar[str]
    object_name: ClassVar[str]
    """Value of `object` in the whole answer."""
    sends_done: ClassVar[bool] = True
    """Whether streams end with `[DONE]`."""

    def head(self, answer_id: str) -> dict[str, Any]:
        """Return the fields of `ObjectHeader`."""
        return {"id": answer_id, "created": self.created, "model": self.model, "system_fingerprint": self.system_fingerprint}

    def numbers(self) -> Iterator[int | None]:
        """Return the numbers of a stream's events. A stream of several answers has none: its order is not reproducible."""
        return itertools.count() if self.answers == 1 else itertools.repeat(None)


def error_event(failure: HttpProblem) -> StreamedEvent:
    """Make the last event of a failed stream of chunks or of the cluster's routes."""
    return StreamedEvent(ErrorBody(failure.detail))


def model_fields(services: Services, model: str) -> dict[str, Any]:
    """Return the first fields of `Renderer`: time, name of the model, and fingerprint of its weights and of meshd's version."""
    card = services.coordinator.card(model)
    weights = card.id if card else model
    return {
        "created": int(services.clock.wall()),
        "model": card.name if card else model,
        "system_fingerprint": f"fp_{hashlib.sha256(f'{__version__}:{weights}'.encode()).hexdigest()[:10]}",
    }


def sampling_defaults(services: Services, model: str) -> SamplingDefaults:
    """Return the sampling parameters that the model's authors recommend; none if no live peer has the model."""
    card = services.coordinator.card(model)
    return card.sampling if card is not None else SamplingDefaults()
