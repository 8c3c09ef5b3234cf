"""Checks of this device's network: interfaces, multicast, ports, and how peers are found."""

import errno

import psutil

from meshd.agents.cluster_service import CheckResult
from meshd.agents.device.multicast import PORT, heard_itself, listening
from meshd.agents.membership.interfaces import (
    InterfaceChoice,
    choice_warning,
    choose_interfaces,
    used_addresses,
)
from meshd.config import require_guarded_api
from meshd.doctor.check import Context, Found, ok, unchecked, warning, wrong
from meshd.errors import ConfigError, MeshdError
from meshd.protocol import transport
from meshd.values import Address, parse_address

ANYWHERE = frozenset({"0.0.0.0", "::", ""})
_MULTICAST_MEND = (
    "let UDP port 5353 in: `sudo ufw allow 5353/udp` or `sudo firewall-cmd --add-service=mdns`; "
    "or name the peers: `meshd up --peer HOST:PORT`"
)


def choices_of(context: Context) -> list[InterfaceChoice]:
    """Returns: every interface, with whether peers are looked for on it and why."""
    return choose_interfaces(context.interfaces(), _named(context))


def _named(context: Context) -> tuple[str, ...]:
    """Returns: the interfaces that the user named, or the address that links listen on."""
    host = context.config.link.host
    return context.config.interfaces or (() if host in ANYWHERE else (host,))


def interfaces(context: Context) -> Found:
    """Check which interfaces are used, and say why others are not."""
    choices, named = choices_of(context), _named(context)
    looked_for = "mdns" in context.config.discovery
    if looked_for and (trouble := choice_warning(choices, named)) is not None:
        usable = [choice.interface.name for choice in choices if choice.interface.up and choice.interface.networks]
        names = " or ".join(f"`--interface {name}`" for name in usable if name not in named) or "`--interface NAME`"
        mend = f"start `meshd up` with {names}, or without --interface" if named else trouble[1]
        lonely = not named and any(choice.used for choice in choices)
        yield (warning if lonely else wrong)("interfaces", trouble[0], mend)
    for choice in choices:
        name, where = choice.interface.name, ", ".join(choice.interface.networks) or "no address"
        use = ("used" if looked_for else "could be used, but --discovery does not name mdns") if choice.used else "ignored"
        yield ok("interfaces", f"{use}: {choice.why} ({where})", subject=name)


def discovery(context: Context) -> Found:
    """Check that there is a way to find peers at all."""
    config = context.config
    ways = ["mDNS"] if "mdns" in config.discovery else []
    if "static" in config.discovery and config.peers:
        ways.append(f"--peer ({len(config.peers)})")
    ways += ["MQTT"] if "mqtt" in config.discovery and config.mqtt else []
    if ways:
        return [ok("discovery", f"peers are found by {' and '.join(ways)}")]
    if context.peer is not None and context.peer.linked():
        return [ok("discovery", "this device looks for no peer, and others have found it")]
    found = f"there is no way to find a peer: discovery is {','.join(config.discovery)} and no --peer is given"
    return [wrong("discovery", found, "start `meshd up` with `--discovery mdns,static`, or with `--peer HOST:PORT`")]


async def multicast(context: Context) -> Found:
    """Send mDNS packets on each interface in use, and see whether this device receives them."""
    if "mdns" not in context.config.discovery:
        return [ok("multicast", "not used: --discovery does not name mdns")]
    results = []
    for choice in choices_of(context):
        for address in choice.interface.addresses if choice.used else ():
            name = choice.interface.name
            try:
                heard = await heard_itself(context.clock.random_bytes(16).hex(), address)
            except OSError as error:
                found = f"multicast can't be sent or received on {name}: {error.strerror or error}"
                mend = f"sudo ip route add 224.0.0.0/4 dev {name}" if error.errno in _NO_ROUTE else _MULTICAST_MEND
                results.append(wrong("multicast", found, mend, name))
                continue
            if heard:
                results.append(ok("multicast", f"what is sent on {name} ({address}) is received here", name))
            else:
                results.append(
                    wrong("multicast", f"what is sent on {name} ({address}) is not received here", _MULTICAST_MEND, name)
                )
    return results or [unchecked("multicast", "no interface is in use")]


