"""Checks whether this peer and each other peer reach one another: ports both ways, multicast both ways, and the clocks.

The other peer dials only addresses of this peer that it knows itself: those of their link, and those that discovery has shown it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.budget import TokenBucket
from meshd.agents.device.multicast import ask_and_hear
from meshd.agents.links.links import Links
from meshd.agents.membership.membership import Membership
from meshd.clock import Clock
from meshd.errors import MeshdError, Overloaded
from meshd.protocol.messages import MAX_ATTEMPTS, CheckReach, DialAttempt, ReachChecked
from meshd.types import PeerId
from meshd.values import Address, parse_address

log = getLogger(__name__)

ANSWER_S = 15.0
"""Longest time for a peer's answer: eight dials at once take at most a connection attempt and a TLS handshake."""
MAX_RUNNING = 4
_CHECKS_S, _CHECKS_AT_ONCE = 0.5, 8
_FAILED_S, _FAILED_AT_ONCE = 0.1, 32
"""Dials for others, per second and at once, at which the peer did not answer, of addresses that its link does not show. A member
can publish any address as its own, by MQTT also of other networks, and must not have a network scanned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReach:
    """What a check of one peer showed."""

    peer: PeerId
    name: str
    there: tuple[DialAttempt, ...] = ()
    """What this peer's dials of the other's addresses showed."""
    back: tuple[DialAttempt, ...] | None = None
    """What the other peer's dials of this peer's addresses showed. None: it gave no answer, see `error`."""
    heard_here: bool | None = None
    """Whether this peer heard the other's multicast. None: this peer or the other does not use it."""
    heard_there: bool | None = None
    """Whether the other peer heard this peer's multicast."""
    ahead_s: float | None = None
    """By how much the other peer's clock is ahead."""
    round_trip_s: float = 0.0
    """How exact `ahead_s` is."""
    error: str = ""
    """Why the other peer did not check this one."""


@dataclass(slots=True)
class ReachChecker:
    """Asks other peers to dial this one, and dials those that ask."""

    links: Links
    membership: Membership
    clock: Clock
    multicast: Callable[[], tuple[str, ...] | None] = lambda: None
    """Returns the addresses of the interfaces that this peer multicasts on; None if it does not look for peers by mDNS. The daemon
    sets it, because it makes the sources of peers."""
    _running: set[PeerId] = field(default_factory=set)
    _budget: TokenBucket = field(default_factory=lambda: TokenBucket(_CHECKS_S, _CHECKS_AT_ONCE))
    _failed: TokenBucket = field(default_factory=lambda: TokenBucket(_FAILED_S, _FAILED_AT_ONCE))

    def register(self) -> None:
        """Register the handler of CHECK_REACH."""
        self.links.register(CheckReach, self._on_check)

    async def check(self, peer: PeerId) -> PeerReach:
        """Check one linked peer. Never raises for a fault of the peer or the network: the result says what failed."""
        nonce = self.clock.random_bytes(16).hex()
        there, heard, (reply, asked_s, took_s, error) = await asyncio.gather(
            self._dial_all(peer), self._multicast(nonce, nonce[::-1]), self._ask(peer, nonce)
        )
        name = self.membership.name_of(peer)
        if reply is None:
            return PeerReach(peer=peer, name=name, there=there, error=error)
        both = heard is not None and reply.multicast != ""
        return PeerReach(
            peer=peer,
            name=name,
            there=there,
            back=reply.attempts,
            heard_here=heard if both else None,
            heard_there=reply.multicast == "heard" if both else None,
            ahead_s=reply.wall - (asked_s + took_s),
            round_trip_s=took_s,
        )

    async def _ask(self, peer: PeerId, nonce: str) -> tuple[ReachChecked | None, float, float, str]:
        """Returns: the answer, the time of the request by this peer's clock, how long the answer took, and why there is none."""
        asked, began = self.clock.wall(), self.clock.monotonic()
        try:
            reply, _ = await self.links.request(peer, lambda number: CheckReach(request=number, nonce=nonce), timeout_s=ANSWER_S)
        except MeshdError as error:
            return None, asked, 0.0, error.message
        took_s = self.clock.monotonic() - began
        if not isinstance(reply, ReachChecked):
            return None, asked, took_s, f"it answered with {type(reply).__name__}"
        return reply, asked, took_s, ""

    async def _on_check(self, sender: PeerId, message: CheckReach, payload: memoryview) -> ReachChecked:
        if sender in self._running or len(self._running) >= MAX_RUNNING or not self._budget.take(self.clock.monotonic()):
            raise Overloaded("checks of reachability run here already", hint="try again in a few seconds", retry_after_s=5.0)
        self._running.add(sender)
        try:
            attempts, heard = await asyncio.gather(self._dial_for(sender), self._multicast(message.nonce[::-1], message.nonce))
        finally:
            self._running.discard(sender)
        word = "" if heard is None else "heard" if heard else "silent"
        return ReachChecked(request=message.request, attempts=attempts, multicast=word, wall=self.clock.wall())

    async def _multicast(self, own: str, other: str) -> bool | None:
        addresses = self.multicast()
        if not addresses:
            return None
        try:
            return await ask_and_hear(own, other, addresses)
        except OSError as error:
            log.debug("multicast can't be checked: %s", error)
            return False

    async def _dial_all(self, peer: PeerId) -> tuple[DialAttempt, ...]:
        return tuple(await asyncio.gather(*(self._dial(peer, address) for address in self._addresses(peer))))

    async def _dial_for(self, sender: PeerId) -> tuple[DialAttempt, ...]:
        """Dial the addresses of a peer that asked. Addresses beyond the budget of failed dials are left out."""
        proved, now = set(self.links.addresses(sender)), self.clock.monotonic()
        addresses = self._addresses(sender)
        strange = [address for address in addresses if str(address) not in proved]
        left_out = {address for address in strange if not self._failed.take(now)}
        attempts = await asyncio.gather(*(self._dial(sender, address) for address in addresses if address not in left_out))
        for attempt in attempts:
            if not attempt.why and attempt.address not in proved:
                self._failed.put_back()
        return tuple(attempts)

    def _addresses(self, peer: PeerId) -> tuple[Address, ...]:
        """Returns: the addresses of a peer as its link and discovery show them; hints of other peers are left out."""
        linked = [parse_address(text, 0) for text in self.links.addresses(peer)]
        known = self.membership.table.get(peer)
        found = [each.address for each in known.addresses if each.source in _OWN_WORD] if known is not None else []
        return tuple(address for address in dict.fromkeys([*linked, *found]) if address.port)[:MAX_ATTEMPTS]

    async def _dial(self, peer: PeerId, address: Address) -> DialAttempt:
        try:
            async with asyncio.timeout(ANSWER_S / 2):
                answered = await self.links.reach(address.host, address.port)
        except TimeoutError:
            return DialAttempt(address=str(address), why="no answer in time")
        except MeshdError as error:
            return DialAttempt(address=str(address), why=error.message)
        return DialAttempt(address=str(address), why="" if answered == peer else "another peer answers there")


_OWN_WORD = frozenset({"mdns", "mqtt", "link"})
"""Sources of addresses that a peer gives of itself."""
