"""Collects what all peers noted about a session, sorted by time. The peer that asks converts the others' times to its clock."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from meshd.agents.links.links import Links
from meshd.agents.observe.story import Story
from meshd.clock import Clock
from meshd.errors import MeshdError, ProtocolViolation, UnknownSession
from meshd.protocol.messages import FetchStory, StoryData
from meshd.types import PeerId, SessionId

_ANSWER_S = 2.0
_MAX_BYTES = 2**20
"""Size limit of one peer's story."""
_MAX_LINES = 1024
_RESERVED = ("at_s", "unix_s", "peer", "name", "what")
"""Keys that every line has. An underscore is appended to the name of a fact that has one of these names."""

Lines = list[dict[str, Any]]


@dataclass(slots=True)
class StoryCollector:
    """Sends this peer's notes on a session on request, and collects the notes of all peers."""

    me: PeerId
    links: Links
    story: Story
    clock: Clock
    names: Callable[[PeerId], str]

    def register(self) -> None:
        """Register the handler of FETCH_STORY."""
        self.links.register(FetchStory, self._on_fetch)

    async def collect(self, session: SessionId) -> Lines:
        """Collect the lines of this peer and all linked peers about a session.

        Clocks are compared by one round trip to each peer, so lines of two peers that are closer in time than half a round trip may
        be in the wrong order.

        Returns: lines sorted by time, with `at_s` (seconds since the first), `unix_s` (seconds since 1970 by this peer's clock, to
        compare with logs), `peer`, `name`, `what` and the facts; then one line
        for each peer that did not answer.
        Raises: UnknownSession if no peer has notes on the session.
        """
        stories: dict[PeerId, Lines] = {self.me: self.story.lines(session)}
        silent: dict[PeerId, str] = {}

        async def ask(peer: PeerId) -> None:
            try:
                stories[peer] = await self._ask(peer, session)
            except MeshdError as error:
                silent[peer] = error.message

        async with asyncio.TaskGroup() as group:
            for peer in self.links.peers():
                group.create_task(ask(peer))
        now = self.clock.monotonic()
        lines = merge_stories(stories, self.names)
        if not lines:
            raise UnknownSession(f"no live peer has notes on session {session}", hint="each peer remembers its latest 512 sessions")
        first = lines[0]["at"]
        missing = [
            {"at": now, "peer": peer, "name": self.names(peer), "what": "gave no answer", "why": why}
            for peer, why in silent.items()
        ]
        since_1970 = self.clock.wall() - now
        return [{"at_s": (at := line.pop("at")) - first, "unix_s": at + since_1970, **line} for line in [*lines, *missing]]

    async def _ask(self, peer: PeerId, session: SessionId) -> Lines:
        asked = self.clock.monotonic()
        reply, payload = await self.links.request(
            peer, lambda number: FetchStory(request=number, session=session), timeout_s=_ANSWER_S
        )
        answered = self.clock.monotonic()
        if not isinstance(reply, StoryData):
            raise ProtocolViolation(f"FETCH_STORY was answered with {type(reply).__name__}")
        return to_local_time(decode_lines(payload), theirs=reply.now, ours=(asked + answered) / 2)

    def _on_fetch(self, sender: PeerId, message: FetchStory, payload: memoryview) -> tuple[StoryData, bytes]:
        lines = self.story.lines(message.session)
        return StoryData(request=message.request, now=self.clock.monotonic()), msgspec.json.encode(lines)


def decode_lines(payload: bytes | memoryview) -> Lines:
    """Decode and check the lines of another peer. Raises: ProtocolViolation."""
    if len(payload) > _MAX_BYTES:
        raise ProtocolViolation(f"a story has {len(payload)} bytes: at most {_MAX_BYTES} are allowed")
    try:
        lines = msgspec.json.decode(payload, type=list[dict[str, Any]])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(f"a story is not a list of JSON objects: {error}") from error
    if len(lines) > _MAX_LINES or not all(_is_line(line) for line in lines):
        raise ProtocolViolation(f"a story has more than {_MAX_LINES} lines, or a line without `at` and `what`")
    return lines


def _is_line(line: dict[str, Any]) -> bool:
    at = line.get("at")
    return isinstance(at, int | float) and math.isfinite(at) and isinstance(line.get("what"), str)


def to_local_time(lines: Lines, *, theirs: float, ours: float) -> Lines:
    """Convert the times of a peer's lines to this peer's clock, which showed `ours` when that peer's clock showed `theirs`."""
    return [{**line, "at": line["at"] - theirs + ours} for line in lines]


def merge_stories(stories: dict[PeerId, Lines], names: Callable[[PeerId], str]) -> Lines:
    """Merge all peers' lines by time. Lines with equal times keep their order."""
    lines = [
        {**_facts(line), "at": line["at"], "peer": peer, "name": names(peer), "what": line["what"]}
        for peer, own in stories.items()
        for line in own
    ]
    return sorted(lines, key=lambda line: line["at"])


def _facts(line: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}_" if key in _RESERVED else key: value for key, value in line.items() if key not in ("at", "what")}
