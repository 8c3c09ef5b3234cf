"""Announces an open invite by mDNS, and finds invites of one number.

Everyone on the LAN can read the announcement: a random name, the number of the code, and where the listener is. It says neither who
invites nor to which cluster. Everyone can also forge it: what answers must prove that it has the code.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from logging import getLogger

from zeroconf import DNSQuestionType, ServiceStateChange, Zeroconf
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from meshd.agents.links.pairing.joiner import Candidate
from meshd.agents.membership.interfaces import choose_interfaces, on_own_networks, present_interfaces, used_addresses
from meshd.errors import Unavailable

log = getLogger(__name__)

SERVICE = "_meshd-invite._tcp.local."
_NUMBER = "number"
_MAX_ADDRESSES = 8
_RESOLVE_S = 3.0
_MAX_RESOLVING = 32
_TTL_S = 120
"""How long the records of an inviter that vanished without a goodbye stay in caches."""


def own_addresses(interfaces: Sequence[str], host: str) -> list[str]:
    """Return the addresses of this device on the interfaces that are used, or `host` alone unless it stands for all."""
    return [host] if host not in {"", "0.0.0.0", "::"} else used_addresses(choose_interfaces(present_interfaces(), interfaces))


async def advertise(number: int, port: int, *, name: str, interfaces: Sequence[str], host: str) -> None:
    """Announce an invite until cancelled; then say goodbye. `name` is random. Raises: Unavailable if mDNS can't be used."""
    addresses = own_addresses(interfaces, host)
    info = AsyncServiceInfo(
        SERVICE,
        f"{name}.{SERVICE}",
        port=port,
        properties={_NUMBER: str(number)},
        server=f"{name}.local.",
        parsed_addresses=addresses,
        host_ttl=_TTL_S,
        other_ttl=_TTL_S,
    )
    zeroconf = _opened(addresses)
    try:
        await (await zeroconf.async_register_service(info, cooperating_responders=True))
        await asyncio.Event().wait()
    except (OSError, ZeroconfError) as error:
        raise Unavailable(f"mDNS failed: {error}") from error
    finally:
        with suppress(OSError, ZeroconfError):
            await (await zeroconf.async_unregister_service(info))
        await zeroconf.async_close()


async def look(number: int, found: Callable[[Candidate], None], *, interfaces: Sequence[str]) -> None:
    """Report the invites of a number on this device's own networks until cancelled. Raises: Unavailable if mDNS can't be used."""
    choices = choose_interfaces(present_interfaces(), interfaces)
    zeroconf = _opened(used_addresses(choices))
    resolving: set[asyncio.Task[None]] = set()

    async def resolve(name: str) -> None:
        try:
            info = AsyncServiceInfo(SERVICE, name)
            if not await info.async_request(zeroconf.zeroconf, _RESOLVE_S * 1000):
                return
        except (OSError, ZeroconfError) as error:  # the name is any device's word, and may be none of an invite
            log.debug("an announced invite is not looked at: %r", error)
            return
        if info.decoded_properties.get(_NUMBER) == str(number) and info.port:
            addresses = on_own_networks(tuple(info.parsed_addresses()), choices)[:_MAX_ADDRESSES]
            if addresses:
                found(Candidate(tuple((address, info.port) for address in addresses)))

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is not ServiceStateChange.Removed and len(resolving) < _MAX_RESOLVING:
            task = asyncio.get_running_loop().create_task(resolve(name))
            resolving.add(task)
            task.add_done_callback(resolving.discard)

    try:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[changed], question_type=DNSQuestionType.QM)
        try:
            await asyncio.Event().wait()
        finally:
            await browser.async_cancel()
    except (OSError, ZeroconfError) as error:
        raise Unavailable(f"mDNS failed: {error}") from error
    finally:
        for task in resolving:
            task.cancel()
        await zeroconf.async_close()


def _opened(addresses: list[str]) -> AsyncZeroconf:
    try:
        return AsyncZeroconf(interfaces=addresses)
    except OSError as error:
        raise Unavailable(f"mDNS can't be used: {error}") from error
