import logging

from hypothesis import given
from hypothesis import strategies as st
from zeroconf import DNSPointer, RecordUpdate, Zeroconf, current_time_millis
from zeroconf.const import _CLASS_IN, _TYPE_PTR

from meshd.agents.membership.mdns_records import (
    _LONGEST_TTL_S,
    Announcement,
    PointerListener,
    SayOnce,
    from_records,
    to_info,
    to_txt,
)
from meshd.types import PeerId, is_fingerprint, is_peer_id

PEER, CLUSTER = PeerId("a" * 52), "c" * 16
texts = st.text(max_size=400)


def announcement(name: str = "desk", cluster: str = CLUSTER) -> Announcement:
    return Announcement(peer=PEER, cluster=cluster, name=name, port=6375, protocol="1.0", version="0.1.0")


def test_the_txt_record_has_only_public_facts() -> None:
    assert to_txt(announcement(), 1) == {
        "cluster": CLUSTER,
        "protocol": "1.0",
        "version": "0.1.0",
        "name": "desk",
        "load": "1",
    }


@given(name=texts)
def test_every_txt_entry_fits_and_is_cut_between_characters(name: str) -> None:
    name = name.encode(errors="ignore").decode()
    for key, value in to_txt(announcement(name), 7).items():
        assert len(f"{key}={value}".encode()) <= 255
        assert value in {name, "7", CLUSTER, "1.0", "0.1.0"} or name.startswith(value)


def test_records_are_read_back_as_announced() -> None:
    info = to_info(announcement(), 3, ["192.168.1.7", "10.0.0.2"])
    found = from_records(info.get_name(), info.decoded_properties, info.parsed_addresses(), info.port or 0)
    assert found is not None
    assert (found.peer, found.cluster, found.name, found.port) == (PEER, CLUSTER, "desk", 6375)
    assert (found.protocol, found.version, found.load) == ("1.0", "0.1.0", 3)
    assert found.addresses == ("192.168.1.7", "10.0.0.2")


@given(
    instance=st.one_of(texts, st.just(PEER)),
    txt=st.dictionaries(
        st.sampled_from(["cluster", "name", "protocol", "version", "load", "x"]),
        st.none() | texts | st.sampled_from([CLUSTER, "99", "9" * 300, "-1", "²"]),
    ),
    addresses=st.lists(st.just("192.0.2.1"), max_size=2),
    port=st.integers(-1, 70000),
)
def test_hostile_records_are_refused_or_sanitised(
    instance: str, txt: dict[str, str | None], addresses: list[str], port: int
) -> None:
    found = from_records(instance, txt, addresses, port)
    if found is not None:
        assert is_peer_id(instance)
        assert is_fingerprint(found.cluster)
        assert 0 < found.port < 65536
        assert all(text.isprintable() for text in (found.name, found.cluster, found.protocol, found.version))
        assert 0 <= found.load < 100_000


def test_a_peer_id_is_52_letters_of_base32() -> None:
    assert is_peer_id("abcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqrst")
    assert not is_peer_id("A" * 52)
    assert not is_peer_id("a" * 51)
    assert not is_peer_id("1" * 52)


def test_a_record_is_not_believed_for_longer_than_usual() -> None:
    """zeroconf shows a record to its listeners before it stores it."""
    heard: list[str] = []
    listener = PointerListener(heard.append, heard.append)
    record = DNSPointer("_meshd._tcp.local.", _TYPE_PTR, _CLASS_IN, 2_000_000, f"{PEER}._meshd._tcp.local.")
    short = DNSPointer("_meshd._tcp.local.", _TYPE_PTR, _CLASS_IN, 60, f"{PEER}._meshd._tcp.local.")
    zc: Zeroconf = None  # type: ignore[assignment]
    listener.async_update_records(zc, current_time_millis(), [RecordUpdate(record, None), RecordUpdate(short, None)])
    listener.async_update_records_complete()
    assert (record.ttl, short.ttl, heard) == (_LONGEST_TTL_S, 60, [PEER])


def test_a_message_that_repeats_is_logged_once() -> None:
    def said(at: float, text: str, *values: object) -> bool:
        record = logging.LogRecord("zeroconf", logging.ERROR, "", 1, text, values, None)
        record.created = at
        return once.filter(record)

    once = SayOnce()
    assert [said(float(at), "Address in use when binding to %s", ("", 5353)) for at in range(0, 600, 2)] == [True] + [False] * 299
    assert said(5.0, "another message")
    assert said(601.0, "Address in use when binding to %s", ("", 5353))
    assert len([number for number in range(1000) if said(700.0, f"text {number}")]) == 1000
    assert len(once._said) < 100
