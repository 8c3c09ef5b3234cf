"""Checks of the cluster: each peer's state, ports and multicast both ways, clocks and versions. They need the running daemon."""

import asyncio
import os
import socket

from meshd.agents.admin.reach import PeerReach
from meshd.agents.cluster_service import CheckResult
from meshd.display import duration
from meshd.doctor.check import Context, Found, LivePeer, ok, unchecked, warning, wrong
from meshd.values import Address, parse_address

CLOCK_WARNING_S, CLOCK_WRONG_S = 10.0, 300.0
"""Difference of clocks: log lines of several devices are out of order; dated messages, such as invitations, are refused."""
MAX_CHECKED = 32
"""Most peers that one search asks to dial back, so that a large cluster is not asked by every user."""
_AT_ONCE = 4
CONNECT_S = 3.0


async def peers(context: Context) -> Found:
    """Say which peers are linked, and why others are not. Without a daemon, try the addresses of `--peer`."""
    if context.peer is None:
        tried = await asyncio.gather(*map(_try, context.config.peers[:MAX_CHECKED]))
        return [*tried, unchecked("peers", "the daemon does not run, so its peers are not known", "meshd up")]
    rows = [row for row in context.peer.rows() if row["id"] != context.peer.id]
    results = [_of_row(row) for row in rows if row["trouble"]]
    alive = sum(row["state"] == "alive" for row in rows)
    if alive:
        return [ok("peers", f"{alive} linked"), *results]
    if results:
        return results
    mend = "start `meshd up --key CODE` on another device (`meshd key show` prints CODE), or name one with `--peer HOST:PORT`"
    return [warning("peers", "no other peer was found", mend)]


async def _try(address: Address) -> CheckResult:
    """Connect to an address of `--peer`. Which peer answers there, only the daemon can tell."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(address.host, address.port)
    except OSError as error:
        why = "no answer in time" if isinstance(error, TimeoutError) else os.strerror(error.errno) if error.errno else str(error)
        if isinstance(error, socket.gaierror):
            why = f"its name is not known ({error.strerror})"
        mend = f"start `meshd up` there, and open TCP port {address.port}: `meshd doctor` there shows the command"
        return wrong("peer-unreachable", f"nobody answers: {why}", mend, str(address))
    writer.close()
    return ok("peer-reach", "something listens there", str(address))


_CHECK_OF = {
    "unreachable": "peer-unreachable",
    "refused": "peer-refused",
    "lost": "peer-lost",
    "silent": "peer-lost",
    "copied": "peer-copied",
    "clock": "peer-clock",
    "version": "peer-version",
    "other cluster": "other-cluster",
}


def _of_row(row: dict[str, object]) -> CheckResult:
    kind, name = str(row["trouble"]), str(row["name"])
    mild = kind in ("version", "other cluster", "clock", "silent")
    return (warning if mild else wrong)(_CHECK_OF[kind], str(row["reason"]), str(row["hint"]), name)


def notices(context: Context) -> Found:
    """Repeat the daemon's notices that no other check explains."""
    if context.peer is None:
        return []
    known = [str(row["reason"]) for row in context.peer.rows() if row["trouble"]]
    return [
        warning("notice", message, hint or "see the daemon's log")
        for message, hint in context.peer.notices()
        if not any(reason and (reason in message or message in reason) for reason in known)
        and not message.startswith(("another cluster", "other clusters", "no peer is looked for", "peers are looked for"))
    ]


async def reach(context: Context) -> Found:
    """Have each linked peer dial this one, dial each, and send multicast both ways."""
    peer = context.peer
    if peer is None:
        return [unchecked("reach", "ports can't be tried from other peers while the daemon does not run", "meshd up")]
    linked = peer.linked()[:MAX_CHECKED]
    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(other: str) -> PeerReach:
        async with turns:
            return await peer.reach(other)  # type: ignore[arg-type]

    reached = await asyncio.gather(*map(one, linked))
    results = [result for each in reached for result in judge(each, peer)]
    return results or [unchecked("reach", "no other peer is linked, so this device's ports can't be tried from outside")]


