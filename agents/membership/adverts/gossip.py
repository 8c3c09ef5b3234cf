"""Limits how many addresses are taken from the statuses of other peers, so that a member can't fill tables or cause many dials."""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice

from meshd.agents.budget import TokenBucket
from meshd.agents.membership.adverts.publisher import MAX_NEIGHBOURS
from meshd.agents.membership.interfaces import is_unicast
from meshd.types import PeerId, is_peer_id
from meshd.values import Address, parse_address

PER_SENDER_S, PER_SENDER_AT_ONCE = 0.5, MAX_NEIGHBOURS
"""A peer that joins learns of a whole cluster from one status; later statuses bring few new peers."""
IN_ALL_S, IN_ALL_AT_ONCE = 2.0, 2 * MAX_NEIGHBOURS
AGAIN_S = 60.0
"""Shortest time after which the same hint is used again, at the expense of the budget."""
_REMEMBERED = 1024
_LONGEST_ADDRESS = 64


class GossipBudget:
    """Chooses the hints to use. No clock: time comes with each call."""

    def __init__(self) -> None:
        self._in_all = TokenBucket(IN_ALL_S, IN_ALL_AT_ONCE)
        self._senders: dict[PeerId, TokenBucket] = {}
        self._used: OrderedDict[tuple[PeerId, str], float] = OrderedDict()
        """When each hint was last used, oldest first."""

    def choose(self, sender: PeerId, hints: Mapping[PeerId, str], now: float) -> list[tuple[PeerId, Address]]:
        """Returns: the hints to use now: well-formed, not used lately, and within the budgets of this sender and of all."""
        budget = self._senders.setdefault(sender, TokenBucket(PER_SENDER_S, PER_SENDER_AT_ONCE))
        chosen = []
        for peer, text in islice(hints.items(), MAX_NEIGHBOURS):
            if not (budget.has(now) and self._in_all.has(now)):
                break
            if now - self._used.get((peer, text), float("-inf")) < AGAIN_S:
                continue
            # A malformed hint costs a token too: it costs as much work as another.
            budget.take(now)
            self._in_all.take(now)
            if is_peer_id(peer) and (address := _address_of(text)) is not None:
                self._remember(peer, text, now)
                chosen.append((peer, address))
        return chosen

    def forget(self, sender: PeerId) -> None:
        """Forget a sender whose link has ended. Its used hints stay remembered, so that a new link gives no new budget for them."""
        self._senders.pop(sender, None)

    def _remember(self, peer: PeerId, text: str, now: float) -> None:
        self._used[peer, text] = now
        self._used.move_to_end((peer, text))
        while len(self._used) > _REMEMBERED:
            self._used.popitem(last=False)


def _address_of(text: str) -> Address | None:
    """Returns: the address; None unless it is `IP:PORT`. Host names are not resolved for another peer."""
    if len(text) > _LONGEST_ADDRESS:
        return None
    try:
        address = parse_address(text, 0)
        reachable = address.port > 0 and is_unicast(address.host)
    except ValueError:
        return None
    return address if reachable else None
