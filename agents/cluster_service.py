"""The interface of a peer that the HTTP API uses for the cluster: `ClusterService`, its requests, and steps of what takes long."""

from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from meshd.agents.service import ContextTokens, MeshOptions, PeerCount
from meshd.models.store.progress import PullProgress
from meshd.types import LayerRange, Objective, PeerId


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request of `meshd plan` and `POST /mesh/v1/plan`."""

    model: str
    context: ContextTokens | None = None
    objective: Objective = Objective.LATENCY
    what_if: tuple[str, ...] = ()
    """Hypothetical peers to add: `+name ram=32GiB bw=60GB/s link=1Gbps rtt=0.3ms`."""
    mesh: MeshOptions = MeshOptions()


class PlaceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request of `meshd place` and `POST /mesh/v1/place`."""

    model: str
    stages: str | None = None
    min_peers: PeerCount | None = None
    objective: Objective | None = None
    context: ContextTokens | None = None


class PlacementStep(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a placement: one event in the stream of `POST /mesh/v1/place`."""

    peer: PeerId
    name: str
    layers: LayerRange
    state: str
    progress: float
    message: str = ""


InviteState = Literal["waiting", "joined", "sent", "expired", "tries", "closed", "failed"]
"""`sent`: the device has the join code, but its connection broke before it said that it stored it. `tries`: three wrong tries."""


class InviteStep(msgspec.Struct, frozen=True, kw_only=True):
    """The state of an invite: one event in the stream of `POST /mesh/v1/invites`."""

    state: InviteState
    number: int
    """The code's first part, which is not secret."""
    code: str = ""
    """Only in the first event."""
    left_s: float
    tries_left: int
    joined: str = ""
    """Name of the device that has joined."""
    addresses: tuple[str, ...] = ()
    """Where the invite listens, for a joiner that multicast does not reach."""


class CheckStatus(StrEnum):
    """The outcome of one check of `meshd doctor`."""

    OK = "ok"
    WARNING = "warning"
    """Something that may become a fault, or costs speed."""
    WRONG = "wrong"
    """A fault: something does not work."""
    UNCHECKED = "unchecked"
    """It could not be found out. Counts as a warning."""


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found about one subject."""

    check: str
    """Stable id of the check, such as `link-port`."""
    status: CheckStatus
    found: str
    """What is so, or what is wrong and why."""
    mend: str = ""
    """What to type, or to do."""
    subject: str = ""
    """What was checked, where a check has several subjects: a peer, a folder, a backend."""


class CheckStep(msgspec.Struct, frozen=True, kw_only=True):
    """One check is done: one event in the stream of `POST /mesh/v1/doctor`."""

    check: str
    done: int
    """Number of checks that are done."""
    total: int
    results: tuple[CheckResult, ...]


class DoctorRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The request of `meshd doctor` and `POST /mesh/v1/doctor`."""

    model: str | None = None
    """A model to check the needs of."""


class EventLine(NamedTuple):
    """One event for a reader of `GET /mesh/v1/events`."""

    number: int | None
    """With which the reader can resume. None: a row that the reader is given besides, because it has none."""
    kind: str
    line: bytes
    """The event as a JSON object. `agents/observe/events.py` has all kinds."""


class ClusterService(Protocol):
    """The interface for the monitor and the command line. Rows are JSON-ready dicts with stable keys."""

    def identity(self) -> dict[str, Any]:
        """Describe this peer: id, name, version, cluster fingerprint, addresses, uptime, notices."""
        ...

    def peers(self) -> list[dict[str, Any]]: ...

    def links(self) -> list[dict[str, Any]]: ...

    async def known_models(self) -> list[dict[str, Any]]: ...

    def plans(self) -> list[dict[str, Any]]: ...

    def sessions(self) -> list[dict[str, Any]]: ...

    def events(self, after: int | None) -> AsyncIterator[EventLine]:
        """Yield the rows of all listings and then all events, or only the events after number `after`.

        A reader that is too slow or resumes too late gets a `lost` event, then all rows again, and the oldest events that are kept.
        """
        ...

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        """Compute a plan without loading any layers. Returns: the plan with predictions and reasons."""
        ...

    def place(self, request: PlaceRequest) -> AsyncIterator[PlacementStep]:
        """Load layers on the peers that the planner or the request chooses, and yield progress until all layers are active.

        Raises: MeshdError, for example UnknownModel or DoesNotFit.
        """
        ...

    async def unplace(self, model: str) -> int:
        """Unload a model on all peers. Returns: bytes freed."""
        ...

    def pull(self, model: str) -> AsyncIterator[PullProgress]:
        """Fetch a model from its source to this peer's disk, and yield progress until it is there.

        Raises: MeshdError, for example UnknownModel, DownloadError, or Overloaded if too many pulls run.
        Cancel: the pull stops; the next one resumes it.
        """
        ...

    async def remove_model(self, model: str) -> int:
        """Remove a model from this peer's disk. Returns: bytes freed. Raises: UnknownModel, StorageError."""
        ...

    async def drain(self, peer: str, *, undo: bool = False, timeout_s: float = 60.0) -> dict[str, Any]:
        """Have a peer take no new work, and wait until its sessions have ended or moved away. `undo`: have it take work again.

        Returns: `{"peer", "name", "sessions_left"}`.
        Raises: NoPeer, InvalidRequest, PeerFault.
        """
        ...

    async def migrate(self, session: str, target: str, source: str | None = None) -> dict[str, Any]:
        """Move a session's stages (all, or those at `source`) to `target`. If that fails, the session continues where it was.

        Returns: `{"session", "plan", "pause_ms"}`.
        Raises: UnknownSession, NoPeer, InvalidRequest, PeerFault.
        """
        ...

    async def cancel(self, session: str) -> str:
        """Cancel a session wherever it runs. Returns: its whole id. Raises: UnknownSession, InvalidRequest."""
        ...

    async def story(self, session: str) -> list[dict[str, Any]]:
        """Collect what all peers noted about a session, sorted by time.

        Returns: lines `{"at_s", "unix_s", "peer", "name", "what", ...}`.
        Raises: UnknownSession.
        """
        ...

    async def trace(self, session: str) -> bytes:
        """Collect from all peers when they computed the steps of a session.

        Returns: a JSON document of Chrome's trace format, with all times in this peer's clock.
        Raises: UnknownSession.
        """
        ...

    def reload(self) -> dict[str, Any]:
        """Read the settings again, and apply those that can change while the daemon runs.

        Returns: `{"applied", "needs_restart"}`, lists of the names of changed settings.
        Raises: ConfigError; nothing has changed then.
        """
        ...

    async def probe_links(self) -> list[dict[str, Any]]:
        """Measure every link of this peer again. Returns: the rows of `links()`."""
        ...

    def invite(self, minutes: float) -> AsyncIterator[InviteStep]:
        """Open an invite, and yield its state until it has ended. Leaving the iterator closes it.

        Raises: InvalidRequest if one is open already; StorageError.
        """
        ...

    def invites(self) -> list[InviteStep]:
        """Returns: the open invite without its code, if there is one."""
        ...

    def close_invite(self) -> bool:
        """Close the open invite. Returns: False if there is none."""
        ...

    def doctor(self, request: DoctorRequest) -> AsyncIterator[CheckStep]:
        """Look for faults of this device, its set-up and its connections with other peers.

        Raises: Overloaded if such a search runs here already.
        """
        ...

    def cluster_key(self) -> dict[str, Any]:
        """Describe the cluster's key, without it, and the peers that are known."""
        ...

    async def rotate(self, chain: bytes, secret: bytes) -> dict[str, Any]:
        """Take in a rotation that the owner has signed, with its cluster key. Returns: as `cluster_key`.

        Raises: InvalidRequest if it is not signed by the owner, or does not follow the newest one.
        """
        ...

    async def give_owner_key(self, peer: str, seed: bytes) -> dict[str, Any]:
        """Give a peer a copy of the owner key, which the caller must have.

        Returns: `{"peer", "name"}`.
        Raises: InvalidRequest, NoPeer, PeerFault.
        """
        ...
