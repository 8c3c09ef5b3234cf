"""`meshd key rotate`, `revoke` and `owner add`: a new cluster key for the devices that stay, signed with this device's owner key.

The owner key never leaves the state folder but by `owner add`: this command signs, and the daemon passes the result on.
"""

import base64
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshd.cli.support.answering import notice
from meshd.cli.support.arguments import Parser, settings_of
from meshd.cli.support.client import Daemon, local_daemon
from meshd.cli.support.output import print_json, show, table
from meshd.cli.support.progress import progress
from meshd.display import plural, short_id
from meshd.errors import ConfigError, NoPeer, RemoteFailure, StorageError, Unavailable, UsageError
from meshd.state import StateFolder

if TYPE_CHECKING:
    from meshd.protocol.cluster_key import ClusterKey
    from meshd.protocol.owner import OwnerKey
    from meshd.protocol.trust import RotationChain

COMMANDS = {
    "rotate": "give all known devices a new cluster key; the old join code becomes invalid",
    "revoke": "exclude devices: all other known ones get a new cluster key",
    "owner": "copy the owner key to another device, which then can exclude devices too",
}
EXAMPLE = "meshd key rotate\n  meshd key revoke attic\n  meshd key owner add desk"
_OWNERS_FILE = "owners.json"
_WITHIN_S = 15.0
"""How long the command waits until the linked peers have the new key. They take it within a second; others when they are back."""
_TRIES = 3
"""Two owners may rotate at the same moment; the one whose rotation does not count signs another one."""
Row = dict[str, Any]


def add_arguments(parsers: Mapping[str, Parser]) -> None:
    """Add the arguments of these commands."""
    parsers["revoke"].add_argument("peers", nargs="+", metavar="PEER", help="a peer's name, or the first characters of its id")
    for name in ("rotate", "revoke"):
        parsers[name].add_argument("--yes", action="store_true", help="do not ask")
        parsers[name].add_argument(
            "--new-owner",
            action="store_true",
            help="replace the owner key as well, if somebody may have it who should not; "
            "done without this flag if a device to which this one copied it is revoked",
        )
    parsers["owner"].add_argument("action", choices=["add"], help="copy it to PEER")
    parsers["owner"].add_argument("peers", nargs=1, metavar="PEER", help="a peer's name, or the first characters of its id")


def run(args: Namespace) -> int:
    """Run one of the commands."""
    device = _device(args)
    if args.command == "owner":
        given = _give_owner_key(device, args.peers[0])
        print_json(given) if args.json else show(f"{given['name']} has the owner key now")
        return 0
    wanted = args.peers if args.command == "revoke" else []
    known = device.daemon.get("/mesh/v1/key")
    excluded = [_resolve(text, known) for text in wanted]
    _confirm(known, excluded, args)
    return _rotate(device, known, {row["peer"] for row in excluded}, args)


@dataclass(frozen=True, slots=True)
class _Device:
    """This device: its state folder, its owner key, and its daemon."""

    folder: StateFolder
    owner: "OwnerKey"
    key: "ClusterKey"
    chain: "RotationChain"
    daemon: Daemon

    def owners(self) -> list[str]:
        """Return the ids of the peers to which the owner key was copied from here."""
        data = self.folder.read(_OWNERS_FILE)
        return list(json.loads(data)) if data else []


def _device(args: Namespace) -> _Device:
    from meshd.protocol.identity import load_trust
    from meshd.protocol.owner import load_owner_key

    settings = settings_of(args)
    state: Path = settings["state"].value
    folder = StateFolder(state)
    stored = load_trust(folder)
    if stored is None:
        raise StorageError(f"there is no cluster key in {state} yet", hint="`meshd up` makes one")
    key, chain = stored
    if key.generation and chain.last is None:
        raise ConfigError(
            "this device does not know yet who the owner of the cluster is, because it was never linked since it joined",
            hint="start `meshd up` here and on another device",
        )
    owner = load_owner_key(folder, key.owner, chain.owner)
    if owner is None:
        raise ConfigError(
            "this device can't exclude others: it does not have the owner key of the cluster",
            hint="use the device that founded the cluster, or copy the key from there with `meshd key owner add`",
        )
    daemon = local_daemon(settings)
    if daemon is None:
        raise Unavailable("no daemon runs here, which would tell the other devices", hint="start it with `meshd up`")
    return _Device(folder, owner, key, chain, daemon)


