"""Carries messages from peer to peer: delay, bandwidth, cuts, losses."""

import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from meshd.agents.links.restoring.history import is_counted
from meshd.errors import InvalidRequest, Overloaded
from meshd.protocol.codec import decode, encode
from meshd.protocol.framing import EMPTY, MAX_HEADER, MAX_PAYLOAD
from meshd.protocol.messages import KvBlocks, Lane, Message, PeerStatus, SessionMessage, Steps
from meshd.protocol.transport import QUEUE_BYTES, Buffer
from meshd.types import LinkStats, PeerId
from sim.loop import SimLoop
from sim.network.wires import HarshNetwork, Link, Path, Pipe, SimFrame
from sim.toy.mathematics import HIDDEN
from sim.trace import Trace

if TYPE_CHECKING:
    from sim.network.links import SimLinks

_HEADER_BYTES = 120
_KV_SHARE = 2 / 3
"""Width of K and V of a token in a layer together, as a share of the model's width. The toy model has as much as its width."""
_STATUSES_ENCODED = 0.05
"""Share of statuses that are encoded and decoded. Encoding all of them is slow: with many peers, they are long and frequent."""


def lane_of(message: Message) -> Lane:
    """The lane of a message. A test may replace this rule by another one."""
    return message.send_lane


class Delivery:
    """Delivers each message after its path's delay, in order within its lane, and records the arrival in the trace."""

    def __init__(
        self,
        loop: SimLoop,
        rng: random.Random,
        trace: Trace,
        paths: dict[tuple[PeerId, PeerId], Path],
        ends: dict[PeerId, "SimLinks"],
    ) -> None:
        self.harsh = HarshNetwork()
        self.repeats = 0.0
        """Share of session messages that are sent twice in a row."""
        self.width = HIDDEN
        """Width of the model that payloads have the sizes for."""
        self.queue_bytes = QUEUE_BYTES
        """Bytes that may wait on one lane."""
        self.queue_frames = 0
        """Frames of steps that may be on their way on one lane. 0: any number."""
        self.messages = 0
        self._loop = loop
        self._rng = rng
        self._trace = trace
        self._paths = paths
        self._ends = ends

    def send(self, end: "SimLinks", target: PeerId, link: Link, message: Message, payload: Buffer | None) -> None:
        """Send over a link, or keep the message if the link is broken.

        Raises: Overloaded if the lane's queue is full; InvalidRequest if the message is too long.
        """
        lane, is_up, counted = lane_of(message), end.id in link.up, is_counted(message)
        pipe = link.pipes[end.id, lane]
        size = _HEADER_BYTES + self._payload_bytes(message, payload)
        if pipe.queued_bytes + size > self.queue_bytes:
            raise Overloaded(f"{pipe.queued_bytes} bytes wait for {target:.8} already", retry_after_s=0.1)
        if isinstance(message, Steps) and self._is_full(pipe):
            raise Overloaded(f"{pipe.frames} frames of steps wait for {target:.8} already", retry_after_s=0.1)
        received = self._encode_and_decode(message, size)
        if counted and link.restorable:
            sent, frame = link.histories[end.id].sent[lane], SimFrame(b"", EMPTY, received, payload, size)
            sent.check_room(frame)
            sent.keep(frame, written=is_up)
        if not is_up:
            return
        self._put(end.id, target, link, pipe, received, payload, size, counted)
        if self.repeats and isinstance(message, SessionMessage | Steps) and self._rng.random() < self.repeats:
            self._put(end.id, target, link, pipe, received, payload, size, False)

    def send_again(self, source: PeerId, target: PeerId, link: Link) -> None:
        """Send what had not arrived when the link broke whose place this one takes."""
        history = link.histories[source]
        history.restart_at(link.histories[target].report())
        for lane, sent in zip(Lane, history.sent, strict=True):
            while (frame := sent.next) is not None:
                assert isinstance(frame, SimFrame)
                self._put(source, target, link, link.pipes[source, lane], frame.message, frame.whole, frame.bytes, True)
                sent.wrote()

    def when_room(self, source: PeerId, pipe: Pipe, callback: Callable[[], None]) -> None:
        """See `Links.when_room`."""
        pipe.waiting.append(callback)
        self._call_waiting(source, pipe)

    def end(self, source: PeerId, link: Link) -> None:
        """Call the senders of `source` that wait for room on a link, because the link has ended."""
        for lane in Lane:
            self._call_waiting(source, link.pipes[source, lane], ended=True)

    def idle_s(self, pipe: Pipe) -> float:
        """See `Links.idle_s`. A message counts as arriving from its first byte to its last."""
        now = self._loop.time()
        return 0.0 if pipe.last_arrival > now and not pipe.held else now - min(now, pipe.last_arrival)

    def _call_waiting(self, source: PeerId, pipe: Pipe, *, ended: bool = False) -> None:
        end = self._ends.get(source)
        if not pipe.waiting or (not ended and (pipe.queued_bytes > self.queue_bytes // 2 or self._is_full(pipe))):
            return
        waiting, pipe.waiting = pipe.waiting, []
        for callback in waiting:
            if end is not None:
                self._loop.call_soon(callback, context=end.context)

    def _is_full(self, pipe: Pipe) -> bool:
        return 0 < self.queue_frames <= pipe.frames

    def release(self, source: PeerId, target: PeerId) -> None:
        """Send the messages that waited for a cut to heal."""
        end = self._ends.get(source)
        link = end.links.get(target) if end is not None else None
        if link is None:
            return
        for lane in Lane:
            pipe = link.pipes[source, lane]
            held, pipe.held = pipe.held, []
            for message, payload, size, counted in held:
                pipe.queued_bytes -= size
                self._put(source, target, link, pipe, message, payload, size, counted)

    def note_arrival(self, source: PeerId, target: PeerId, message: Message) -> None:
        self.messages += 1
        self._trace.message(source, target, message)

    def delay_s(self, path: Path) -> float:
        return (path.delay_s + self._rng.random() * path.jitter_s) * path.slow

    def stats(self, source: PeerId, target: PeerId) -> LinkStats:
        """Return the measurement of the link from `source` to `target`. It is made once, and again when the link is replaced."""
        path, back = self._paths[source, target], self._paths[target, source]
        if path.measured is None:
            delay = path.delay_s * path.slow
            path.measured = LinkStats(
                rtt_s=delay + back.delay_s * back.slow,
                bandwidth_bytes_s=path.bandwidth_bytes_s / path.slow,
                hop_s=delay + 8192 * path.slow / path.bandwidth_bytes_s,
                measured_at=self._loop.time(),
            )
        return path.measured

    def _payload_bytes(self, message: Message, payload: Buffer | None) -> int:
        """Return the payload's size as if the model were `width` wide."""
        size, wider = 0 if payload is None else memoryview(payload).nbytes, self.width / HIDDEN
        if isinstance(message, Steps):
            return int(size * wider)
        return int(size * wider * _KV_SHARE) if isinstance(message, KvBlocks) else size

    def _encode_and_decode(self, message: Message, size: int) -> Message:
        """Return the message as its receiver decodes it. Raises: InvalidRequest if the message is too long."""
        if isinstance(message, PeerStatus) and self._rng.random() > _STATUSES_ENCODED:
            return message
        header = encode(message)
        if len(header) > MAX_HEADER or size - _HEADER_BYTES > MAX_PAYLOAD:
            raise InvalidRequest(f"{type(message).__name__} is too long: {len(header)} bytes of header, {size} in all")
        return decode(header)

    def _put(
        self,
        source: PeerId,
        target: PeerId,
        link: Link,
        pipe: Pipe,
        message: Message,
        payload: Buffer | None,
        size: int,
        counted: bool,
    ) -> None:
        path = self._paths[source, target]
        pipe.queued_bytes += size
        pipe.frames += isinstance(message, Steps)
        if path.cut:
            pipe.held.append((message, b"" if payload is None else bytes(payload), size, counted))
            return
        now = self._loop.time()
        pipe.free_at = max(now, pipe.free_at) + size * path.slow / path.bandwidth_bytes_s
        arrival = max(pipe.free_at + self.delay_s(path), pipe.last_arrival + 1e-9)
        deliver = partial(self._deliver, source, target, link, pipe, message, payload, size, counted)
        receiver = self._ends.get(target)
        if receiver is None:
            return
        if self.harsh != HarshNetwork():
            link.restorable = False
        harsh, chance = self.harsh, self._rng.random() if (self.harsh.drop or self.harsh.repeat or self.harsh.reorder) else 1.0
        if chance < harsh.drop:
            link.lossy = True
            return
        if chance < harsh.drop + harsh.reorder:
            self._loop.call_at(arrival + self._rng.random() * 0.2, deliver, context=receiver.context)
            return
        pipe.last_arrival = arrival
        self._loop.call_at(arrival, deliver, context=receiver.context)
        if chance > 1 - harsh.repeat:
            self._loop.call_at(arrival + self._rng.random() * 0.5, deliver, context=receiver.context)

    def _deliver(
        self,
        source: PeerId,
        target: PeerId,
        link: Link,
        pipe: Pipe,
        message: Message,
        payload: Buffer | None,
        size: int,
        counted: bool,
    ) -> None:
        pipe.queued_bytes = max(0, pipe.queued_bytes - size)
        pipe.frames = max(0, pipe.frames - isinstance(message, Steps))
        self._call_waiting(source, pipe)
        receiver = self._ends.get(target)
        if receiver is None or receiver.links.get(source) is not link or self._loop.time() > link.lost_after:
            return
        if self._paths[source, target].cut:  # the path was cut while the message was in transit
            pipe.queued_bytes += size
            pipe.held.append((message, b"" if payload is None else bytes(payload), size, counted))
            return
        self.note_arrival(source, target, message)
        if counted and link.restorable:
            lane, arrived = lane_of(message), link.histories[target]
            arrived.note_received(lane, size)
            link.histories[source].sent[lane].acknowledge(arrived.received[lane])
        # Copy the payload on arrival, not on sending: then a sender that changes a sent payload causes a wrong answer.
        receiver.dispatcher.deliver(source, message, memoryview(b"" if payload is None else bytes(memoryview(payload).cast("B"))))
