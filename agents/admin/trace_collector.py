"""Collects from all peers when they computed the steps of a session, with all times in this peer's clock."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from meshd.agents.admin.chrome_trace import PeerTrace, chrome_trace
from meshd.agents.admin.story_collector import Lines, decode_lines
from meshd.agents.links.links import Links
from meshd.agents.links.meters.clock_offset import ClockOffset
from meshd.agents.observe.spans import RECORD_BYTES, Span, Spans, decode_spans
from meshd.agents.observe.story import Story
from meshd.errors import MeshdError, ProtocolViolation, UnknownSession
from meshd.protocol.messages import FetchTrace, TraceData
from meshd.types import PeerId, SessionId

_ANSWER_S = 5.0


@dataclass(slots=True)
class TraceCollector:
    """Sends this peer's records of a session on request, and collects those of all peers."""

    me: PeerId
    links: Links
    spans: Spans
    story: Story
    names: Callable[[PeerId], str]

    def register(self) -> None:
        """Register the handler of FETCH_TRACE."""
        self.links.register(FetchTrace, self._on_fetch)

    async def collect(self, session: SessionId) -> bytes:
        """Collect a session's trace from all linked peers.

        Returns: a JSON document of Chrome's trace format. Its `otherData` says how exactly the peers' clocks are known, which peers
        gave no trace and why, and how many older steps were not kept.
        Raises: UnknownSession if no peer has records of the session.
        """
        own, dropped = self.spans.of(session)
        traces = [PeerTrace(self.me, self.names(self.me), decode_spans(own), self.story.lines(session), dropped)]
        missing: dict[str, str] = {}

        async def ask(peer: PeerId) -> None:
            try:
                traces.append(await self._ask(peer, session))
            except MeshdError as error:
                missing[self.names(peer)] = error.message

        async with asyncio.TaskGroup() as group:
            for peer in self.links.peers():
                group.create_task(ask(peer))
        traces = [trace for trace in traces if trace.spans or trace.lines]
        if not traces:
            raise UnknownSession(f"no live peer has a trace of session {session}", hint="each peer remembers the latest ones")
        traces.sort(key=lambda trace: (trace.peer != self.me, trace.name))
        # A long answer has tens of thousands of spans, which take the event loop too long.
        return await asyncio.to_thread(lambda: msgspec.json.encode(chrome_trace(session, traces, missing)))

    async def _ask(self, peer: PeerId, session: SessionId) -> PeerTrace:
        reply, payload = await self.links.request(
            peer, lambda number: FetchTrace(request=number, session=session), timeout_s=_ANSWER_S
        )
        size = reply.records * RECORD_BYTES if isinstance(reply, TraceData) else -1
        if not isinstance(reply, TraceData) or size > len(payload):
            raise ProtocolViolation("FETCH_TRACE was not answered with a trace")
        name, clock, dropped = self.names(peer), self.links.clock_of(peer).copy(), reply.dropped

        def read() -> PeerTrace:
            spans, lines = decode_spans(payload[:size]), decode_lines(payload[size:])
            return aligned(PeerTrace(peer, name, spans, lines, dropped), clock)

        return await asyncio.to_thread(read)

    def _on_fetch(self, sender: PeerId, message: FetchTrace, payload: memoryview) -> tuple[TraceData, bytes]:
        records, dropped = self.spans.of(message.session)
        lines = msgspec.json.encode(self.story.lines(message.session))
        return TraceData(request=message.request, records=len(records) // RECORD_BYTES, dropped=dropped), records + lines


def aligned(trace: PeerTrace, clock: ClockOffset) -> PeerTrace:
    """Convert a trace's times, of the peer's clock, to this peer's clock.

    Raises: ProtocolViolation if nothing is known of the peer's clock: it runs a version that does not tell it.
    """
    errors, offsets = [0.0], list[float]()

    def shift(theirs: float) -> float:
        found = clock.to_ours(theirs)
        if found is None:
            raise ProtocolViolation("its clock is not known: it runs an older version, or was linked just now")
        errors.append(found.error)
        offsets.append(found.offset)
        return found.at - theirs

    spans: list[Span] = []
    for span in trace.spans:
        by = shift(span.arrived)  # one offset for all times of a step, so that its parts keep their lengths
        spans.append(
            span._replace(arrived=span.arrived + by, started=span.started + by, ended=span.ended + by, sent=span.sent + by)
        )
    lines: Lines = [{**line, "at": line["at"] + shift(line["at"])} for line in trace.lines]
    offset = offsets[len(offsets) // 2] if offsets else 0.0
    return PeerTrace(trace.peer, trace.name, spans, lines, trace.dropped, offset_s=offset, error_s=max(errors))
