"""`meshd up --join CODE`: get the cluster's key from the device that runs `meshd invite`, before the daemon starts."""

import asyncio
import os
from contextlib import suppress

from meshd.cli.support.answering import notice
from meshd.config import Config
from meshd.errors import ConfigError, Unavailable
from meshd.protocol.identity import CLUSTER_FILE, choose_cluster_key, load_cluster_key
from meshd.protocol.pairing.code import InviteCode
from meshd.protocol.pairing.messages import Invitation
from meshd.state import StateFolder, lock_state
from meshd.values import Address, parse_address


def join_cluster(text: str, config: Config) -> Address:
    """Join the cluster of the device that shows this code (`7-amber-lion`, or `7-amber-lion@HOST:PORT`), and store its key.

    Returns: where that device's links listen.
    Raises: ConfigError if the code is mistyped, or this device belongs to a cluster already; StorageError; PeerLost, PeerRefused.
    """
    typed, at, listener = text.partition("@")
    code = InviteCode.parse(typed)
    named = _listener(listener) if at else None
    if config.key:
        raise ConfigError("--join and --key both say which cluster to join", hint="give one of them")
    folder = StateFolder.open(config.state)
    with lock_state(config.state):
        present = load_cluster_key(folder)
        if present is not None:
            raise ConfigError(
                f"this device belongs to cluster {present.fingerprint} already ({folder.path})",
                hint=f"start it without --join; or leave that cluster first by removing {folder.path / CLUSTER_FILE}; "
                "or use another folder with --state DIR",
            )
        return asyncio.run(_join(code, named, config, folder))


def _listener(text: str) -> Address:
    try:
        address = parse_address(text, 0)
    except ValueError as error:
        raise ConfigError(f"the address in --join is wrong: {error}") from None
    if not address.port:
        raise ConfigError(f"the address in --join has no port: {text!r}", hint="write it as `meshd invite` prints it")
    return address


async def _join(code: InviteCode, named: Address | None, config: Config, folder: StateFolder) -> Address:
    from meshd.agents.links.pairing.joiner import Candidate, Joiner
    from meshd.agents.membership.invites import mdns
    from meshd.clock import SystemClock

    def store(invitation: Invitation) -> None:
        choose_cluster_key(folder, invitation.join_code, os.urandom)

    joiner = Joiner(code, config.name, store, SystemClock())
    if named is not None:
        joiner.found(Candidate(((named.host, named.port),), lasting=True))
    for peer in config.peers if named is None else ():
        joiner.found(Candidate(((peer.host, peer.port + 1),), lasting=True))
    looking = asyncio.create_task(mdns.look(code.number, joiner.found, interfaces=config.interfaces))
    if named is not None or "mdns" not in config.discovery:
        looking.cancel()
    notice(f"looking for the device with invite {code.number}")
    try:
        invitation, host = await joiner.join()
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError, Unavailable):
            await looking
    notice(f"joined the cluster of {invitation.name}")
    return Address(host, invitation.link_port)
