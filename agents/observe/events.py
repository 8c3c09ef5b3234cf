"""Every kind of event that a peer publishes, on one page. `stream.py` carries them to readers.

Two families:

- *Changes of rows* say what the listings of `/mesh/v1/` contain now: `row` and `gone`. A reader that applies them to an empty
  listing has the listing, so it needs no other request.
- *Happenings* say what occurred, and why: all others. A reader may miss some of them and still has true rows.

Texts may come from other peers, so each of them is cut to `MAX_TEXT` when the event is published.
"""

from typing import Annotated, Any, Literal

import msgspec

from meshd.bounds import Count, Seconds, Size, StageIndex, at_most

MAX_TEXT = 500
"""Characters that a text of an event keeps."""
MAX_STAGES = 32
"""Stages that one `Work` event lists."""
ShortText = Annotated[str, at_most(200)]
Listing = Literal["peers", "links", "models", "plans", "sessions"]
"""The listings of `/mesh/v1/` that events keep up to date."""
LISTINGS: tuple[Listing, ...] = ("peers", "links", "models", "plans", "sessions")
TOLD: frozenset[Listing] = frozenset({"plans", "sessions"})
"""Listings that a peer tells others about: those that only it knows."""


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """The base of all events. A published one also has `at` (seconds since the Unix epoch), `peer` and `name` of its publisher."""


class Row(Event, frozen=True, kw_only=True, tag="row"):
    """A row of a listing is new or has changed."""

    list: Listing
    key: str
    """Names the row in its listing, for the stream's whole life."""
    row: dict[str, Any]


class Gone(Event, frozen=True, kw_only=True, tag="gone"):
    """A row of a listing is no more."""

    list: Listing
    key: str


class PeerChanged(Event, frozen=True, kw_only=True, tag="peer"):
    """Another peer's state has changed, as this peer sees it."""

    of: str
    """Id of the other peer."""
    of_name: str
    state: str
    was: str
    """The state before; empty for a peer that was not known."""
    reason: str


class LinkRefused(Event, frozen=True, kw_only=True, tag="refusal"):
    """A link with another device could not be made, or was refused."""

    address: str
    of: str
    """Id of the other peer; empty if it did not prove one."""
    reason: str
    hint: str


class NoticeGiven(Event, frozen=True, kw_only=True, tag="notice"):
    """A message for the user."""

    message: str
    hint: str


class KeyRotated(Event, frozen=True, kw_only=True, tag="key"):
    """This peer has heard of a rotation of the cluster's key that counts."""

    generation: int
    staying: int
    """Number of peers that stay."""
    excluded: bool
    """Whether this peer is not among them."""


class HoldingChanged(Event, frozen=True, kw_only=True, tag="holding"):
    """Layers on this peer have changed their state."""

    model: str
    layers: str
    state: str
    """`loading`, `warm`, `active`, or `released`."""
    was: str
    """The state before; empty for layers that were not there."""


class LoadProgress(Event, frozen=True, kw_only=True, tag="load"):
    """Layers are being loaded on this peer."""

    model: str
    layers: str
    progress: float
    """From 0 to 1."""


class SessionChanged(Event, frozen=True, kw_only=True, tag="session"):
    """An answer that this peer coordinates has changed its state."""

    session: str
    model: str
    state: str
    was: str
    """The state before; empty for a new answer."""
    tokens: int
    reason: str


class PlanChosen(Event, frozen=True, kw_only=True, tag="plan"):
    """An answer has a plan, or another plan than before."""

    session: str
    epoch: int
    plan: str
    """As `name:0-12,name:12-30`."""
    predicted_ttft_s: float
    predicted_tpot_s: float
    reason: str
    """Why the plan before was left; empty for the first plan."""
    numerics: str
    """The numerics ids of its peers, each once, separated by commas."""


class AnswerContinued(Event, frozen=True, kw_only=True, tag="recovery"):
    """An answer goes on after a loss or a move: its first token with the new plan has come."""

    session: str
    epoch: int
    plan: str
    method: str
    """`kept`, `mirror`, `replay` or `prefill`."""
    cause: Literal["loss", "move", "resume"]
    reason: str
    pause_s: float
    """From the last token before to the first token after the change."""
    other_numerics: str
    """Layers that are computed with other numerics since; empty: none."""


class PredictionChecked(Event, frozen=True, kw_only=True, tag="prediction"):
    """A predicted time of an answer, beside the measured one."""

    session: str
    what: Literal["ttft", "tpot"]
    predicted_s: float
    measured_s: float


class StageWork(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage of a session computed in a period, in one phase."""

    session: ShortText
    stage: StageIndex
    phase: Literal["prefill", "decode"]
    model: ShortText
    layers: ShortText
    steps: Count
    tokens: Count
    """Positions that were computed."""
    busy_s: Seconds
    """Time on the compute thread."""
    sent_bytes: Size
    """Activations for the next stage, as they are on the wire. 0 for the last stage, which sends only tokens."""


class Work(Event, frozen=True, kw_only=True, tag="work"):
    """What the stages on this peer computed in the last period. Published only after they computed something."""

    period_s: Seconds
    steps: Count
    tokens: Count
    """Positions of decode steps. Prefill is not counted: its tokens are much cheaper."""
    busy_s: Seconds
    """Time in which the compute thread computed steps."""
    stages: Annotated[tuple[StageWork, ...], at_most(MAX_STAGES)]
    """The busiest stages. The sums above are those of all stages."""


class PullProgressed(Event, frozen=True, kw_only=True, tag="pull"):
    """A model is being fetched to this peer's disk."""

    model: str
    source: str
    phase: str
    """As in `meshd/models/store/progress.py`; `ended` after an error or a cancel, with the reason in `message`."""
    done_bytes: int
    total_bytes: int | None
    message: str


class LogLine(Event, frozen=True, kw_only=True, tag="log"):
    """A line of this peer's log."""

    level: Literal["debug", "info", "warning", "error"]
    logger: str
    text: str
    session: str
    """The session that the line is about; empty if it is about none."""


class Lost(Event, frozen=True, kw_only=True, tag="lost"):
    """The reader was too slow, or resumed too late: events before this one are missing. Rows follow from the beginning."""

    events: int
    """How many; 0 if that is not known."""


class Missed(Event, frozen=True, kw_only=True, tag="missed"):
    """Events of the named peer are missing, because there were too many. Its rows follow from the beginning."""

    events: int


KINDS: tuple[type[Event], ...] = (
    Row,
    Gone,
    PeerChanged,
    LinkRefused,
    NoticeGiven,
    KeyRotated,
    HoldingChanged,
    LoadProgress,
    SessionChanged,
    PlanChosen,
    AnswerContinued,
    PredictionChecked,
    Work,
    PullProgressed,
    LogLine,
    Lost,
    Missed,
)
