import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.values import (
    Address,
    BrokerUrl,
    choice_of,
    count,
    parse_address,
    parse_broker,
    parse_name,
    parse_path,
    parse_seconds,
    parse_size,
    parse_switch,
    parse_topic_level,
    parse_url,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 2**30), ("4G", 4 * 2**30), ("4gib", 4 * 2**30), ("1.5 MiB", 3 * 2**19), ("4GB", 4 * 10**9), ("512", 512)],
)
def test_a_size_is_read_in_the_unit_it_names(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 XB", "0", "0.1", "4GiB ram", "1e9"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_a_bare_number_is_bytes(size: int) -> None:
    assert parse_size(str(size)) == size


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:7000", Address("10.0.0.1", 7000)),
        ("attic", Address("attic", 6375)),
        ("attic.local:0", Address("attic.local", 0)),
        ("[fe80::1%eth0]:7000", Address("fe80::1%eth0", 7000)),
        ("http://127.0.0.1:6374/", Address("127.0.0.1", 6374)),
    ],
)
def test_an_address_is_a_host_and_maybe_a_port(text: str, address: Address) -> None:
    assert parse_address(text, 6375) == address


@pytest.mark.parametrize("text", ["", ":6374", "attic:70000", "attic:port", "a b:1", "https://x:1", "::1:6374", "http://h:1/path"])
def test_an_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not HOST:PORT"):
        parse_address(text, 6375)


@given(st.ip_addresses(), st.integers(0, 65535))
def test_an_address_parses_its_own_text(host: object, port: int) -> None:
    address = Address(str(host), port)
    assert parse_address(str(address), 1) == address


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.1", False)]
)
def test_only_this_machine_reaches_a_loopback_address(host: str, loopback: bool) -> None:
    assert Address(host, 1).loopback is loopback


@pytest.mark.parametrize("text", ["a,b", "a:b", "", "-a", "a" * 64, "a b"])
def test_a_name_that_would_break_a_stage_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        parse_name(text)


def test_a_count_below_its_least_is_refused() -> None:
    assert count(0)("0") == 0
    with pytest.raises(ValueError, match="at least 1"):
        count(1)("0")


def test_the_error_for_an_unknown_choice_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="none of mdns, static"):
        choice_of("mdns", "static")("dns")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("mqtt://broker", BrokerUrl("broker", 1883, False)),
        ("mqtts://broker/", BrokerUrl("broker", 8883, True)),
        ("mqtts://me:p%40ss%2Fword@10.0.0.1:1", BrokerUrl("10.0.0.1", 1, True, "me", "p@ss/word")),
        ("mqtt://me@[fd00::1]:7", BrokerUrl("fd00::1", 7, False, "me")),
    ],
)
def test_the_url_of_a_broker_is_read_and_written(text: str, url: BrokerUrl) -> None:
    assert parse_broker(text) == url
    assert parse_broker(url.with_password) == url
    assert "word" not in f"{url} {url!r}"


@pytest.mark.parametrize(
    "text", ["broker", "http://me:secret@broker", "mqtt://", "mqtts://me:secret/@broker", "mqtt://b:99999", "mqtt://[x"]
)
def test_a_wrong_url_of_a_broker_is_refused_without_its_password(text: str) -> None:
    with pytest.raises(ValueError, match="it ") as refused:
        parse_broker(text)
    assert "secret" not in str(refused.value)


def test_the_level_of_a_topic_can_be_off() -> None:
    assert parse_topic_level("off") == ""
    assert parse_topic_level("homeassistant") == "homeassistant"
    with pytest.raises(ValueError, match="neither"):
        parse_topic_level("a/#")


def test_a_path_becomes_absolute_and_a_tilde_the_home() -> None:
    assert parse_path("~/x").is_absolute()
    assert "~" not in str(parse_path("~/x"))


def test_a_url_needs_its_scheme() -> None:
    assert parse_url("https://index/simple/") == "https://index/simple"
    with pytest.raises(ValueError, match="URL"):
        parse_url("index/simple")


@pytest.mark.parametrize(("text", "on"), [("on", True), ("True", True), ("1", True), ("off", False), ("no", False), ("0", False)])
def test_a_switch_has_several_spellings(text: str, on: bool) -> None:
    assert parse_switch(text) is on


@pytest.mark.parametrize("text", ["", "maybe", "2"])
def test_an_invalid_switch_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="neither on nor off"):
        parse_switch(text)


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "soon"])
def test_an_invalid_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a number of seconds"):
        parse_seconds(text)


def test_a_time_is_in_seconds() -> None:
    assert [parse_seconds(text) for text in ("0", "2.5", "10")] == [0.0, 2.5, 10.0]
