import socket
from pathlib import Path

import pytest

from meshd.agents.membership.interfaces import (
    Interface,
    InterfaceChoice,
    InterfaceKind,
    choice_warning,
    choose_interfaces,
    interface_kind,
    is_unicast,
    on_own_networks,
    present_interfaces,
    used_addresses,
)

INDEX = 7
ETHERNET, LOOPBACK, NONE, PPP, WIFI_MONITOR = "1", "772", "65534", "512", "803"


def interface(
    name: str, kind: InterfaceKind = InterfaceKind.LAN, *, up: bool = True, multicast: bool = True, at: str = "192.168.1.7/24"
) -> Interface:
    networks = (at,) if at else ()
    return Interface(name=name, index=INDEX, kind=kind, up=up, multicast=multicast, networks=networks)


def used(choices: list[InterfaceChoice]) -> set[str]:
    return {choice.interface.name for choice in choices if choice.used}


def why(choices: list[InterfaceChoice], name: str) -> str:
    return next(choice.why for choice in choices if choice.interface.name == name)


def device(sysfs: Path, name: str, hardware_type: str = ETHERNET, *extra: str, index: int = INDEX) -> Path:
    """Make a folder like those in /sys/class/net. A name in `extra` that ends in a slash becomes a folder."""
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
        ("enp3s0", ETHERNET, ("device/",), InterfaceKind.LAN),
        ("eth0", ETHERNET, (), InterfaceKind.LAN),
        ("wlan0", WIFI_MONITOR, ("device/",), InterfaceKind.LAN),
        ("lo", LOOPBACK, (), InterfaceKind.LOOPBACK),
        ("docker0", ETHERNET, ("bridge/",), InterfaceKind.CONTAINER),
        ("br-2f1c9e0d7a11", ETHERNET, ("bridge/",), InterfaceKind.CONTAINER),
        ("anybridge", ETHERNET, ("bridge/",), InterfaceKind.CONTAINER),
        ("veth12ab", ETHERNET, (), InterfaceKind.VIRTUAL),
        ("tun0", NONE, ("tun_flags",), InterfaceKind.TUNNEL),
        ("vpn", NONE, ("tun_flags",), InterfaceKind.TUNNEL),
        ("tap3", ETHERNET, ("tun_flags",), InterfaceKind.TUNNEL),
        ("homelink", NONE, (), InterfaceKind.TUNNEL),
        ("ppp0", PPP, (), InterfaceKind.TUNNEL),
    ],
)
def test_sysfs_shows_the_kind_of_an_interface(
    tmp_path: Path, name: str, hardware_type: str, extra: tuple[str, ...], kind: InterfaceKind
) -> None:
    device(tmp_path, name, hardware_type, *extra)
    assert interface_kind(name, INDEX, {"up", "multicast"}, tmp_path) is kind


def test_a_bridge_over_a_card_is_a_lan_even_if_it_is_named_like_a_container_bridge(tmp_path: Path) -> None:
    bridge = device(tmp_path, "br-lan", ETHERNET, "bridge/")
    bond = device(tmp_path, "bond0", ETHERNET, index=8)
    card = device(tmp_path, "enp1s0", ETHERNET, "device/", index=9)
    (bridge / "lower_bond0").symlink_to(bond)
    (bond / "lower_enp1s0").symlink_to(card)
    assert interface_kind("br-lan", INDEX, set(), tmp_path) is InterfaceKind.LAN


def test_a_bridge_over_containers_only_is_a_container_bridge(tmp_path: Path) -> None:
    bridge = device(tmp_path, "br0", ETHERNET, "bridge/")
    (bridge / "lower_veth1").symlink_to(device(tmp_path, "veth1", index=8))
    assert interface_kind("br0", INDEX, set(), tmp_path) is InterfaceKind.CONTAINER


def test_the_search_below_an_interface_ends_even_in_a_loop(tmp_path: Path) -> None:
    bridge = device(tmp_path, "br0", ETHERNET, "bridge/")
    (bridge / "lower_br0").symlink_to(bridge)
    assert interface_kind("br0", INDEX, set(), tmp_path) is InterfaceKind.CONTAINER


def test_a_sysfs_of_another_namespace_is_ignored(tmp_path: Path) -> None:
    device(tmp_path, "eth0", NONE, "tun_flags", index=INDEX + 1)
    assert interface_kind("eth0", INDEX, {"up"}, tmp_path) is InterfaceKind.LAN


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("en0", InterfaceKind.LAN),
        ("Ethernet 2", InterfaceKind.LAN),
        ("wlp2s0", InterfaceKind.LAN),
        ("zero", InterfaceKind.LAN),
        ("tundra", InterfaceKind.LAN),
        ("utun4", InterfaceKind.TUNNEL),
        ("tailscale0", InterfaceKind.TUNNEL),
        ("zt7nnig26", InterfaceKind.TUNNEL),
        ("wg-home", InterfaceKind.TUNNEL),
        ("virbr0", InterfaceKind.CONTAINER),
        ("podman1", InterfaceKind.CONTAINER),
        ("bridge100", InterfaceKind.CONTAINER),
        ("vEthernet (WSL)", InterfaceKind.CONTAINER),
        ("awdl0", InterfaceKind.VIRTUAL),
        ("lo0", InterfaceKind.LOOPBACK),
        ("Loopback Pseudo-Interface 1", InterfaceKind.LOOPBACK),
    ],
)
def test_without_sysfs_the_name_decides(tmp_path: Path, name: str, kind: InterfaceKind) -> None:
    assert interface_kind(name, INDEX, set(), tmp_path) is kind


