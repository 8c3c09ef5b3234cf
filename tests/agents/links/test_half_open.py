"""Half-open connections: a new one takes the place of the oldest one of the host that has the most."""

from meshd.agents.links.half_open import HalfOpen, origin_of


def test_a_flood_of_one_host_ends_only_its_own_connections() -> None:
    half_open, ended = HalfOpen(48), []
    half_open.enter("10.0.0.8", lambda: ended.append("honest"))
    for number in range(1000):
        half_open.enter("10.0.0.7", lambda number=number: ended.append(number))
    assert len(half_open) == half_open.most_per_host + 1
    assert ended == list(range(1000 - half_open.most_per_host))


def test_a_flood_of_many_hosts_does_not_end_the_only_connection_of_another() -> None:
    half_open, ended = HalfOpen(48), []
    half_open.enter("10.0.0.8", lambda: ended.append("honest"))
    for number in range(1000):
        half_open.enter(f"10.0.1.{number % 6}", lambda number=number: ended.append(number))
    assert len(half_open) == 48
    assert "honest" not in ended


def test_a_connection_whose_handshake_is_complete_is_not_ended() -> None:
    half_open, ended = HalfOpen(4), []
    half_open.leave(half_open.enter("10.0.0.7", lambda: ended.append("complete")))
    for _ in range(2):
        half_open.enter("10.0.0.7", lambda: ended.append("flood"))
    half_open.leave(99)
    assert (len(half_open), ended) == (2, [])


def test_the_addresses_of_one_ipv6_network_are_one_host() -> None:
    assert origin_of("2001:db8::1") == origin_of("2001:db8::ffff:1") != origin_of("2001:db8:0:1::1")
    assert origin_of("::ffff:10.0.0.7") == origin_of("10.0.0.7") == "10.0.0.7"
    assert origin_of("fe80::1%eth0") == "fe80::/64"
    assert origin_of("attic.lan") == "attic.lan"
