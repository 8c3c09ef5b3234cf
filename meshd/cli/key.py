"""`meshd key`: the cluster key, which devices share, the API keys, which clients send, and the keys of MQTT devices.

`key_rotation.py` has the commands that only the owner's device can run.
"""

import os
import secrets
from argparse import Namespace
from pathlib import Path

from meshd.cli import key_mqtt, key_rotation
from meshd.cli.support import api_keys
from meshd.cli.support.answering import notice
from meshd.cli.support.arguments import Parser, add_commands, add_json, add_state, settings_of
from meshd.cli.support.output import print_json
from meshd.cli.support.secret_arguments import given
from meshd.config import API_KEY_FILE
from meshd.errors import StorageError
from meshd.protocol.identity import ClusterKey, found_cluster, load_cluster_key, load_trust, store_cluster_key
from meshd.protocol.owner import load_owner_key
from meshd.state import StateFolder, read_holder

EXAMPLE = "\n  ".join(
    (
        "meshd key show",
        "meshd key new --replace",
        "meshd key join mesh-7K2Q-...",
        api_keys.EXAMPLE,
        key_rotation.EXAMPLE,
        key_mqtt.EXAMPLE,
    )
)

_COMMANDS = {
    "show": "show the join code, to type on the next device",
    "new": "start a new cluster with a new key",
    "join": "join the cluster that a join code belongs to",
    "api": "add, list and revoke API keys; without a command: show the one key that has all rights, and make it if there is none",
    **key_rotation.COMMANDS,
    "mqtt": "add, list and revoke the keys of devices that send jobs over MQTT",
}


def add_arguments(parser: Parser) -> None:
    parsers = add_commands(parser, _COMMANDS, EXAMPLE)
    parsers["join"].add_argument(
        "code",
        metavar="CODE",
        help="the join code that `meshd key show` prints on a device of the cluster; `-`: from standard input",
    )
    for name in ("new", "join"):
        parsers[name].add_argument("--replace", action="store_true", help="replace the present key, and leave its cluster")
    parsers["api"].add_argument("--new", action="store_true", help="make a new key; the old one becomes invalid")
    api_keys.add_arguments(parsers["api"])
    key_rotation.add_arguments(parsers)
    key_mqtt.add_arguments(parsers.pop("mqtt"))
    for subparser in parsers.values():
        add_state(subparser)
        add_json(subparser)


def run(args: Namespace) -> int:
    state: Path = settings_of(args)["state"].value
    match args.command:
        case "show":
            _print_code(_present_key(state), args.json)
            _print_standing(state)
        case "new":
            _print_code(_new(state, replace=args.replace), args.json)
        case "join":
            _print_code(_store(state, ClusterKey.from_code(given(args.code, "join code")), replace=args.replace), args.json)
        case command if command in key_rotation.COMMANDS:
            return key_rotation.run(args)
        case "mqtt":
            return key_mqtt.run(args)
        case _ if args.api_command is not None:
            api_keys.run(args, state)
        case _:
            _print_api_key(_api_key(state, renew=args.new), args.json)
    return 0


def _present_key(state: Path) -> ClusterKey:
    key = load_cluster_key(StateFolder(state))
    if key is None:
        hint = "`meshd up` makes one, `meshd key join CODE` takes another device's"
        raise StorageError(f"there is no cluster key in {state} yet", hint=hint)
    return key


def _print_standing(state: Path) -> None:
    """Tell which key of the cluster this is, and whether this device can exclude others."""
    folder = StateFolder(state)
    trust = load_trust(folder)
    if trust is None:
        return
    key, chain = trust
    owner = load_owner_key(folder, key.owner, chain.owner) is not None
    notice(f"key {key.generation} of the cluster; this device {'has' if owner else 'does not have'} the owner key")


def _new(state: Path, *, replace: bool) -> ClusterKey:
    folder = StateFolder.open(state)
    _replaced(folder, replace)  # before the owner key of the new cluster is stored
    return _store(state, found_cluster(folder, os.urandom), replace=True)


def _store(state: Path, key: ClusterKey, *, replace: bool) -> ClusterKey:
    folder = StateFolder.open(state)
    if _replaced(folder, replace, key) == key:
        return key
    store_cluster_key(folder, key)
    if holder := read_holder(state):
        notice(f"the daemon that runs now (process {holder.pid}) uses the old key until it is restarted")
    return key


def _replaced(folder: StateFolder, replace: bool, key: ClusterKey | None = None) -> ClusterKey | None:
    """Return the key that is to be replaced, if it can be read. Raises: StorageError if there is one and it may not be replaced."""
    try:
        present = load_cluster_key(folder)
    except StorageError:
        if replace:
            return None
        raise
    if present is not None and present != key and not replace:
        hint = "add --replace to leave that cluster, or use another folder with --state DIR"
        raise StorageError(f"{folder.path} holds the key of cluster {present.fingerprint}: this would replace it", hint=hint)
    return present


def _print_code(key: ClusterKey, as_json: bool) -> None:
    if as_json:
        print_json({"code": key.code})
        return
    print(key.code)
    notice(f"cluster {key.fingerprint}; on the next device type: meshd up --key {key.code}")


def _api_key(state: Path, *, renew: bool) -> str:
    folder = StateFolder.open(state)
    present = folder.read(API_KEY_FILE)
    if present and not renew:
        return present.decode().strip()
    generated = secrets.token_hex(24)  # no "-" at its beginning, which `--api-key KEY` would take for a flag
    folder.write(API_KEY_FILE, f"{generated}\n".encode())
    return generated


def _print_api_key(key: str, as_json: bool) -> None:
    if as_json:
        print_json({"api_key": key})
        return
    print(key)
    notice("clients send it as `Authorization: Bearer KEY` (OpenAI's clients: api_key); `meshd up` requires it from its next start")