_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.ENODEV, errno.EACCES, errno.EPERM)


def mdns_port(context: Context) -> Found:
    """Check that UDP port 5353 can be shared with its present owner."""
    if "mdns" not in context.config.discovery:
        return [ok("mdns-port", "not used")]
    try:
        with listening(used_addresses(choices_of(context))):
            return [ok("mdns-port", f"UDP port {PORT} can be used")]
    except OSError as error:
        owner = owner_of(PORT, "udp")
        found = f"UDP port {PORT} can't be used: {error.strerror or error}{f'; {owner} has it' if owner else ''}"
        return [wrong("mdns-port", found, "stop it, or name the peers: `meshd up --peer HOST:PORT`")]


async def link_port(context: Context) -> Found:
    """Check the port for links: that it is free, or that this daemon answers there."""
    if context.peer is None:
        return [_of_this_machine(context.config.link) or _free("link-port", "link", context.config.link)]
    bound = parse_address(context.peer.link, 0)
    hosts = used_addresses(choices_of(context)) or ["127.0.0.1"] if bound.host in ANYWHERE else [bound.host]
    failures = []
    for host in hosts:
        try:
            answered = await context.peer.dial(host, bound.port)
        except MeshdError as error:
            failures.append(error.message)
        else:
            if answered != context.peer.id:
                failures.append(f"another peer answers at {host}:{bound.port}")
    if failures:
        return [wrong("link-port", f"links can't be accepted: {'; '.join(failures)}", "restart `meshd up`, and read its log")]
    return [
        _of_this_machine(bound) or ok("link-port", f"this peer answers at {', '.join(f'{host}:{bound.port}' for host in hosts)}")
    ]


def _of_this_machine(address: Address) -> CheckResult | None:
    if not address.loopback:
        return None
    found = f"links are accepted from this machine only ({address})"
    return warning("link-port", found, f"start `meshd up` with `--link 0.0.0.0:{address.port}`")


def api_port(context: Context) -> Found:
    """Check the port of the API."""
    if context.peer is None:
        return [_free("api-port", "api", context.config.api)]
    return [ok("api-port", f"the API answers at {context.peer.api}")]


def api_guard(context: Context) -> Found:
    """Check that an API which other machines can reach asks for a key."""
    try:
        require_guarded_api(context.config)
    except ConfigError as error:
        return [wrong("api-guard", error.message, "meshd key api")]
    guard = "asks for a key" if context.config.api_key else "is reached from this machine only, without a key"
    return [ok("api-guard", f"the API {guard}")]


def _free(check: str, setting: str, address: Address) -> CheckResult:
    """Bind the address as the daemon would, and free it again."""
    try:
        for bound in transport.bind(address.host, address.port):
            with bound:
                bound.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            owner = owner_of(address.port, "tcp") or "another program"
            mend = f"stop it, or start `meshd up` with another port: `--{setting} {Address(address.host, address.port + 10)}`"
            return wrong(check, f"{address} is in use by {owner}", mend)
        if error.errno == errno.EACCES:
            mend = f"start `meshd up` with `--{setting} {Address(address.host, address.port + 6000)}`"
            return wrong(check, f"{address} is not allowed to this user", mend)
        mend = f"start `meshd up` with `--{setting} 0.0.0.0:{address.port}`"
        return wrong(check, f"{address} can't be used: {error.strerror or error}", mend)
    return ok(check, f"{address} is free")


def owner_of(port: int, kind: str) -> str:
    """Returns: the program that has a port, as `process 12 (nginx)`; empty if that can't be seen."""
    try:
        for connection in psutil.net_connections(kind):
            if connection.laddr and connection.laddr.port == port and connection.pid and not connection.raddr:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except (psutil.Error, OSError):
        return ""
    return ""
