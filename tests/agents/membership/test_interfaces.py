import socket
from pathlib import Path

import pytest

from meshd.agents.membership.interfaces import (
    Choice,
    Interface,
    Kind,
    choose,
    kind_of,
    nearest_first,
    present_interfaces,
    shortcoming,
    used_addresses,
)

INDEX = 7
ETHERNET, LOOPBACK, NONE, PPP, WIFI_MONITOR = "1", "772", "65534", "512", "803"


def interface(
    name: str, kind: Kind = Kind.LAN, *, up: bool = True, multicast: bool = True, at: str = "192.168.1.7/24"
) -> Interface:
    networks = (at,) if at else ()
    return Interface(name=name, index=INDEX, kind=kind, up=up, multicast=multicast, networks=networks)


def used(choices: list[Choice]) -> set[str]:
    return {choice.interface.name for choice in choices if choice.used}


def why(choices: list[Choice], name: str) -> str:
    return next(choice.why for choice in choices if choice.interface.name == name)


def device(sysfs: Path, name: str, hardware_type: str = ETHERNET, *extra: str, index: int = INDEX) -> Path:
    """A folder as /sys/class/net has it; a name in `extra` that ends in a slash is a folder."""
    folder = sysfs / name
    folder.mkdir(parents=True)
    (folder / "type").write_text(f"{hardware_type}\n")
    (folder / "ifindex").write_text(f"{index}\n")
    for each in extra:
        if each.endswith("/"):
            (folder / each).mkdir()
        else:
            (folder / each).write_text("0x1002\n")
    return folder


@pytest.mark.parametrize(
    ("name", "hardware_type", "extra", "kind"),
    [
        ("enp3s0", ETHERNET, ("device/",), Kind.LAN),
        ("eth0", ETHERNET, (), Kind.LAN),
        ("wlan0", WIFI_MONITOR, ("device/",), Kind.LAN),
        ("lo", LOOPBACK, (), Kind.LOOPBACK),
        ("docker0", ETHERNET, ("bridge/",), Kind.CONTAINER),
        ("br-2f1c9e0d7a11", ETHERNET, ("bridge/",), Kind.CONTAINER),
        ("anybridge", ETHERNET, ("bridge/",), Kind.CONTAINER),
        ("veth12ab", ETHERNET, (), Kind.VIRTUAL),
        ("tun0", NONE, ("tun_flags",), Kind.TUNNEL),
        ("vpn", NONE, ("tun_flags",), Kind.TUNNEL),
        ("tap3", ETHERNET, ("tun_flags",), Kind.TUNNEL),
        ("homelink", NONE, (), Kind.TUNNEL),
        ("ppp0", PPP, (), Kind.TUNNEL),
    ],
)
def test_sysfs_tells_what_an_interface_leads_to(
    tmp_path: Path, name: str, hardware_type: str, extra: tuple[str, ...], kind: Kind
) -> None:
    device(tmp_path, name, hardware_type, *extra)
    assert kind_of(name, INDEX, {"up", "multicast"}, tmp_path) is kind


def test_a_bridge_over_a_card_is_the_lan_even_by_a_container_bridges_name(tmp_path: Path) -> None:
    bridge = device(tmp_path, "br-lan", ETHERNET, "bridge/")
    bond = device(tmp_path, "bond0", ETHERNET, index=8)
    card = device(tmp_path, "enp1s0", ETHERNET, "device/", index=9)
    (bridge / "lower_bond0").symlink_to(bond)
    (bond / "lower_enp1s0").symlink_to(card)
    assert kind_of("br-lan", INDEX, set(), tmp_path) is Kind.LAN


def test_a_bridge_over_containers_alone_is_theirs(tmp_path: Path) -> None:
    bridge = device(tmp_path, "br0", ETHERNET, "bridge/")
    (bridge / "lower_veth1").symlink_to(device(tmp_path, "veth1", index=8))
    assert kind_of("br0", INDEX, set(), tmp_path) is Kind.CONTAINER


def test_interfaces_that_are_their_own_lower_end_the_search(tmp_path: Path) -> None:
    bridge = device(tmp_path, "br0", ETHERNET, "bridge/")
    (bridge / "lower_br0").symlink_to(bridge)
    assert kind_of("br0", INDEX, set(), tmp_path) is Kind.CONTAINER


