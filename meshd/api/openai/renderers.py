"""How a route shows its answers, on whatever peer.

A form is all that a route needs beside the answer itself to make its objects and events. It travels with the request as
`GenerationRequest.edge` and lies in the session's record, so that any peer shows the same answer under the same id with
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
    """Its place in a sequence that can be gone on with. None: in no such sequence."""
    name: str = ""
    """Of its `event:` line."""


class EventWriter(Protocol):
    """Makes the events of one request: the same answers give the same events, whenever and wherever."""

    def begin(self) -> list[StreamedEvent]:
        """Those before all answers."""
        ...

    def take(self, index: int, item: TextDelta | Finished) -> list[StreamedEvent]:
        """Those of the next piece, or the end, of answer `index`. Raises: Cancelled, if that is not its own end."""
        ...

    def fail(self, told: HttpProblem, last: int, *, for_good: bool) -> StreamedEvent:
        """The last one of a stream that breaks off after event `last`; `for_good`: the answer can't go on anywhere."""
        ...


class Renderer(msgspec.Struct, frozen=True, kw_only=True, tag_field="form"):
    """What all forms have. The id of a single answer is its session's, after the prefix."""

    created: int
    model: str
    system_fingerprint: str
    store: bool = True
    """Whether its record may be read, and its stream gone on with, by its id."""
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
        """The fields of `Head`."""
        return {"id": answer_id, "created": self.created, "model": self.model, "system_fingerprint": self.system_fingerprint}

    def numbers(self) -> Iterator[int | None]:
        """For its events: several answers come interleaved by chance, so theirs have none."""
        return itertools.count() if self.answers == 1 else itertools.repeat(None)


def error_event(told: HttpProblem) -> StreamedEvent:
    """What ends a stream that failed."""
    return StreamedEvent(ErrorBody(told.detail))


def model_fields(services: Services, model: str) -> dict[str, Any]:
    """A form's first fields: the time, the model by its own name, the fingerprint of its weights and this version."""
    card = next((card for card in services.coordinator.models() if model in (card.name, card.id, card.ref)), None)
    weights = card.id if card else model
    return {
        "created": int(services.clock.wall()),
        "model": card.name if card else model,
        "system_fingerprint": f"fp_{hashlib.sha256(f'{__version__}:{weights}'.encode()).hexdigest()[:10]}",
    }
