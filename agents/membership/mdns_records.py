"""Writes and reads the mDNS records of peers. Only this module uses zeroconf's internals."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zeroconf import DNSQuestionType, RecordUpdate, RecordUpdateListener, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

from meshd.agents.membership.sources import PeerFound
from meshd.types import PeerId, is_fingerprint, is_peer_id

SERVICE = "_meshd._tcp.local."
_RESOLVE_S = 10.0
_MAX_RESOLVING = 32
_LONGEST_TTL_S = 4500
"""How long a record is believed at most: the usual lifetime of an mDNS record (RFC 6762 section 10). The sender chooses the TTL,
and a forged record must not stay for days."""
_MOST_LOAD = 99_999
_TXT_LIMIT_BYTES = 255
"""Longest `key=value` entry (RFC 6763 section 6.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """The facts that this peer announces about itself."""

    peer: PeerId
    cluster: str
    name: str
    port: int
    """Port that the links listen on."""
    protocol: str
    """`major.minor`."""
    version: str
    """Version of the software."""


def to_txt(announcement: Announcement, load: int) -> dict[str, str]:
    """Build the TXT record. A value that is too long is cut at a character boundary."""
    fields = {
        "cluster": announcement.cluster,
        "protocol": announcement.protocol,
        "version": announcement.version,
        "name": announcement.name,
        "load": str(load),
    }
    return {key: _clip(value, _TXT_LIMIT_BYTES - len(key) - 1) for key, value in fields.items()}


def to_info(announcement: Announcement, load: int, addresses: Sequence[str]) -> AsyncServiceInfo:
    """Build this peer's records. The host name is the peer's id, so that no other responder on this machine has the same name."""
    return AsyncServiceInfo(
        SERVICE,
        f"{announcement.peer}.{SERVICE}",
        port=announcement.port,
        properties=to_txt(announcement, load),
        server=f"{announcement.peer}.local.",
        parsed_addresses=list(addresses),
    )


def from_records(instance: str, txt: Mapping[str, str | None], addresses: Sequence[str], port: int) -> PeerFound | None:
    """Read the records of another device, which may be hostile. Returns: None if they are not valid records of a peer."""
    cluster = _printable(txt.get("cluster"))
    if not is_peer_id(instance) or not is_fingerprint(cluster) or not addresses or not 0 < port < 65536:
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
        load=_load_of(txt.get("load")),
    )


def _load_of(text: str | None) -> int:
    return min(int(text), _MOST_LOAD) if text and text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST_LOAD)) else 0


def _clip(text: str, limit_bytes: int) -> str:
    return text.encode()[:limit_bytes].decode(errors="ignore")


def _printable(text: str | None) -> str:
    """Remove control characters, because the text is printed on terminals."""
    return "".join(character for character in text or "" if character.isprintable())


def probe(zc: Zeroconf, info: AsyncServiceInfo) -> None:
    """Send one probe: a query for peers that contains this peer's own PTR record (RFC 6762 section 8.1).

    Other peers answer a probe at once, even if they have multicast the same answer within the last second. The query asks for
    multicast answers (QM), because a unicast answer reaches only one of several daemons on a machine.
    """
    question = zc.generate_service_query(info)
    for each in question.questions:
        each.unicast = False
    zc.async_send(question)


def browse(zc: Zeroconf) -> AsyncServiceBrowser:
    """Send queries for peers after 0.02 to 0.12 s, then 1, 4 and 9 s later, and when records are about to expire.

    `PointerListener` receives the answers.
    """
    return AsyncServiceBrowser(zc, SERVICE, handlers=[_ignore], question_type=DNSQuestionType.QM)


def _ignore(**_change: object) -> None:
    """Do nothing: zeroconf requires a handler, but does not call it for repeated records, so `PointerListener` is used instead."""


class SayOnce(logging.Filter):
    """Lets each kind of message through at most once in `_SAID_S`.

    zeroconf logs an error at each attempt while the port is taken, and this peer tries every two seconds.
    """

    _SAID_S = 600.0

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record. Its kind is the text before its values are filled in."""
        kind = str(record.msg)[:80]
        if record.created - self._said.get(kind, float("-inf")) < self._SAID_S:
            return False
        self._said.pop(kind, None)
        self._said[kind] = record.created
        while len(self._said) > _MAX_RESOLVING:
            del self._said[next(iter(self._said))]
        return True


class PointerListener(RecordUpdateListener):
    """Reports every PTR record of a peer, even a repeated one: the peer may have restarted with the same records."""

    def __init__(self, heard: Callable[[str], None], gone: Callable[[str], None]) -> None:
        """`heard` and `gone` receive the instance name, of which only the form is checked: it looks like a peer's id."""
        super().__init__()
        self._heard = heard
        self._gone = gone
        self._pending: dict[str, bool] = {}

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        """Collect PTR records. zeroconf calls this when a packet arrives or records expire, before it updates its cache."""
        for update in records:
            if update.new.ttl > _LONGEST_TTL_S:
                update.new.ttl = _LONGEST_TTL_S
            alias = getattr(update.new, "alias", "").lower()
            instance = alias.removesuffix("." + SERVICE)
            if update.new.name.lower() == SERVICE and is_peer_id(instance):
                self._pending[instance] = update.new.is_expired(now)

    def async_update_records_complete(self) -> None:
        """Report the collected PTR records. zeroconf calls this after it has updated its cache."""
        pending, self._pending = self._pending, {}
        for instance, expired in pending.items():
            (self._gone if expired else self._heard)(instance)


class Resolver:
    """Finds the records of an instance name in zeroconf's cache, if they came with the PTR record, or else by a query."""

    def __init__(self, zc: Zeroconf, tasks: asyncio.TaskGroup, report: Callable[[PeerFound], None]) -> None:
        self._zc = zc
        self._tasks = tasks
        self._report = report
        self._resolving: set[str] = set()

    def heard(self, instance: str) -> None:
        """Report the peer at once if its records are cached, or else after a query, unless `_MAX_RESOLVING` queries run already."""
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
