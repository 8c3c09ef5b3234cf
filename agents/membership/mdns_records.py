"""Writes and reads mDNS records of peers: the part of discovery that depends on zeroconf's internals."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zeroconf import DNSQuestionType, RecordUpdate, RecordUpdateListener, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

from meshd.agents.membership.sources import PeerFound
from meshd.types import PeerId, is_peer_id

SERVICE = "_meshd._tcp.local."
_RESOLVE_S = 10.0
_MAX_RESOLVING = 32
_TXT_LIMIT_BYTES = 255
"""RFC 6763 section 6.1: one `key=value`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What this peer shows of itself."""

    peer: PeerId
    cluster: str
    name: str
    port: int
    """Where its links listen."""
    protocol: str
    """`major.minor`."""
    version: str
    """Of its software."""


def to_txt(announcement: Announcement, load: str) -> dict[str, str]:
    """The TXT record; what is too long is cut at a whole character."""
    fields = {
        "cluster": announcement.cluster,
        "protocol": announcement.protocol,
        "version": announcement.version,
        "name": announcement.name,
        "load": load,
    }
    return {key: _clip(value, _TXT_LIMIT_BYTES - len(key) - 1) for key, value in fields.items()}


def to_info(announcement: Announcement, load: str, addresses: Sequence[str]) -> AsyncServiceInfo:
    """The records of this peer. The host name is its own too, so that no other responder of this machine is contradicted."""
    return AsyncServiceInfo(
        SERVICE,
        f"{announcement.peer}.{SERVICE}",
        port=announcement.port,
        properties=to_txt(announcement, load),
        server=f"{announcement.peer}.local.",
        parsed_addresses=list(addresses),
    )


def from_records(instance: str, txt: Mapping[str, str | None], addresses: Sequence[str], port: int) -> PeerFound | None:
    """Read what some device, perhaps a hostile one, put into its records. None: not a peer's."""
    cluster = _printable(txt.get("cluster"))
    if not is_peer_id(instance) or not cluster or not addresses or not 0 < port < 65536:
        return None
    return PeerFound(
        source="mdns",
        peer=PeerId(instance),
        addresses=tuple(addresses),
        port=port,
        name=_printable(txt.get("name")),
        cluster=cluster,
        protocol=_printable(txt.get("protocol")),
        version=_printable(txt.get("version")),
        load=_printable(txt.get("load")),
    )


def _clip(text: str, limit_bytes: int) -> str:
    return text.encode()[:limit_bytes].decode(errors="ignore")


def _printable(text: str | None) -> str:
    """Drop control characters: the text is printed on people's terminals."""
    return "".join(character for character in text or "" if character.isprintable())


def probe(zc: Zeroconf, info: AsyncServiceInfo) -> None:
    """Ask once who is there, with our own pointer as what we are about to announce (RFC 6762 section 8.1).

    Others answer a probe at once, even if they multicast the same within the last second. They answer to all (QM): a unicast
    answer reaches only one of several daemons on a machine.
    """
    question = zc.generate_service_query(info)
    for each in question.questions:
        each.unicast = False
    zc.async_send(question)


def browse(zc: Zeroconf) -> AsyncServiceBrowser:
    """Ask for peers in 0.02 to 0.12 s, after 1, 4 and 9 s more, and when records grow old. `PointerListener` gets the answers."""
    return AsyncServiceBrowser(zc, SERVICE, handlers=[_ignore], question_type=DNSQuestionType.QM)


def _ignore(**_change: object) -> None:
    """A browser must have a handler; its changes leave out what is merely heard again."""


class PointerListener(RecordUpdateListener):
    """Hears every pointer to a peer, repeats too: a peer that comes back with the same records is news to its links."""

    def __init__(self, heard: Callable[[str], None], gone: Callable[[str], None]) -> None:
        """Both get the instance name: the form of a peer's id is checked, nothing else."""
        super().__init__()
        self._heard = heard
        self._gone = gone
        self._pending: dict[str, bool] = {}

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        """Called by zeroconf when a packet came or records ran out; the cache has it only afterwards."""
        for update in records:
            alias = getattr(update.new, "alias", "").lower()
            instance = alias.removesuffix("." + SERVICE)
            if update.new.name.lower() == SERVICE and is_peer_id(instance):
                self._pending[instance] = update.new.is_expired(now)

    def async_update_records_complete(self) -> None:
        """Called by zeroconf when the cache has it."""
        pending, self._pending = self._pending, {}
        for instance, expired in pending.items():
            (self._gone if expired else self._heard)(instance)


class Resolver:
    """Finds the records of a peer's instance name: those that came with the pointer, else by asking."""

    def __init__(self, zc: Zeroconf, tasks: asyncio.TaskGroup, report: Callable[[PeerFound], None]) -> None:
        self._zc = zc
        self._tasks = tasks
        self._report = report
        self._resolving: set[str] = set()

    def heard(self, instance: str) -> None:
        """Report the peer, at once if its records are known. Past the limit of concurrent questions it has to be heard again."""
        info = AsyncServiceInfo(SERVICE, f"{instance}.{SERVICE}")
        if info.load_from_cache(self._zc):
            self._found(instance, info)
        elif instance not in self._resolving and len(self._resolving) < _MAX_RESOLVING:
            self._resolving.add(instance)
            self._tasks.create_task(self._ask(instance, info))

    async def _ask(self, instance: str, info: AsyncServiceInfo) -> None:
        try:
            if await info.async_request(self._zc, _RESOLVE_S * 1000):
                self._found(instance, info)
        finally:
            self._resolving.discard(instance)

    def _found(self, instance: str, info: AsyncServiceInfo) -> None:
        found = from_records(instance, info.decoded_properties, info.parsed_addresses(), info.port or 0)
        if found is not None:
            self._report(found)
