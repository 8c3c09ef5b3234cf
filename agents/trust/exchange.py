"""Tells peers of rotations: over links, and over connections with peers that have another key of the cluster.

One message says all: ROTATION has the sender's newest chain. Whoever knows an older one gets the newer one back, with the cluster
key if it may have it; whoever hears of a newer one without the key says what it knows itself, and so is given the key.
"""

import asyncio
from collections.abc import Callable
from logging import getLogger
from typing import Any, Protocol

import msgspec

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.events import KeyRotated
from meshd.agents.trust.trust import JOIN_AGAIN, SELF_EXCLUDED, Answer, Trust, title
from meshd.clock import Clock
from meshd.errors import InvalidRequest, NoPeer, PeerRefused, ProtocolViolation
from meshd.protocol.cluster_key import KEY_BYTES
from meshd.protocol.framing import Frame
from meshd.protocol.identity import Identity
from meshd.protocol.messages import GiveOwnerKey, Hello, Message, OwnerKeyTaken, Rotation
from meshd.protocol.owner import OwnerKey
from meshd.protocol.transport import Connection
from meshd.protocol.trust import RotationRecord
from meshd.types import PeerId

log = getLogger(__name__)

_REMIND_S = 10.0
"""How often linked peers that have not said that they know the newest rotation are told again: a full lane may have lost it."""
_REPLY_S = 10.0


class Notify(Protocol):
    """Shows a message for the user, in place of an earlier one about the same subject."""

    def __call__(self, message: str, hint: str = "", about: str = "") -> None: ...