def _resolve(text: str, known: Row) -> Row:
    """Find a known peer by its name or the beginning of its id. Raises: NoPeer, UsageError."""
    rows: list[Row] = [row for row in known["peers"] if row["belongs"]]
    found = [row for row in rows if row.get("name") == text] or [row for row in rows if row["peer"].startswith(text)]
    if known["self"].startswith(text) and not found:
        raise UsageError("this device can't exclude itself", hint="`meshd key new --replace` makes it leave the cluster")
    if not found:
        raise NoPeer(f"no device of the cluster is called {text!r}", hint="`meshd key rotate` lists those that are known")
    if len(found) > 1:
        ids = ", ".join(row["peer"][:12] for row in found)
        raise UsageError(f"{text!r} means {plural(len(found), 'device')}: {ids}", hint="name each by the beginning of its id")
    return found[0]


def _confirm(known: Row, excluded: list[Row], args: Namespace) -> None:
    """Show who stays, and ask. Raises: UsageError if the answer is no, or nobody can be asked."""
    ids = {row["peer"] for row in excluded}
    staying = [row for row in known["peers"] if row["belongs"] and row["peer"] not in ids]
    hosts = {row["first_address"]: row.get("name", "") for row in excluded if row.get("first_address")}
    lines = [_line(row, hosts) for row in staying]
    file = sys.stderr if args.json else sys.stdout
    for row in excluded:
        show(f"excluded: {row.get('name', '')} ({short_id(row['peer'])})", file=file)
    show("this device stays" + (f", and {plural(len(staying), 'other')}:" if staying else ", and no other"), file=file)
    if lines:
        show(table(("NAME", "ID", "FIRST SEEN", "FROM", "LAST SEEN", "NOW", ""), lines), file=file)
    if args.yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked: standard input is no terminal", hint="check the list, then add --yes")
    print("Any other device needs the new join code. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if input().strip().lower() not in {"y", "yes"}:
        raise UsageError("nothing was changed: the answer was not yes")


def _line(row: Row, hosts: Mapping[str, str]) -> tuple[str, ...]:
    first, last = (_date(row.get(field)) for field in ("first_at", "last_at"))
    address = row.get("first_address", "")
    suspect = f"same address as {hosts[address]}: revoke it too?" if address in hosts and not _is_loopback(address) else ""
    now = "linked" if row["linked"] else "away"
    return row.get("name", "(never met)"), short_id(row["peer"]), first, address, last, now, suspect


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _date(at: float | None) -> str:
    return f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M}" if at else "-"


def _rotate(device: _Device, known: Row, excluded: set[str], args: Namespace) -> int:
    """Sign and send the rotation, wait for those that are linked, and show the result."""
    new_owner = args.new_owner or bool(excluded & set(device.owners()))
    for _ in range(_TRIES):
        code, record = _send(device, known, excluded, new_owner=new_owner)
        known = _wait(device, record)
        members = {row["peer"] for row in known["peers"] if row["belongs"]}
        if known["record"] == record or not excluded & members:
            break
        notice("another owner changed the key at the same moment: the exclusion is repeated")
        device = _device(args)
    else:
        raise RemoteFailure("other owners changed the key again and again at the same moment", hint="try again")
    if new_owner:
        _renew_owners(_device(args), members)
    _report(known, excluded, code, as_json=args.json)
    return 0


