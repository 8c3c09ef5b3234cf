"""Dials the addresses at which peers may listen. Each address has its own task and its own back-off.

Most addresses are hints from other devices (mDNS, gossip), which may be forged. Until an authenticated peer has answered at such an
address, its dials come out of a budget that all such addresses share, and its back-off grows to a minute.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from meshd.agents.budget import TokenBucket
from meshd.agents.links.half_open import origin_of
from meshd.agents.links.link import Link
from meshd.agents.links.link_table import LinkTable
from meshd.clock import Clock
from meshd.errors import MeshdError, PeerRefused
from meshd.protocol.transport import Address
from meshd.types import PeerId

log = logging.getLogger("meshd.links")
STATIC = "static"
"""Name of the source of addresses from `--peer`. These addresses are never forgotten, and need no budget."""
MAX_TARGETS = 256
"""Maximum number of addresses that are dialled, those from `--peer` not counted."""
MAX_HINTS = 192
"""Maximum number of them at which no authenticated peer has answered yet."""
MAX_HINTS_PER_HOST = 16
HINTS_S, HINTS_AT_ONCE = 8.0, 32
"""Dials of hints per second, and at once after a quiet time."""
_FIRST_S = 0.2
_LONGEST_S = 5.0
_HINT_LONGEST_S = 60.0
"""Longest back-off of an address at which no authenticated peer has ever answered."""
_REFUSED_S = 30.0
"""Wait after a refusal. The other device may have the right key or version by then."""
_RARELY_S = 600.0
"""Wait between dials of a device that was excluded from its cluster. Two owners may have decided at the same moment, so that it
still belongs to it."""
_RECENT_LONGEST_S = 0.25
"""Longest back-off in the `_RECENT_S` after a link has ended: that peer is likely to come back soon."""
_RECENT_S = 120.0
_LIVED_S = 5.0
"""A link that was up for at least this long resets the address's count of failures."""
_OWN_S = 60.0
"""Interval between dials of this peer's own address, which another peer may take over."""
_WAKES_S, _WAKES_AT_ONCE = 0.5, 3
"""How often reports of an address at which a peer has answered end its back-off."""
_REMEMBERED = 1024
"""How many forgotten addresses keep their back-off, so that a source that reports them again does not reset it."""


@dataclass(slots=True)
class _Target:
    address: Address
    origin: str
    """What counts as one host in limits."""
    sources: set[str]
    peer: PeerId | None = None
    failures: int = 0
    refused: bool = False
    """Whether the latest dial was refused."""
    linked_at: float | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    wakes: TokenBucket = field(default_factory=lambda: TokenBucket(_WAKES_S, _WAKES_AT_ONCE))
    task: asyncio.Task[None] | None = None

    @property
    def is_hint(self) -> bool:
        """Whether nothing but a report of another device says that a peer is at this address."""
        return self.peer is None and STATIC not in self.sources


def back_off_s(failures: int, longest_s: float, chance: float) -> float:
    """Compute the wait in seconds after consecutive failures. `chance`, random in [0, 1), spreads peers that failed together."""
    return min(longest_s, _FIRST_S * 2.0 ** min(failures - 1, 10)) * (0.5 + chance / 2)