def judge(reached: PeerReach, peer: LivePeer) -> list[CheckResult]:
    """Judge the check of one peer."""
    name = reached.name
    if reached.back is None:
        found = f"it did not check this device: {reached.error}"
        older = "message 110" in reached.error
        mend = "install the same version of meshd on both" if older else "type `meshd doctor` again"
        return [unchecked("peer-reach", found, mend, name)]
    return [*_there(reached), *_back(reached, peer), *_multicast(reached), *_clock(reached)]


def _there(reached: PeerReach) -> Found:
    """Judge this peer's dials of the other peer."""
    failed = [attempt for attempt in reached.there if attempt.why]
    good = [attempt.address for attempt in reached.there if not attempt.why]
    if good or not reached.there:
        yield ok(
            "peer-reach",
            f"reached at {', '.join(good)}" if good else "linked, though none of its addresses is known here",
            reached.name,
        )
        return
    port = parse_address(failed[0].address, 0).port
    found = f"this device can't dial it ({'; '.join(f'{each.address}: {each.why}' for each in failed)}); its own dial made the link"
    mend = f"on {reached.name}, open TCP port {port}: `sudo ufw allow {port}/tcp` or `sudo firewall-cmd --add-port={port}/tcp`"
    yield warning("peer-reach", found, f"{mend}; `meshd doctor` there shows its firewall", reached.name)


def _back(reached: PeerReach, peer: LivePeer) -> Found:
    """Judge the other peer's dials of this one."""
    back = reached.back or ()
    good = [attempt.address for attempt in back if not attempt.why]
    if good:
        yield ok("peer-dials-back", f"reaches this device at {', '.join(good)}", reached.name)
        return
    port = parse_address(peer.link, 0).port
    if not back:
        yield unchecked(
            "peer-dials-back",
            "it knows no address of this device to dial",
            f"on {reached.name}: `meshd up --peer {_here(peer)}`",
            reached.name,
        )
        return
    found = f"it can't dial this device ({'; '.join(f'{each.address}: {each.why}' for each in back)})"
    mend = f"open TCP port {port} here: `sudo ufw allow {port}/tcp`, `sudo firewall-cmd --add-port={port}/tcp` or "
    mend += f"`sudo iptables -I INPUT -p tcp --dport {port} -j ACCEPT`"
    yield wrong("peer-dials-back", found, mend, reached.name)


def _here(peer: LivePeer) -> str:
    return str(Address("THIS_DEVICE", parse_address(peer.link, 0).port))


def _multicast(reached: PeerReach) -> Found:
    if reached.heard_here is None or reached.heard_there is None:
        return
    missing = [
        way for way, heard in (("from it to here", reached.heard_here), ("from here to it", reached.heard_there)) if not heard
    ]
    if not missing:
        yield ok("peer-multicast", "multicast passes both ways", reached.name)
        return
    found = f"multicast does not pass {' and '.join(missing)}: a firewall, or an access point or switch that isolates its clients"
    mend = "`sudo ufw allow 5353/udp` on both; allow multicast (IGMP snooping, client isolation) at the access point; "
    mend += f"or `meshd up --peer {reached.there[0].address if reached.there else 'HOST:PORT'}`, which needs none"
    yield warning("peer-multicast", found, mend, reached.name)


def _clock(reached: PeerReach) -> Found:
    ahead = reached.ahead_s
    if ahead is None:
        return
    side = "ahead of" if ahead > 0 else "behind"
    found = f"its clock is {duration(abs(ahead))} {side} this device's"
    mend = "on the device whose clock is wrong: `sudo timedatectl set-ntp true`"
    if abs(ahead) >= CLOCK_WRONG_S:
        yield wrong("peer-clock", found, mend, reached.name)
    elif abs(ahead) >= CLOCK_WARNING_S:
        yield warning("peer-clock", found, mend, reached.name)
    else:
        yield ok("peer-clock", f"clocks agree within {duration(abs(ahead) + reached.round_trip_s / 2)}", reached.name)
