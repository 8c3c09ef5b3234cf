"""Dials the peer of a broken link at once, until another link takes its place or the peer turns out to be gone."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from meshd.agents.links.link import Link
from meshd.agents.links.link_table import LinkTable
from meshd.clock import Clock
from meshd.errors import MeshdError, NotListening
from meshd.protocol.messages import Lane
from meshd.protocol.transport import Address
from meshd.types import PeerId

log = logging.getLogger("meshd.links")
_FIRST_S, _LONGEST_S = 0.02, 0.2
"""Waits between two dials of an address. The first is short: the sockets of a process that ends are not closed all at once."""
_OTHERS_AFTER_S = 0.2
"""Wait before each dial of another address of the peer, most often in vain."""


class LinkRestorer:
    """Restores broken links. The other peer does the same, and one of the two links that they dial stays."""

    def __init__(self, dial: Callable[[Address], Awaitable[PeerId]], table: LinkTable, clock: Clock) -> None:
        self._dial = dial
        self._table = table
        self._clock = clock

    async def restore(self, link: Link) -> None:
        """Dial until the link is restored. Give it up after `Timing.restore_s`, or when its peer no longer listens."""
        timing, own, reason = self._table.timing, _listening_address(link), link.reason
        silent_in_s = link.heard + timing.silence_s - self._clock.monotonic()
        others = asyncio.ensure_future(self._dial_others(link, [address for address in link.addresses if address != own]))
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(timing.restore_s, silent_in_s))):
                    if await self._dial_own(link, own):
                        reason = f"{link.reason}, and nothing listens there any more"
            self._table.give_up(link, reason)
            await others  # a dial that is broken off looks to the other side like one of another cluster
        finally:
            others.cancel()

    async def _dial_own(self, link: Link, address: Address) -> bool:
        """Dial the address of a link. Returns: True if its peer no longer listens there; False when it is linked again."""
        attempt = 0
        while True:
            if await self._try(address):
                return True
            if self._table.broken(link.peer) is not link:
                return False
            await self._clock.sleep(min(_LONGEST_S, _FIRST_S * 2.0**attempt))
            attempt += 1

    async def _dial_others(self, link: Link, addresses: list[Address]) -> None:
        """Dial further addresses in turn: a device may have lost one of its interfaces. A refusal there says nothing."""
        while addresses:
            for address in addresses:
                await self._clock.sleep(_OTHERS_AFTER_S)
                if self._table.broken(link.peer) is not link:
                    return
                await self._try(address)

    async def _try(self, address: Address) -> bool:
        """Dial once. Returns: whether nothing listens there. Other errors are reported only: the next try follows."""
        try:
            await self._dial(address)
        except NotListening:
            return True
        except MeshdError:
            pass  # the opener reports it
        except Exception:
            log.exception("dialling %s:%d failed (a bug in meshd)", *address)
        return False


def _listening_address(link: Link) -> Address:
    """Returns: where the peer of a link listens: the address that was dialled, or the peer's host with the port of its HELLO."""
    assert link.agreement is not None
    host, port = link.lanes[Lane.CONTROL].remote
    return host, port if link.dialled else link.agreement.hello.port
