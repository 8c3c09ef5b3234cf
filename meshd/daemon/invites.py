"""What an invite of this device gives, and where it listens."""

from functools import partial

from meshd.agents.links.pairing.inviter import InviterSettings
from meshd.agents.membership.invites import mdns
from meshd.clock import Clock
from meshd.config import Config
from meshd.peer.peer import Peer
from meshd.protocol.identity import stored_code
from meshd.state import StateFolder


def inviter_settings(config: Config, peer: Peer, clock: Clock) -> InviterSettings:
    """Return the settings of the inviter: it gives the stored join code, and is advertised where mDNS is on."""

    async def advertise(number: int, port: int) -> None:
        if "mdns" in config.discovery:
            name = clock.random_bytes(16).hex()
            await mdns.advertise(number, port, name=name, interfaces=config.interfaces, host=config.link.host)

    return InviterSettings(
        name=config.name,
        join_code=partial(stored_code, StateFolder(config.state)),
        host=config.link.host,
        link_port=peer.links.bind,
        hosts=lambda: mdns.own_addresses(config.interfaces, config.link.host),
        folder=config.state,
        advertise=advertise,
    )
