"""Fetches the profiles of other peers: one at a time from each peer, and a few at a time in all."""

import asyncio
from collections.abc import Callable
from functools import partial
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.membership.adverts.encoding import decode_profile, hash_of
from meshd.clock import Clock
from meshd.errors import MeshdError, ProtocolViolation
from meshd.protocol.messages import FetchProfile, ProfileData
from meshd.types import PeerId, Profile

log = getLogger(__name__)

AGAIN_S = 1.0
"""Shortest time between two fetches from one peer, so that a peer whose hash always changes costs little."""
_AT_ONCE = 16
_ANSWER_S = 10.0


class ProfileFetcher:
    """Fetches profiles. `on_profile(peer, hash, profile)` receives each, `on_unusable(peer, why)` the reason if one is bad."""

    def __init__(
        self,
        links: Links,
        clock: Clock,
        on_profile: Callable[[PeerId, str, Profile], None],
        on_unusable: Callable[[PeerId, str], None],
    ) -> None:
        self._links = links
        self._clock = clock
        self._on_profile = on_profile
        self._on_unusable = on_unusable
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}
        self._fetched_at: dict[PeerId, float] = {}
        """When the latest fetch from a linked peer began."""
        self._unusable: dict[PeerId, str] = {}
        """Hash of a linked peer's profile that could not be used, and so is not fetched again."""
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Fetch profiles until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await asyncio.Event().wait()
        finally:
            self._group = None

    def fetch(self, peer: PeerId, wanted: str) -> None:
        """Fetch the profile with the hash `wanted` soon, unless a fetch from this peer is running.

        If the fetch fails, the peer's next status starts another.
        """
        if self._group is None or peer in self._tasks or self._unusable.get(peer) == wanted:
            return
        task = self._tasks[peer] = self._group.create_task(self._fetch(peer), name=f"profile of {peer:.8}")
        task.add_done_callback(partial(self._done, peer))

    def forget(self, peer: PeerId) -> None:
        """End a running fetch, because the link has ended."""
        self._fetched_at.pop(peer, None)
        self._unusable.pop(peer, None)
        if (task := self._tasks.pop(peer, None)) is not None:
            task.cancel()

    def _done(self, peer: PeerId, task: asyncio.Task[None]) -> None:
        if self._tasks.get(peer) is task:
            del self._tasks[peer]

    async def _fetch(self, peer: PeerId) -> None:
        wait_s = self._fetched_at.get(peer, float("-inf")) + AGAIN_S - self._clock.monotonic()
        if wait_s > 0:
            await self._clock.sleep(wait_s)
        self._fetched_at[peer] = self._clock.monotonic()
        try:
            async with self._turn:
                reply, payload = await self._links.request(peer, lambda number: FetchProfile(request=number), timeout_s=_ANSWER_S)
        except MeshdError as error:
            log.debug("no profile from %.8s: %s", peer, error)
            return
        # From here on there is no await, so `fetch` can start the next fetch while the profile is used.
        self._tasks.pop(peer, None)
        received = hash_of(payload)
        try:
            if not isinstance(reply, ProfileData):
                raise ProtocolViolation(f"it answered FETCH_PROFILE with {type(reply).__name__}")
            profile = decode_profile(payload)
        except ProtocolViolation as error:
            self._unusable[peer] = received
            self._on_unusable(peer, error.message)
        else:
            self._on_profile(peer, received, profile)
