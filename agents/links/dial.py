"""Dials the addresses at which peers may listen. Each address has its own task and its own back-off."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from meshd.agents.links.link import Link
from meshd.agents.links.link_table import LinkTable
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.transport import Address
from meshd.types import PeerId

log = logging.getLogger("meshd.links")
STATIC = "static"
"""Name of the source of addresses from `--peer`. These addresses are never forgotten."""
MAX_TARGETS = 256
_FIRST_S = 0.2
_LONGEST_S = 5.0
_RECENT_LONGEST_S = 0.25
"""Longest back-off in the `_RECENT_S` after a link has ended: that peer is likely to come back soon."""
_RECENT_S = 120.0
_LIVED_S = 5.0
"""A link that was up for at least this long resets the address's count of failures."""
_OWN_S = 60.0
"""Interval between dials of this peer's own address, which another peer may take over."""


@dataclass(slots=True)
class _Target:
    address: Address
    sources: set[str]
    peer: PeerId | None = None
    failures: int = 0
    linked_at: float | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


def back_off_s(failures: int, longest_s: float, chance: float) -> float:
    """Compute the wait in seconds after consecutive failures. `chance`, random in [0, 1), spreads peers that failed together."""
    return min(longest_s, _FIRST_S * 2.0 ** min(failures - 1, 10)) * (0.5 + chance / 2)


class Dialler:
    """Dials every address until all its sources have forgotten it. Pauses while the peer at the address is linked."""

    def __init__(self, dial: Callable[[Address], Awaitable[PeerId]], own: PeerId, table: LinkTable, clock: Clock) -> None:
        self._dial = dial
        self._own = own
        self._table = table
        self._clock = clock
        self._targets: dict[Address, _Target] = {}
        self._group: asyncio.TaskGroup | None = None

    def connect(self, address: Address, source: str) -> None:
        """Dial an address at once; a known address ends its back-off. Beyond `MAX_TARGETS` addresses a new one is only logged."""
        target = self._targets.get(address)
        if target is None:
            if len(self._targets) >= MAX_TARGETS:
                log.warning("%s:%d is not dialled: %d addresses are being dialled already", *address, MAX_TARGETS)
                return
            target = self._targets[address] = _Target(address, set())
            self._start(target)
        target.sources.add(source)
        target.wake.set()

    def forget(self, address: Address, source: str) -> None:
        """Remove a source of the address. An address without sources is no longer dialled; its link stays up."""
        target = self._targets.get(address)
        if target is None or source == STATIC:
            return
        target.sources.discard(source)
        if not target.sources:
            del self._targets[address]
            if target.task is not None:
                target.task.cancel()

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

    async def _keep_dialling(self, target: _Target) -> None:
        while True:
            target.wake.clear()
            try:
                target.peer = await self._dial(target.address)
            except MeshdError as error:
                log.debug("no link with %s:%d: %s", *target.address, error)
            except Exception:
                log.exception("dialling %s:%d failed unexpectedly; it is dialled again", *target.address)
            if target.peer is None or (link := self._table.get(target.peer)) is None:
                target.failures += 1
            else:
                await link.gone.wait()
                self._ended(target, link)
            if target.failures:
                await self._wait(target)

    def _ended(self, target: _Target, link: Link) -> None:
        """Count a link that was up for less than `_LIVED_S` as a failure, which delays the next dial; else reset the count."""
        now = self._clock.monotonic()
        target.failures = 0 if link.lived_s(now) >= _LIVED_S else target.failures + 1
        if link.lived_s(now):
            target.linked_at = now

    async def _wait(self, target: _Target) -> None:
        wait_s = _OWN_S if target.peer == self._own else back_off_s(target.failures, self._longest_s(target), self._chance())
        try:
            async with asyncio.timeout(wait_s):
                await target.wake.wait()
        except TimeoutError:
            return
        target.failures = 0

    def _longest_s(self, target: _Target) -> float:
        recent = target.linked_at is not None and self._clock.monotonic() - target.linked_at < _RECENT_S
        return _RECENT_LONGEST_S if recent else _LONGEST_S

    def _chance(self) -> float:
        return int.from_bytes(self._clock.random_bytes(4), "big") / 2**32
