"""Publishes this peer's profile and status to all linked peers.

The status is sent within a tenth of a second of a change, and every few seconds, so that values that drift (free memory, measured
times) stay current. It names the profile's hash. A peer that does not have that profile fetches it, so the cards of the models on
disk are sent once to each peer, not with every change.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from logging import getLogger
from typing import Protocol

from meshd.agents.links.links import Links
from meshd.agents.links.probe import LinkProber
from meshd.agents.membership.adverts.encoding import MAX_PROFILE_BYTES, EncodedProfile, encode_profile, merge
from meshd.bounds import MAX_LISTED
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError
from meshd.protocol.messages import FetchProfile, PeerStatus, ProfileData
from meshd.types import Advert, Capability, DeviceStatus, Holding, LearnedRates, ModelCard, PeerId, Profile, Status
from meshd.values import parse_address

log = getLogger(__name__)

_GATHER_S = 0.05
"""Changes that occur within this time are sent in one status."""
_REPEAT_S = 5.0
MAX_NEIGHBOURS = 64
"""Maximum number of neighbours in one status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfDescription:
    """The content of this peer's profile and status. The functions return present values."""

    peer: PeerId
    name: str
    incarnation: int
    version: str
    capability: Capability
    """As measured when the peer started."""
    memory_free_bytes: Callable[[], int]
    holdings: Callable[[], tuple[Holding, ...]]
    models: Callable[[], tuple[ModelCard, ...]]
    learned: Callable[[], LearnedRates]
    sessions: Callable[[], int]
    draining: Callable[[], bool]
    device: Callable[[], DeviceStatus]


class Notice(Protocol):
    """Shows a message to the user, in place of the earlier one about the same subject."""

    def __call__(self, message: str, hint: str = "", about: str = "") -> None: ...


@dataclass(slots=True)
class Publisher:
    """Sends this peer's status, and its profile to peers that ask for it."""

    description: SelfDescription
    links: Links
    prober: LinkProber
    clock: Clock
    notice: Notice
    withdraw: Callable[[str], None]
    """Removes the notice about a subject."""
    api_address: str = ""
    _revision: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _encoded: tuple[Profile, EncodedProfile] | None = None

    def register(self) -> None:
        """Register the handler of FETCH_PROFILE."""
        self.links.register(FetchProfile, self._on_fetch_profile)

    async def run(self) -> None:
        """Send the status on every change, and periodically, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_REPEAT_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            else:
                await self.clock.sleep(_GATHER_S)
            self._changed.clear()
            self._revision += 1
            message = PeerStatus(status=self._status())
            for peer in self.links.peers():
                self._send(peer, message)

    def changed(self) -> None:
        """Send a new status soon, because its content or the profile has changed."""
        self._changed.set()

    def greet(self, peer: PeerId) -> None:
        """Send this peer's status to a peer whose link has come up."""
        self._send(peer, PeerStatus(status=self._status()))

    def own_advert(self) -> Advert:
        """Build this peer's own advert from present values."""
        me = self.description
        return merge(me.peer, me.name, me.version, me.incarnation, self._profile(), self._status_with(""))

    def _profile(self) -> Profile:
        return Profile(capability=self.description.capability, models=self.description.models(), api=self.api_address)

    def _status(self) -> Status:
        return self._status_with(self._encoded_profile().hash)

    def _status_with(self, profile_hash: str) -> Status:
        me = self.description
        return Status(
            revision=self._revision,
            profile=profile_hash,
            memory_free_bytes=me.memory_free_bytes(),
            holdings=me.holdings(),
            links=self.prober.stats(),
            neighbours=self._neighbours(),
            learned=me.learned(),
            sessions=me.sessions(),
            draining=me.draining(),
            wall=self.clock.wall(),
            device=me.device(),
        )

    def _neighbours(self) -> dict[PeerId, str]:
        """Returns: an IP address of each linked peer. Other peers may not know the host names that this device knows."""
        addresses = {peer: next(filter(_is_ip, self.links.addresses(peer)), "") for peer in self.links.peers()[:MAX_NEIGHBOURS]}
        return {peer: address for peer, address in addresses.items() if address}

    def _encoded_profile(self) -> EncodedProfile:
        profile = self._profile()
        if self._encoded is None or self._encoded[0] != profile:
            self._encoded = profile, encode_profile(profile)
            self._report_left_out(len(profile.models), self._encoded[1].left_out)
        return self._encoded[1]

    def _report_left_out(self, models: int, left_out: int) -> None:
        if not left_out:
            self.withdraw("profile")
            return
        self.notice(
            f"{left_out} of the {models} models on this device are not announced to other peers: "
            f"a profile has room for {MAX_LISTED} descriptions of models and {MAX_PROFILE_BYTES >> 10} KiB",
            "remove models that you don't use with `meshd rm REF`",
            about="profile",
        )

    def _on_fetch_profile(self, sender: PeerId, message: FetchProfile, payload: memoryview) -> tuple[ProfileData, bytes]:
        return ProfileData(request=message.request), self._encoded_profile().data

    def _send(self, peer: PeerId, message: PeerStatus) -> None:
        try:
            self.links.send(peer, message)
        except InvalidRequest as error:
            self.notice(
                f"other peers do not learn what this peer does: {error.message}",
                "free models that you don't use with `meshd unplace MODEL`",
                about="status",
            )
        except MeshdError as error:
            log.debug("no status to %.8s: %s", peer, error)
        else:
            self.withdraw("status")


@lru_cache(maxsize=1024)
def _is_ip(address: str) -> bool:
    try:
        ip_address(parse_address(address, 0).host)
    except ValueError:
        return False
    return True
