"""Messages that wait for room on a full lane: a full lane slows its senders down, and never loses a message."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from meshd.agents.links.links import Links
from meshd.errors import MeshdError, Overloaded
from meshd.protocol.messages import Lane, Message
from meshd.protocol.transport import Buffer
from meshd.types import PeerId


@dataclass(frozen=True, slots=True)
class _Waiting:
    message: Message
    payload: Buffer | None
    wanted: Callable[[], bool]
    failed: Callable[[MeshdError], None]


@dataclass(slots=True)
class Backlog:
    """Sends messages in the order of the calls of `send`, for each peer and lane.

    The number of waiting messages is bounded by the callers: each has only so many messages under way (the window of steps of
    an edge, one prompt). A caller that can do something else meanwhile asks `waits` first.
    """

    links: Links
    on_room: Callable[[], None] = lambda: None
    """Called when no message waits any more for a peer and lane."""
    _queues: dict[tuple[PeerId, Lane], deque[_Waiting]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def waits(self, peer: PeerId, lane: Lane) -> bool:
        """Whether messages wait for room on this lane."""
        return (peer, lane) in self._queues

    def send(
        self,
        peer: PeerId,
        message: Message,
        payload: Buffer | None,
        wanted: Callable[[], bool],
        failed: Callable[[MeshdError], None],
    ) -> None:
        """Send a message now, or when its lane has room.

        wanted: whether a message that waited is still to be sent.
        failed: called if the message can't be sent, for a reason other than a full lane.
        """
        key, item = (peer, message.send_lane), _Waiting(message, payload, wanted, failed)
        if key in self._queues:
            self._queues[key].append(item)
        elif not self._try(peer, item):
            self._queues[key] = deque([item])
            self._wait(key)

    def _try(self, peer: PeerId, item: _Waiting) -> bool:
        """Returns: whether the message is dealt with; False if the lane is full."""
        try:
            self.links.send(peer, item.message, item.payload)
        except Overloaded:
            return False
        except MeshdError as error:
            item.failed(error)
        return True

    def _wait(self, key: tuple[PeerId, Lane]) -> None:
        self.links.when_room(*key, partial(self._drain, key))

    def _drain(self, key: tuple[PeerId, Lane]) -> None:
        queue = self._queues[key]
        while queue:
            if queue[0].wanted() and not self._try(key[0], queue[0]):
                return self._wait(key)
            queue.popleft()
        del self._queues[key]
        return self.on_room()
