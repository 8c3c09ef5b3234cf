"""The joiner: finds the invite of a code, proves that it has the code, and gets the join code of the cluster."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from meshd.agents.links.pairing import channel as channels
from meshd.agents.links.pairing.channel import PairingChannel
from meshd.clock import Clock
from meshd.errors import MeshdError, PeerFault, PeerLost, PeerRefused
from meshd.protocol.pairing.code import InviteCode
from meshd.protocol.pairing.exchange import JoinerSide, WrongCode
from meshd.protocol.pairing.messages import Admit, Answer, Confirm, Invitation, Join, Stored, decode_invitation, encode_joiner
from meshd.protocol.transport import Address

log = logging.getLogger(__name__)

SEARCH_S = 60.0
"""How long an invite is looked for."""
_CONNECT_S, _HANDSHAKE_S = 3.0, 5.0
_TRY_S = 15.0
_SETTLE_S = 4.0
"""How long other invites of the same number are looked for after one that has another code."""
_FAREWELL_S = 2.0
_AGAIN_S = 1.0
"""Wait before an address is tried again that did not answer: the invite may be opened only now."""
_MAX_CANDIDATES = 64
_MAX_ADDRESSES = 8
_MAX_ASKED = 16
"""Most invites of one number that are asked, so that forged ones cost a bounded time. A false one learns nothing of the code."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Where an invite may be."""

    addresses: tuple[Address, ...]
    """All of one listener: as soon as one answers, the others are not tried."""
    lasting: bool = False
    """Whether the user named it, so that it is tried again."""


class Joiner:
    """Joins by one code. Sources call `found`."""

    def __init__(self, code: InviteCode, name: str, store: Callable[[Invitation], None], clock: Clock) -> None:
        """`store` stores what the inviter gives, and raises a MeshdError if it can't. It is called at most once."""
        self._code = code
        self._name = name
        self._store = store
        self._clock = clock
        self._candidates: asyncio.Queue[Candidate] = asyncio.Queue(_MAX_CANDIDATES)
        self._asked: set[bytes] = set()
        """Fingerprints of the listeners that were asked: a wrong code must cost only one of their tries."""
        self._refusal: MeshdError | None = None
        self._until = 0.0

    def found(self, candidate: Candidate) -> None:
        """Add a place where the invite may be. Beyond the limits it is dropped."""
        if not self._candidates.full():
            self._candidates.put_nowait(candidate)

    async def join(self, search_s: float = SEARCH_S) -> tuple[Invitation, str]:
        """Look for the invite and join. Returns: what the inviter gave, and the host at which it was reached.

        Raises: PeerLost if there is no invite; PeerRefused if the code is wrong; what `store` raises.
        """
        self._until = self._clock.monotonic() + search_s
        while (left_s := self._until - self._clock.monotonic()) > 0 and len(self._asked) < _MAX_ASKED:
            try:
                async with asyncio.timeout(left_s):
                    candidate = await self._candidates.get()
            except TimeoutError:
                break
            for address in candidate.addresses[:_MAX_ADDRESSES]:
                channel = await self._reach(address)
                if channel is not None:
                    if (invitation := await self._ask(channel)) is not None:
                        return invitation, address[0]
                    break
            else:
                if candidate.lasting:
                    asyncio.get_running_loop().call_later(_AGAIN_S, self.found, candidate)
        raise self._refusal or PeerLost(
            f"no invite with number {self._code.number} was found in {search_s:.0f} s",
            hint="check that `meshd invite` still waits, in the same network; if multicast does not pass, "
            f"`meshd up --join {self._code.number}-...@HOST:PORT` with the address that it prints",
        )

    async def _reach(self, address: Address) -> PairingChannel | None:
        try:
            return await channels.connect(address, connect_s=_CONNECT_S, handshake_s=_HANDSHAKE_S)
        except MeshdError as error:
            log.debug("no invite at %s:%d: %s", *address, error)
            return None

    async def _ask(self, channel: PairingChannel) -> Invitation | None:
        """Prove the code to an inviter. Returns: None if it did not let this device join, for the reason in `_refusal`."""
        try:
            if channel.fingerprint in self._asked:
                return None
            self._asked.add(channel.fingerprint)
            async with asyncio.timeout(_TRY_S):
                return await self._exchange(channel)
        except WrongCode:
            self._refused(PeerRefused("the invite code is wrong", hint="check it against `meshd invite` on the other device"))
        except (PeerFault, TimeoutError) as error:
            self._refused(PeerLost(f"the inviter ended the exchange: {error or 'it did not answer'}", hint=_ENDED))
        finally:
            channel.abort()
        return None

    def _refused(self, error: MeshdError) -> None:
        self._refusal = error
        self._until = min(self._until, self._clock.monotonic() + _SETTLE_S)

    async def _exchange(self, channel: PairingChannel) -> Invitation:
        side = await asyncio.to_thread(JoinerSide, self._code, channel.fingerprint, self._clock.random_bytes)
        await channel.send(Join(share=side.share))
        answer = await channel.receive(Answer)
        proof = await asyncio.to_thread(side.finish, answer.share, answer.proof)
        await channel.send(Confirm(proof=proof, sealed=side.seal(encode_joiner(self._name))))
        invitation = decode_invitation(side.open((await channel.receive(Admit)).sealed))
        self._store(invitation)
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await channel.send(Stored(sealed=side.seal(b"")))
                await channel.ended()
        except (MeshdError, TimeoutError) as error:
            log.debug("the inviter may not know that this device has joined: %s", error)
        return invitation


_ENDED = "its invite may have been used, have expired or be closed: open another one with `meshd invite`"