def test_flags_take_precedence_over_names(tmp_path: Path) -> None:
    assert interface_kind("eth5", INDEX, {"up", "pointopoint"}, tmp_path) is InterfaceKind.TUNNEL
    assert interface_kind("dummy", INDEX, {"loopback"}, tmp_path) is InterfaceKind.LOOPBACK


def test_every_lan_is_used_and_the_rest_is_left_out_with_a_reason() -> None:
    choices = choose_interfaces(
        [
            interface("lo", InterfaceKind.LOOPBACK, at="127.0.0.1/8"),
            interface("eth0"),
            interface("wlan0"),
            interface("docker0", InterfaceKind.CONTAINER),
            interface("tailscale0", InterfaceKind.TUNNEL),
            interface("veth1", InterfaceKind.VIRTUAL),
            interface("eth1", up=False),
            interface("eth2", at=""),
            interface("eth3", multicast=False),
        ]
    )
    assert used(choices) == {"eth0", "wlan0"}
    assert why(choices, "docker0") == "a container bridge: used only if named"
    assert (why(choices, "eth1"), why(choices, "eth2"), why(choices, "eth3")) == ("down", "no IPv4 address", "no multicast")
    assert choice_warning(choices) is None


def test_a_container_whose_only_interface_is_a_veth_uses_it() -> None:
    choices = choose_interfaces(
        [interface("lo", InterfaceKind.LOOPBACK, at="127.0.0.1/8"), interface("veth0", InterfaceKind.VIRTUAL)]
    )
    assert used(choices) == {"veth0"}


def test_loopback_is_the_last_resort_and_causes_a_warning() -> None:
    choices = choose_interfaces(
        [interface("lo", InterfaceKind.LOOPBACK, multicast=False, at="127.0.0.1/8"), interface("docker0", InterfaceKind.CONTAINER)]
    )
    assert used(choices) == {"lo"}
    warning = choice_warning(choices)
    assert warning is not None
    assert "this machine only" in warning[0]


def test_without_an_interface_that_is_up_none_is_used() -> None:
    choices = choose_interfaces([interface("eth0", up=False), interface("wg0", InterfaceKind.TUNNEL)])
    assert used(choices) == set()
    warning = choice_warning(choices)
    assert warning is not None
    assert "no network interface is up" in warning[0]


@pytest.mark.parametrize("named", ["wg0", "10.0.0.3"])
def test_only_a_named_tunnel_is_used(named: str) -> None:
    choices = choose_interfaces([interface("eth0"), interface("wg0", InterfaceKind.TUNNEL, at="10.0.0.3/24")], [named])
    assert used(choices) == {"wg0"}
    assert choice_warning(choices, [named]) is None


def test_a_named_interface_that_is_missing_or_down_is_reported() -> None:
    choices = choose_interfaces([interface("eth0"), interface("eth1", up=False)], ["eth1", "eth9"])
    assert used(choices) == set()
    warning = choice_warning(choices, ["eth1", "eth9"])
    assert warning is not None
    assert warning[0] == "no peer is looked for on eth1 (down), eth9 (not here)"


def test_only_addresses_of_hosts_on_this_devices_networks_are_kept() -> None:
    choices = choose_interfaces([interface("eth0", at="192.168.1.7/24"), interface("wlan0", at="10.1.0.2/16")])
    assert used_addresses(choices) == ["192.168.1.7", "10.1.0.2"]
    forged = [
        "172.17.0.1",
        "8.8.8.8",
        "127.0.0.1",
        "192.168.1.255",
        "192.168.1.0",
        "224.0.0.251",
        "0.0.0.0",
        "::1",
        "fe80::1",
        "no",
    ]
    assert on_own_networks(["10.1.9.9", *forged, "192.168.1.20"], choices) == ("10.1.9.9", "192.168.1.20")


def test_the_address_of_one_host_can_be_dialled() -> None:
    assert is_unicast("10.0.0.7")
    assert is_unicast("fe80::1")
    assert not any(map(is_unicast, ["", "box", "224.0.0.1", "0.0.0.0", "::", "255.255.255.255", "ff02::1"]))


def test_this_device_has_a_loopback_with_its_address() -> None:
    loopback = [each for each in present_interfaces() if each.kind is InterfaceKind.LOOPBACK]
    assert any("127.0.0.1" in each.addresses for each in loopback)
    assert all(each.index == socket.if_nametoindex(each.name) for each in loopback)