class Dialler:
    """Dials every address until all its sources have forgotten it. Pauses while the peer at the address is linked."""

    def __init__(self, dial: Callable[[Address], Awaitable[PeerId]], own: PeerId, table: LinkTable, clock: Clock) -> None:
        self._dial = dial
        self._own = own
        self.rarely = False
        """Whether each address is dialled only every `_RARELY_S`."""
        self._table = table
        self._clock = clock
        self._targets: dict[Address, _Target] = {}
        self._failed: OrderedDict[Address, tuple[int, float]] = OrderedDict()
        """Forgotten addresses at which no peer answered -> (failures, time of the earliest next dial), the oldest first."""
        self._budget = TokenBucket(HINTS_S, HINTS_AT_ONCE)
        self._hint_turn = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None

    def connect(self, address: Address, source: str) -> None:
        """Dial an address until `source` forgets it. Beyond the limits a hint is only noted in the debug log.

        A repeated report of an address at which a peer has answered before ends its back-off, though not too often.
        """
        target = self._targets.get(address)
        if target is None:
            origin = origin_of(address[0])
            if source != STATIC and (why := self._no_room(origin)):
                log.debug("%s:%d is not dialled: %s", *address, why)
                return
            target = self._targets[address] = _Target(address, origin, {source})
            self._start(target)
            return
        target.sources.add(source)
        if not target.is_hint and not self.rarely and target.wakes.take(self._clock.monotonic()):
            target.wake.set()

    def _no_room(self, origin: str) -> str:
        if sum(STATIC not in target.sources for target in self._targets.values()) >= MAX_TARGETS:
            return f"{MAX_TARGETS} addresses are being dialled already"
        hints = Counter(target.origin for target in self._targets.values() if target.is_hint)
        if hints.total() >= MAX_HINTS:
            return f"{MAX_HINTS} addresses at which no peer has answered yet are being dialled already"
        if hints[origin] >= MAX_HINTS_PER_HOST:
            return f"{MAX_HINTS_PER_HOST} addresses of this host at which no peer has answered yet are being dialled already"
        return ""

    def forget(self, address: Address, source: str) -> None:
        """Remove a source of the address. An address without sources is no longer dialled; its link stays up."""
        target = self._targets.get(address)
        if target is None or source == STATIC:
            return
        target.sources.discard(source)
        if not target.sources:
            del self._targets[address]
            self._remember(target)
            if target.task is not None:
                target.task.cancel()

    def wake(self) -> None:
        """End all back-offs: what was refused before may not be refused any more."""
        for target in self._targets.values():
            target.wake.set()

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin to dial all addresses, in tasks of this group."""
        self._group = group
        for target in self._targets.values():
            self._start(target)

    def stop(self) -> None:
        """Stop dialling."""
        self._group = None
        for target in self._targets.values():
            if target.task is not None:
                target.task.cancel()
                target.task = None

    def _start(self, target: _Target) -> None:
        if self._group is not None:
            target.task = self._group.create_task(self._keep_dialling(target), name=f"dial {target.address[0]}:{target.address[1]}")

    def _remember(self, target: _Target) -> None:
        if target.peer is None and target.failures:
            self._failed[target.address] = target.failures, self._clock.monotonic() + self._wait_s(target)
            self._failed.move_to_end(target.address)
            while len(self._failed) > _REMEMBERED:
                self._failed.popitem(last=False)

    async def _keep_dialling(self, target: _Target) -> None:
        target.failures, not_before = self._failed.pop(target.address, (0, 0.0))
        if (wait_s := not_before - self._clock.monotonic()) > 0 and target.is_hint:
            await self._clock.sleep(wait_s)
        while True:
            if target.is_hint:
                await self._take_hint_turn()
            target.wake.clear()
            target.refused = False
            try:
                target.peer = await self._dial(target.address)
            except MeshdError as error:
                target.refused = isinstance(error, PeerRefused)
                log.debug("no link with %s:%d: %s", *target.address, error)
            except Exception:
                log.exception("dialling %s:%d failed unexpectedly; it is dialled again", *target.address)
            if target.peer is None or (link := self._table.get(target.peer)) is None:
                target.failures += 1
            else:
                await link.gone.wait()
                await link.over.wait()
                self._ended(target, link)
            if target.failures:
                await self._wait(target)

    async def _take_hint_turn(self) -> None:
        """Wait until the budget allows to dial one more hint, in the order of arrival."""
        async with self._hint_turn:
            while not self._budget.take(now := self._clock.monotonic()):
                await self._clock.sleep(self._budget.wait_s(now))

    def _ended(self, target: _Target, link: Link) -> None:
        """Count a link that was up for less than `_LIVED_S` as a failure, which delays the next dial; else reset the count."""
        now = self._clock.monotonic()
        target.failures = 0 if link.lived_s(now) >= _LIVED_S else target.failures + 1
        if link.lived_s(now):
            target.linked_at = now

    async def _wait(self, target: _Target) -> None:
        try:
            async with asyncio.timeout(self._wait_s(target)):
                await target.wake.wait()
        except TimeoutError:
            return
        target.failures = 0

    def _wait_s(self, target: _Target) -> float:
        if self.rarely:
            return _RARELY_S
        if target.peer == self._own:
            return _OWN_S
        if target.refused:
            return _REFUSED_S
        return back_off_s(target.failures, self._longest_s(target), self._chance())

    def _longest_s(self, target: _Target) -> float:
        if target.is_hint:
            return _HINT_LONGEST_S
        recent = target.linked_at is not None and self._clock.monotonic() - target.linked_at < _RECENT_S
        return _RECENT_LONGEST_S if recent else _LONGEST_S

    def _chance(self) -> float:
        return int.from_bytes(self._clock.random_bytes(4), "big") / 2**32
