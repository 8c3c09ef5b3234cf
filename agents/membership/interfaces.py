"""Chooses the network interfaces to look for peers on: every LAN; container bridges and tunnels only if they are named.

On Linux, sysfs shows an interface's kind. Without it (on other systems, or if sysfs is of another namespace), the name decides.
"""

import ipaddress
import re
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import psutil

SYSFS_NET = Path("/sys/class/net")
_ARPHRD_ETHERNET = frozenset({1, 6, 24, 32, 801, 802, 803})
"""From linux/if_arp.h: Ethernet, IEEE 802, FireWire, InfiniBand, 802.11. All other types but loopback are taken for tunnels."""
_ARPHRD_LOOPBACK = 772
_ANY_HOST = frozenset({"", "0.0.0.0", "::"})
_READ_AGAIN_S = 5.0
"""To list the interfaces takes 1 ms or more."""
_LOWER_DEPTH = 4
"""How many levels to search below an interface for a network card, such as VLAN, bond and card below a bridge."""


class InterfaceKind(StrEnum):
    """The kind of network that an interface leads to."""

    LAN = "network"
    VIRTUAL = "virtual pair"
    CONTAINER = "container bridge"
    TUNNEL = "tunnel"
    LOOPBACK = "loopback"


_NAMES: tuple[tuple[InterfaceKind, re.Pattern[str]], ...] = (
    (InterfaceKind.LOOPBACK, re.compile(r"lo\d*$|Loopback")),
    (
        InterfaceKind.TUNNEL,
        re.compile(r"(tun|tap|wg|utun|zt|ppp|ipsec|gif|stf|sit|gre|ip6tnl|teql)[\d-]|zt|tailscale|nordlynx|proton"),
    ),
    (
        InterfaceKind.CONTAINER,
        re.compile(r"(docker|cni|podman|virbr|lxcbr|lxdbr|incusbr|vmnet|vboxnet|cbr|bridge)\d|br-|docker_|flannel|lxc|vEthernet"),
    ),
    (InterfaceKind.VIRTUAL, re.compile(r"veth|cali|cilium|vnet\d|ifb\d|dummy|kube-|(awdl|llw|anpi)\d")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """One network interface as the system describes it."""

    name: str
    index: int
    kind: InterfaceKind
    up: bool
    """Whether it is configured up and has a carrier."""
    multicast: bool
    networks: tuple[str, ...]
    """IPv4 addresses with their prefix: `192.168.1.7/24`."""

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(network.partition("/")[0] for network in self.networks)


@dataclass(frozen=True, slots=True)
class InterfaceChoice:
    """Whether an interface is used, with a reason to show to the user."""

    interface: Interface
    used: bool
    why: str


def choose_interfaces(interfaces: Iterable[Interface], named: Sequence[str] = ()) -> list[InterfaceChoice]:
    """Pick the interfaces to look for peers on.

    If the user has `named` interfaces (by name or address), those that work are used. Otherwise every working LAN interface is
    used. Without a LAN, virtual pairs are used, as in a container whose only interface is one end of a veth. Without virtual pairs,
    loopback is used, so that daemons on one machine find each other. Container bridges and tunnels are used only if named.
    """
    present = list(interfaces)
    if named:
        return [_by_name(interface, named) for interface in present]
    for kind in (InterfaceKind.LAN, InterfaceKind.VIRTUAL, InterfaceKind.LOOPBACK):
        if any(interface.kind is kind and not _trouble(interface) for interface in present):
            return [_by_kind(interface, kind) for interface in present]
    return [InterfaceChoice(interface, False, _trouble(interface) or f"a {interface.kind.value}") for interface in present]


def _by_name(interface: Interface, named: Sequence[str]) -> InterfaceChoice:
    if not {interface.name, *interface.addresses} & set(named):
        return InterfaceChoice(interface, False, "not among those named")
    trouble = "" if interface.kind is InterfaceKind.LOOPBACK and interface.up else _trouble(interface)
    return InterfaceChoice(interface, not trouble, trouble or "named")


def _by_kind(interface: Interface, best: InterfaceKind) -> InterfaceChoice:
    if trouble := _trouble(interface):
        return InterfaceChoice(interface, False, trouble)
    if interface.kind is best:
        return InterfaceChoice(interface, True, interface.kind.value)
    return InterfaceChoice(interface, False, f"a {interface.kind.value}: used only if named")


def _trouble(interface: Interface) -> str:
    if not interface.up:
        return "down"
    if not interface.networks:
        return "no IPv4 address"
    if not interface.multicast and interface.kind is not InterfaceKind.LOOPBACK:
        return "no multicast"
    return ""


def choice_warning(choices: Sequence[InterfaceChoice], named: Sequence[str] = ()) -> tuple[str, str] | None:
    """Returns: a warning for the user (`WHAT went wrong: WHY`) and how to fix it; None if all is well."""
    used = [choice.interface for choice in choices if choice.used]
    if missing := sorted(set(named) - {name for interface in used for name in (interface.name, *interface.addresses)}):
        why = {choice.interface.name: choice.why for choice in choices}
        unused = ", ".join(f"{name} ({why.get(name, 'not here')})" for name in missing)
        return f"no peer is looked for on {unused}", "bring it up, or name another with --interface"
    if not used:
        return "no peer is looked for: no network interface is up", "connect one, or name a bridge or tunnel with --interface"
    if not named and used[0].kind is InterfaceKind.LOOPBACK:
        message = "peers are looked for on this machine only: no network but loopback is up"
        return message, "connect one, or name a bridge or tunnel with --interface"
    return None


def used_addresses(choices: Iterable[InterfaceChoice]) -> list[str]:
    """Returns: the IPv4 addresses of the interfaces in use, in the order of `choices`."""
    return [address for choice in choices if choice.used for address in choice.interface.addresses]


def link_addresses(host: str, named: Sequence[str] = ()) -> list[str]:
    """Returns: the IP addresses at which links to `host`, the address that links listen on, are accepted from other networks.

    A wildcard stands for the addresses of the interfaces in use. They are read again at most every `_READ_AGAIN_S`.
    """
    if host not in _ANY_HOST:
        return [host]
    return list(_present_addresses(tuple(named), int(time.monotonic() / _READ_AGAIN_S)))


@lru_cache(maxsize=4)
def _present_addresses(named: tuple[str, ...], period: int) -> tuple[str, ...]:
    return tuple(used_addresses(choose_interfaces(present_interfaces(), named)))


def on_own_networks(addresses: Iterable[str], choices: Iterable[InterfaceChoice]) -> tuple[str, ...]:
    """Returns: the addresses of other hosts on the networks of the interfaces in use, in their order.

    mDNS does not leave a network, so a peer that is found by it has an address there. Everything else in a record is forged, or of
    no use from here.
    """
    own = [ipaddress.ip_interface(network) for choice in choices if choice.used for network in choice.interface.networks]
    return tuple(text for text in addresses if is_unicast(text) and _is_host_of(text, own))


def _is_host_of(text: str, own: Iterable[ipaddress.IPv4Interface | ipaddress.IPv6Interface]) -> bool:
    address = ipaddress.ip_address(text)
    for interface in own:
        network = interface.network
        ends = (network.network_address, network.broadcast_address) if network.num_addresses > 2 else ()
        if address in network and address not in ends:
            return True
    return False


def is_unicast(address: str) -> bool:
    """Whether the text is an IP address of one host, so that it can be dialled."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (parsed.is_multicast or parsed.is_unspecified or parsed.is_reserved or str(parsed) == "255.255.255.255")


def present_interfaces(sysfs: Path = SYSFS_NET) -> list[Interface]:
    """List the interfaces of this device, in its network namespace and in the system's order."""
    statistics = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if (state := statistics.get(name)) is None:
            continue
        flags = set(filter(None, state.flags.split(",")))
        networks = tuple(
            str(ipaddress.ip_interface(f"{address.address}/{address.netmask or 32}"))
            for address in addresses
            if address.family == socket.AF_INET
        )
        found.append(
            Interface(
                name=name,
                index=(index := _index(name)),
                kind=interface_kind(name, index, flags, sysfs),
                up=state.isup,
                multicast=not flags or "multicast" in flags,
                networks=networks,
            )
        )
    return found


def interface_kind(name: str, index: int, flags: set[str], sysfs: Path = SYSFS_NET) -> InterfaceKind:
    """Determine an interface's kind. `flags` are psutil's (`up`, `loopback`, `pointopoint`, ...; empty where unknown)."""
    if "loopback" in flags:
        return InterfaceKind.LOOPBACK
    if "pointopoint" in flags:
        return InterfaceKind.TUNNEL
    folder = sysfs / name
    if _in_namespace(folder, index) and (kind := _kind_in_sysfs(folder)) is not None:
        return kind
    return next((kind for kind, pattern in _NAMES if pattern.match(name)), InterfaceKind.LAN)


def _index(name: str) -> int:
    """Returns: the interface's index; 0 if the interface has just gone or the system has no index for it."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _in_namespace(folder: Path, index: int) -> bool:
    """Whether sysfs shows the interface of this network namespace: after setns(2), sysfs still shows the old namespace."""
    try:
        return int((folder / "ifindex").read_text()) == index
    except (OSError, ValueError):
        return False


def _kind_in_sysfs(folder: Path) -> InterfaceKind | None:
    """Returns: the interface's kind; None if sysfs does not show it, so that the name has to decide."""
    try:
        hardware_type = int((folder / "type").read_text())
    except (OSError, ValueError):
        return None
    if hardware_type == _ARPHRD_LOOPBACK:
        return InterfaceKind.LOOPBACK
    if (folder / "tun_flags").exists() or hardware_type not in _ARPHRD_ETHERNET:
        return InterfaceKind.TUNNEL
    if _leads_to_hardware(folder, _LOWER_DEPTH):
        return InterfaceKind.LAN
    if (folder / "bridge").exists():
        return InterfaceKind.CONTAINER
    return None


def _leads_to_hardware(folder: Path, depth: int) -> bool:
    """Whether the interface is a network card, or a bridge, bond or VLAN over a card: `br0` over `eth0` is, `docker0` is not."""
    if (folder / "device").exists():
        return True
    return depth > 0 and any(_leads_to_hardware(lower, depth - 1) for lower in folder.glob("lower_*"))