def _send(device: _Device, known: Row, excluded: set[str], *, new_owner: bool) -> tuple[str, str]:
    """Sign a rotation, and hand it to the daemon. Returns: the new join code, and the record's hash."""
    from meshd.protocol.cluster_key import ClusterKey
    from meshd.protocol.owner import OwnerKey, store_owner_key
    from meshd.protocol.trust import MAX_STAYING, sign_rotation

    staying = [known["self"], *(row["peer"] for row in known["peers"] if row["belongs"] and row["peer"] not in excluded)]
    if len(staying) > MAX_STAYING:
        raise ConfigError(
            f"{len(staying)} devices would stay; a rotation can list {MAX_STAYING}",
            hint="`meshd key revoke` those in the list that you don't know",
        )
    generation = device.chain.next_generation(device.key.generation, new_owner=new_owner)
    owner = OwnerKey.from_seed(os.urandom(32)) if new_owner else device.owner
    if new_owner:
        store_owner_key(device.folder, device.key.owner, owner, next_one=True)
    key = ClusterKey.generate(os.urandom, device.key.owner, generation)
    record = sign_rotation(
        device.owner,
        generation=generation,
        authority=key.issuer.public,
        peers=staying,
        previous=device.chain.hash,
        at=int(time.time()),
        new_owner=owner.public,
    )
    chain = device.chain.extended(record)
    body = {"rotation": base64.b64encode(chain.encode()).decode(), "key": key.secret.hex()}
    device.daemon.post("/mesh/v1/key", body)
    if new_owner:
        store_owner_key(device.folder, device.key.owner, owner)
    return key.code, record.hash.hex()


def _wait(device: _Device, record: str) -> Row:
    """Wait until all linked peers that stay have the new key, or the time is up. Returns: the last state."""
    until = time.monotonic() + _WITHIN_S
    with progress() as shown:
        while True:
            known: Row = device.daemon.get("/mesh/v1/key")
            staying = [row for row in known["peers"] if row["belongs"]]
            taken = sum(row["has_key"] for row in staying)
            waiting = sum(row["linked"] and not row["has_key"] for row in staying)
            shown.update("new key", taken, max(taken + waiting, 1), f"{plural(waiting, 'linked peer')} to go")
            if known["record"] != record or not waiting or time.monotonic() > until:
                return known
            time.sleep(0.1)


def _report(known: Row, excluded: set[str], code: str, *, as_json: bool) -> None:
    staying = [row for row in known["peers"] if row["belongs"]]
    result = {
        "generation": known["generation"],
        "record": known["record"],
        "code": code,
        "taken": [_brief(row) for row in staying if row["has_key"]],
        "away": [_brief(row) for row in staying if not row["has_key"]],
        "excluded": [_brief(row) for row in known["peers"] if row["peer"] in excluded],
    }
    if as_json:
        print_json(result)
        return
    show(f"the cluster has key {known['generation']}: {plural(len(result['taken']), 'other device')} took it")
    if result["away"]:
        names = ", ".join(row["name"] or short_id(row["peer"]) for row in result["away"])
        show(f"away: {names}; each takes it when it is back, however long that is")
    show("`meshd key show` prints the new join code")


def _brief(row: Row) -> dict[str, str]:
    return {"peer": row["peer"], "name": row.get("name", "")}


def _give_owner_key(device: _Device, peer: str) -> Row:
    """Copy the owner key to a peer, and note that it has it."""
    given: Row = device.daemon.post("/mesh/v1/key/owner", {"peer": peer, "key": device.owner.seed.hex()})
    owners = sorted({*device.owners(), given["peer"]})
    device.folder.write(_OWNERS_FILE, json.dumps(owners).encode())
    return given


def _renew_owners(device: _Device, members: set[str]) -> None:
    """Copy the new owner key to the peers that had the old one and stay."""
    owners = [peer for peer in device.owners() if peer in members]
    device.folder.write(_OWNERS_FILE, json.dumps(owners).encode())
    for peer in owners:
        try:
            _give_owner_key(device, peer)
        except (Unavailable, RemoteFailure) as error:
            notice(f"{short_id(peer)} does not have the new owner key: {error}; `meshd key owner add {peer[:12]}` when it is up")
