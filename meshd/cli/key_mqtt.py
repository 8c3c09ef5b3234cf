"""`meshd key mqtt`: the keys of devices that send jobs over MQTT. Every peer learns of a new or revoked one from the others."""

import os
import re
import time
from argparse import Namespace
from pathlib import Path

import msgspec

from meshd.cli.support.answering import notice
from meshd.cli.support.arguments import Parser, add_commands, add_json, add_state, settings_of
from meshd.cli.support.output import print_json, show, table
from meshd.errors import ConfigError, StorageError
from meshd.protocol.identity import ClusterKey, load_cluster_key
from meshd.state import StateFolder, read_holder
from meshd.types import MqttDevice

EXAMPLE = "meshd key mqtt add door\n  meshd key mqtt list\n  meshd key mqtt rm door"
_COMMANDS = {
    "add": "make a device's key and print it, once",
    "list": "list the devices, without their keys",
    "rm": "revoke a device's key on all peers",
}


def add_arguments(parser: Parser) -> None:
    parsers = add_commands(parser, _COMMANDS, EXAMPLE, dest="mqtt_command")
    for name in ("add", "rm"):
        parsers[name].add_argument("device", metavar="NAME", help="name of the device: letters, digits, '.', '_' and '-'")
    for subparser in parsers.values():
        add_state(subparser)
        add_json(subparser)


def run(args: Namespace) -> int:
    state: Path = settings_of(args)["state"].value
    key = load_cluster_key(StateFolder(state))
    if key is None:
        raise StorageError(f"there is no cluster key in {state} yet", hint="`meshd up` makes one")
    folder = StateFolder.open(state)
    match args.mqtt_command:
        case "add":
            _add(folder, key, args.device, as_json=args.json)
        case "rm":
            _revoke(folder, args.device, as_json=args.json)
        case _:
            _list(folder, key, as_json=args.json)
    return 0


def _add(folder: StateFolder, cluster: ClusterKey, name: str, *, as_json: bool) -> None:
    from meshd.agents.membership.fleet.devices import Devices, update_devices
    from meshd.agents.membership.fleet.sealing import key_check
    from meshd.agents.membership.fleet.topics import DEVICE_NAME
    from meshd.bounds import MAX_MQTT_DEVICES

    if not re.fullmatch(DEVICE_NAME, name):
        raise ConfigError(f"{name!r} is no name of a device", hint="use letters, digits, '.', '_' and '-', 63 at most")
    serial = os.urandom(16)
    secret = cluster.device_key(name, serial)
    device = MqttDevice(serial=serial.hex(), name=name, check=key_check(secret), added=time.time())

    def add(devices: Devices) -> Devices:
        if any(known.name == name and not known.revoked for known in devices.values()):
            raise ConfigError(f"device {name} has a key already", hint=f"revoke it first with `meshd key mqtt rm {name}`")
        if len(devices) >= MAX_MQTT_DEVICES:
            raise StorageError(
                f"there are {MAX_MQTT_DEVICES} keys of devices, revoked ones included",
                hint=f"with a new cluster key, and without {folder.path / 'mqtt-devices.json'} on any peer, the list begins anew",
            )
        return {**devices, device.serial: device}

    update_devices(folder, add)
    shown = {"name": name, "cluster": cluster.fingerprint, "serial": device.serial, "key": secret.hex()}
    if as_json:
        print_json(shown)
        return
    for field, value in shown.items():
        print(f"{field:<8} {value}")
    notice("give these to the device; the key is not shown again")
    _mention_daemon(folder, "the other peers learn of it when one that runs with this folder is linked with them")


def _revoke(folder: StateFolder, name: str, *, as_json: bool) -> None:
    from meshd.agents.membership.fleet.devices import Devices, update_devices

    revoked: list[str] = []

    def revoke(devices: Devices) -> Devices:
        revoked.extend(serial for serial, known in devices.items() if known.name == name and not known.revoked)
        if not revoked:
            names = sorted({known.name for known in devices.values() if not known.revoked})
            raise ConfigError(
                f"no device {name} has a valid key", hint=f"devices with one: {', '.join(names)}" if names else "no device has one"
            )
        now = time.time()
        return {**devices, **{serial: msgspec.structs.replace(devices[serial], revoked=now) for serial in revoked}}

    update_devices(folder, revoke)
    if as_json:
        print_json({"revoked": revoked})
        return
    print(f"the key of {name} is revoked")
    _mention_daemon(folder, "until then other peers still take its jobs")


def _list(folder: StateFolder, cluster: ClusterKey, *, as_json: bool) -> None:
    from meshd.agents.membership.fleet.devices import load_devices

    devices = sorted(load_devices(folder).values(), key=lambda device: (device.name, device.added))
    rows = [
        {
            "name": device.name,
            "serial": device.serial,
            "state": _state(device, cluster),
            "added": int(device.added),
            "revoked": int(device.revoked) or None,
        }
        for device in devices
    ]
    if as_json:
        print_json({"object": "list", "data": rows})
        return
    if not rows:
        notice("no device has a key; `meshd key mqtt add NAME` makes one")
        return
    cells = ([device.name, device.serial, _day(device.added), str(row["state"])] for device, row in zip(devices, rows, strict=True))
    show(table(("NAME", "SERIAL", "ADDED", "STATE"), cells))


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(at))


def _state(device: MqttDevice, cluster: ClusterKey) -> str:
    from meshd.agents.membership.fleet.sealing import key_check

    if device.revoked:
        return "revoked"
    current = key_check(cluster.device_key(device.name, bytes.fromhex(device.serial))) == device.check
    return "valid" if current else "of an earlier cluster key"


def _mention_daemon(folder: StateFolder, consequence: str) -> None:
    if read_holder(folder.path) is None:
        notice(f"no daemon runs with {folder.path} now: `meshd up` passes this on to the other peers; {consequence}")