def test_a_sysfs_of_another_namespace_is_not_believed(tmp_path: Path) -> None:
    device(tmp_path, "eth0", NONE, "tun_flags", index=INDEX + 1)
    assert kind_of("eth0", INDEX, {"up"}, tmp_path) is Kind.LAN


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("en0", Kind.LAN),
        ("Ethernet 2", Kind.LAN),
        ("wlp2s0", Kind.LAN),
        ("zero", Kind.LAN),
        ("tundra", Kind.LAN),
        ("utun4", Kind.TUNNEL),
        ("tailscale0", Kind.TUNNEL),
        ("zt7nnig26", Kind.TUNNEL),
        ("wg-home", Kind.TUNNEL),
        ("virbr0", Kind.CONTAINER),
        ("podman1", Kind.CONTAINER),
        ("bridge100", Kind.CONTAINER),
        ("vEthernet (WSL)", Kind.CONTAINER),
        ("awdl0", Kind.VIRTUAL),
        ("lo0", Kind.LOOPBACK),
        ("Loopback Pseudo-Interface 1", Kind.LOOPBACK),
    ],
)
def test_without_sysfs_the_name_decides(tmp_path: Path, name: str, kind: Kind) -> None:
    assert kind_of(name, INDEX, set(), tmp_path) is kind


def test_flags_go_before_names(tmp_path: Path) -> None:
    assert kind_of("eth5", INDEX, {"up", "pointopoint"}, tmp_path) is Kind.TUNNEL
    assert kind_of("dummy", INDEX, {"loopback"}, tmp_path) is Kind.LOOPBACK


def test_every_lan_is_used_and_the_rest_left_out_with_a_reason() -> None:
    choices = choose(
        [
            interface("lo", Kind.LOOPBACK, at="127.0.0.1/8"),
            interface("eth0"),
            interface("wlan0"),
            interface("docker0", Kind.CONTAINER),
            interface("tailscale0", Kind.TUNNEL),
            interface("veth1", Kind.VIRTUAL),
            interface("eth1", up=False),
            interface("eth2", at=""),
            interface("eth3", multicast=False),
        ]
    )
    assert used(choices) == {"eth0", "wlan0"}
    assert why(choices, "docker0") == "a container bridge: used only if named"
    assert (why(choices, "eth1"), why(choices, "eth2"), why(choices, "eth3")) == ("down", "no IPv4 address", "no multicast")
    assert shortcoming(choices) is None


def test_a_container_whose_only_interface_is_a_veth_uses_it() -> None:
    choices = choose([interface("lo", Kind.LOOPBACK, at="127.0.0.1/8"), interface("veth0", Kind.VIRTUAL)])
    assert used(choices) == {"veth0"}


def test_loopback_is_the_last_resort_and_says_so() -> None:
    choices = choose([interface("lo", Kind.LOOPBACK, multicast=False, at="127.0.0.1/8"), interface("docker0", Kind.CONTAINER)])
    assert used(choices) == {"lo"}
    told = shortcoming(choices)
    assert told is not None
    assert "this machine only" in told[0]


def test_with_nothing_up_nothing_is_used() -> None:
    choices = choose([interface("eth0", up=False), interface("wg0", Kind.TUNNEL)])
    assert used(choices) == set()
    told = shortcoming(choices)
    assert told is not None
    assert "no network interface is up" in told[0]


@pytest.mark.parametrize("named", ["wg0", "10.0.0.3"])
def test_a_named_tunnel_is_used_alone(named: str) -> None:
    choices = choose([interface("eth0"), interface("wg0", Kind.TUNNEL, at="10.0.0.3/24")], [named])
    assert used(choices) == {"wg0"}
    assert shortcoming(choices, [named]) is None


def test_a_named_interface_that_is_missing_or_down_is_told() -> None:
    choices = choose([interface("eth0"), interface("eth1", up=False)], ["eth1", "eth9"])
    assert used(choices) == set()
    told = shortcoming(choices, ["eth1", "eth9"])
    assert told is not None
    assert told[0] == "no peer is looked for on eth1 (down), eth9 (not here)"


def test_addresses_on_our_own_networks_come_first() -> None:
    choices = choose([interface("eth0", at="192.168.1.7/24"), interface("wlan0", at="10.1.0.2/16")])
    assert used_addresses(choices) == ["192.168.1.7", "10.1.0.2"]
    assert nearest_first(["172.17.0.1", "10.1.9.9", "8.8.8.8", "192.168.1.20"], choices) == (
        "10.1.9.9",
        "192.168.1.20",
        "172.17.0.1",
        "8.8.8.8",
    )


def test_this_device_has_a_loopback_with_its_address() -> None:
    loopback = [each for each in present_interfaces() if each.kind is Kind.LOOPBACK]
    assert any("127.0.0.1" in each.addresses for each in loopback)
    assert all(each.index == socket.if_nametoindex(each.name) for each in loopback)
