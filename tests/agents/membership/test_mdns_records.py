from hypothesis import given
from hypothesis import strategies as st

from meshd.agents.membership.mdns_records import Announcement, from_records, to_info, to_txt
from meshd.types import PeerId, is_peer_id

PEER = PeerId("a" * 52)
texts = st.text(max_size=400)


def announcement(name: str = "desk", cluster: str = "c1") -> Announcement:
    return Announcement(peer=PEER, cluster=cluster, name=name, port=6375, protocol="1.0", version="0.1.0")


def test_the_txt_record_has_only_public_facts() -> None:
    assert to_txt(announcement(), "1 session") == {
        "cluster": "c1",
        "protocol": "1.0",
        "version": "0.1.0",
        "name": "desk",
        "load": "1 session",
    }


@given(name=texts, load=texts)
def test_every_txt_entry_fits_and_is_cut_between_characters(name: str, load: str) -> None:
    name, load = (text.encode(errors="ignore").decode() for text in (name, load))
    for key, value in to_txt(announcement(name), load).items():
        assert len(f"{key}={value}".encode()) <= 255
        assert value in {name, load, "c1", "1.0", "0.1.0"} or name.startswith(value) or load.startswith(value)


def test_records_are_read_back_as_announced() -> None:
    info = to_info(announcement(), "idle", ["192.168.1.7", "10.0.0.2"])
    found = from_records(info.get_name(), info.decoded_properties, info.parsed_addresses(), info.port or 0)
    assert found is not None
    assert (found.peer, found.cluster, found.name, found.port) == (PEER, "c1", "desk", 6375)
    assert (found.protocol, found.version, found.load) == ("1.0", "0.1.0", "idle")
    assert found.addresses == ("192.168.1.7", "10.0.0.2")


@given(
    instance=st.one_of(texts, st.just(PEER)),
    txt=st.dictionaries(st.sampled_from(["cluster", "name", "protocol", "version", "load", "x"]), st.none() | texts),
    addresses=st.lists(st.just("192.0.2.1"), max_size=2),
    port=st.integers(-1, 70000),
)
def test_hostile_records_are_refused_or_sanitised(
    instance: str, txt: dict[str, str | None], addresses: list[str], port: int
) -> None:
    found = from_records(instance, txt, addresses, port)
    if found is not None:
        assert is_peer_id(instance)
        assert found.cluster
        assert 0 < found.port < 65536
        assert all(text.isprintable() for text in (found.name, found.cluster, found.protocol, found.version, found.load))


def test_a_peer_id_is_52_letters_of_base32() -> None:
    assert is_peer_id("abcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqrst")
    assert not is_peer_id("A" * 52)
    assert not is_peer_id("a" * 51)
    assert not is_peer_id("1" * 52)