class TrustExchange:
    """Gives the newest rotation to all peers that stay, and takes it from any peer."""

    def __init__(
        self,
        trust: Trust,
        links: Links,
        clock: Clock,
        notify: Notify,
        withdraw: Callable[[str], None],
        publish: Callable[[KeyRotated], None],
    ) -> None:
        self.trust = trust
        self.holders: set[PeerId] = set()
        """Linked peers that have shown that they have the present cluster key."""
        self._links = links
        self._clock = clock
        self._notify = notify
        self._withdraw = withdraw
        self._publish = publish
        trust.on_adopted = self._adopted
        trust.on_excluded = self._excluded
        trust.on_confirmed = self._belongs

    def register(self) -> None:
        """Register the handlers of messages, and the desk for returning peers."""
        self._links.register(Rotation, self._on_rotation)
        self._links.register(GiveOwnerKey, self._on_owner_key)
        self._links.answer_returning(self)
        if self.trust.exclusion is not None:
            self._excluded()

    def on_up(self, peer: PeerId, hello: Hello, address: tuple[str, int]) -> None:
        """Record a link that came up, and tell its peer of the newest rotation."""
        self.trust.known.linked(peer, hello.name, address[0], self.trust.authority)
        self.holders.add(peer)
        if self.trust.chain.last is not None:
            self._tell(peer, Answer())

    def on_down(self, peer: PeerId, reason: str) -> None:
        """Record that a link has ended."""
        self.trust.known.ended(peer)
        self.holders.discard(peer)

    async def run(self) -> None:
        """Remind linked peers that do not seem to know the newest rotation."""
        while True:
            await self._clock.sleep(_REMIND_S)
            for peer in self._links.peers():
                if peer not in self.holders and self.trust.chain.last is not None:
                    self._tell(peer, Answer())

    async def give_owner_key(self, peer: PeerId, seed: bytes) -> None:
        """Give a linked peer a copy of the owner key. Raises: InvalidRequest, NoPeer, PeerFault."""
        if owner_hash_of(seed) != self.trust.chain.owner:
            raise InvalidRequest("this is not the owner key of the cluster", param="key")
        if peer not in self._links.peers():
            raise NoPeer(f"{peer:.8} is not linked with this peer", hint="start `meshd up` on it")
        request = GiveOwnerKey(request=self._links.next_request())
        reply, _ = await self._links.request(peer, request, seed, timeout_s=_REPLY_S)
        if not isinstance(reply, OwnerKeyTaken):
            raise ProtocolViolation(f"GIVE_OWNER_KEY was answered with {type(reply).__name__}")

    def describe(self) -> dict[str, Any]:
        """Describe the cluster's key, the newest rotation, and every peer that was ever linked with this one or is listed."""
        trust, last = self.trust, self.trust.chain.last
        linked = set(self._links.peers())
        rows = [msgspec.to_builtins(known) | self._standing(known.peer, linked) for known in trust.known.all()]
        unmet = [peer for peer in (last.peers if last is not None else ()) if trust.known.get(peer) is None and peer != trust.me]
        excluded = trust.exclusion.last if trust.exclusion is not None else None
        return {
            "cluster": trust.key.fingerprint,
            "generation": trust.key.generation,
            "record": trust.chain.hash.hex(),
            "rotated_at": last.at if last is not None else None,
            "excluded_at": excluded.at if excluded is not None else None,
            "self": trust.me,
            "peers": rows + [{"peer": peer} | self._standing(peer, linked) for peer in unmet],
        }

    def _standing(self, peer: PeerId, linked: set[PeerId]) -> dict[str, bool]:
        return {"belongs": self.trust.belongs(peer), "linked": peer in linked, "has_key": peer in self.holders}

    async def ask(self, connection: Connection) -> None:
        """See `ReturnDesk.ask`."""
        connection.send(*self._message(Answer()))
        answer = await self._hear(connection.peer, _rotation(await connection.first()), connection.first_payload, linked=False)
        if answer is not None:
            connection.send(*self._message(answer))
        self._check(answer)

    async def answer(self, connection: Connection) -> None:
        """See `ReturnDesk.answer`."""
        message = _rotation(await connection.first())
        second: asyncio.Future[tuple[Message, bytes]] = asyncio.get_running_loop().create_future()

        def received(_: Connection, message: Message, frame: Frame) -> None:
            if second.done():
                raise ProtocolViolation("a third message of a returning peer")
            second.set_result((message, bytes(frame.payload)))

        def closed(_: Connection, reason: str) -> None:
            second.cancel()

        connection.attach(received, closed, small=True)
        answer = await self._hear(connection.peer, message, connection.first_payload, linked=False)
        connection.send(*self._message(answer or Answer()))
        if answer is not None and not answer.secret and not answer.refusal:
            # The other peer knows a newer rotation, and now that it knows that this one does not, gives it the key.
            try:
                told, payload = await second
            except asyncio.CancelledError:
                if connection.reason:
                    return
                raise
            answer = await self._hear(connection.peer, _rotation(told), payload, linked=False)
        self._check(answer)

    def _check(self, answer: Answer | None) -> None:
        """Raises: PeerRefused if the other peer was excluded, or this one."""
        if answer is not None and answer.refusal:
            raise PeerRefused(answer.refusal)
        if self.trust.exclusion is not None:
            raise PeerRefused(f"{SELF_EXCLUDED} ({title(self.trust.exclusion.last)})", hint=JOIN_AGAIN)
        if self.trust.outdated:
            raise PeerRefused("this device was joined by the code of an earlier key of the cluster", hint=JOIN_AGAIN)

    async def _on_rotation(self, sender: PeerId, message: Rotation, payload: memoryview) -> None:
        answer = await self._hear(sender, message, bytes(payload), linked=True)
        if answer is None:
            if self.trust.exclusion is None:
                self.holders.add(sender)
            return
        self._tell(sender, answer)
        if answer.refusal:
            self._links.cut(sender, answer.refusal)

    async def _on_owner_key(self, sender: PeerId, message: GiveOwnerKey, payload: memoryview) -> OwnerKeyTaken:
        await self.trust.take_owner_key(bytes(payload))
        self._notify("this device now has the owner key of the cluster: it can exclude others", "`meshd key revoke PEER`", "owner")
        return OwnerKeyTaken(request=message.request)

    async def _hear(self, peer: PeerId, message: Rotation, payload: bytes, *, linked: bool) -> Answer | None:
        secret = payload[:KEY_BYTES] if message.secret else b""
        return await self.trust.hear(peer, payload[len(secret) :], secret, linked=linked)

    def _message(self, answer: Answer) -> tuple[Rotation, bytes]:
        return Rotation(secret=bool(answer.secret)), answer.secret + self.trust.chain.encode()

    def _tell(self, peer: PeerId, answer: Answer) -> None:
        try_send(self._links.send, peer, *self._message(answer))

    def _adopted(self, identity: Identity) -> None:
        """Use the new key, and give it to all linked peers that stay; end the links with those that do not."""
        trust = self.trust
        staying = [peer for peer in self._links.peers() if trust.belongs(peer)]
        self.holders.clear()
        for peer in self._links.peers():
            self._tell(peer, Answer(secret=trust.key.secret if peer in staying else b""))
        self._links.change_key(identity, trust.belongs, f"it was excluded from the cluster by {title(trust.chain.last)}")
        self._belongs()
        self._publish_rotation(trust.chain.last, excluded=False)

    def _belongs(self) -> None:
        """This peer has the present key: dial as usual."""
        self._links.dial_rarely(False)
        self._withdraw("excluded")

    def _excluded(self) -> None:
        """Tell the user that this device was excluded, and hardly dial any more."""
        if self.trust.exclusion is not None:
            self._notify(f"{SELF_EXCLUDED} by {title(self.trust.exclusion.last)}", JOIN_AGAIN, "excluded")
            self._publish_rotation(self.trust.exclusion.last, excluded=True)
        else:
            self._notify("the join code of this device is of an earlier key of the cluster", JOIN_AGAIN, "excluded")
        self._links.dial_rarely(True)

    def _publish_rotation(self, record: RotationRecord | None, *, excluded: bool) -> None:
        if record is not None:
            self._publish(KeyRotated(generation=record.generation, staying=len(record.peers), excluded=excluded))


def _rotation(message: Message) -> Rotation:
    if not isinstance(message, Rotation):
        raise ProtocolViolation(f"a connection of a returning peer began with {type(message).__name__}, not ROTATION")
    return message


def owner_hash_of(seed: bytes) -> bytes:
    """Return the hash of an owner key, given as its 32 bytes; empty if they are none."""
    try:
        return OwnerKey.from_seed(seed).hash
    except ValueError:
        return b""
