"""`meshd key api add|list|rm`: the API keys of this device's daemon, which notices each change at once."""

import os
import re
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from datetime import datetime
from pathlib import Path
from typing import Any

from meshd.api.access.key_file import KeyFile
from meshd.api.access.keys import MAX_CONCURRENCY, MAX_RATE, ApiKey
from meshd.api.access.scopes import Scope
from meshd.cli.support.answering import notice
from meshd.cli.support.arguments import add_commands, add_json, add_state
from meshd.cli.support.output import print_json, table
from meshd.config import API_KEY_FILE, API_KEYS_FILE
from meshd.display import ABSENT, duration
from meshd.state import StateFolder
from meshd.values import parse_name

EXAMPLE = "meshd key api add phone --scope infer --rate 60/min\n  meshd key api list\n  meshd key api rm phone"
_COMMANDS = {
    "add": "make an API key, which is shown once",
    "list": "list the API keys by their prefixes",
    "rm": "revoke an API key; what it has running ends within a second",
}
_UNITS_S = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PERIOD = re.compile(r"([1-9]\d{0,5})([mhdw])")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the commands of `meshd key api`."""
    parsers = add_commands(parser, _COMMANDS, EXAMPLE, dest="api_command", required=False)
    add = parsers["add"]
    add.add_argument("name", metavar="NAME", type=_argument(parse_name), help="names the key in lists: who or what uses it")
    add.add_argument(
        "--scope",
        choices=[scope.value for scope in Scope],
        default=Scope.INFER.value,
        help="infer: ask models; read: see the cluster and its metrics, but change nothing; admin: everything; default: infer",
    )
    add.add_argument("--rate", type=_argument(parse_rate), metavar="N/min", help="requests a minute; default: no limit")
    add.add_argument("--concurrency", type=_argument(parse_concurrency), metavar="N", help="requests at once; default: no limit")
    add.add_argument(
        "--expires", type=_argument(parse_expiry), metavar="WHEN", help="like 30d, 12h, or 2027-01-31; default: it does not expire"
    )
    parsers["rm"].add_argument("key", metavar="PREFIX|NAME", help="the key's prefix or name, as `meshd key api list` shows them")
    for subparser in parsers.values():
        add_state(subparser)
        add_json(subparser)


def run(args: Namespace, state: Path) -> None:
    """Run a command of `meshd key api`. Raises: ConfigError, StorageError."""
    match args.api_command:
        case "add":
            _add(args, StateFolder.open(state))
        case "list":
            _list(StateFolder(state), as_json=args.json)
        case _:
            _remove(StateFolder(state), args.key, as_json=args.json)


def _add(args: Namespace, folder: StateFolder) -> None:
    file = KeyFile(folder)
    first = file.load() is None and folder.read(API_KEY_FILE) is None
    text, key = file.add(
        args.name,
        os.urandom,
        scope=Scope(args.scope),
        created=int(time.time()),
        expires=args.expires,
        rate=args.rate,
        concurrency=args.concurrency,
    )
    if args.json:
        print_json({"api_key": text, **_row(key, {})})
        return
    print(text)
    notice(f"{key.prefix} ({key.name}) may {_RIGHTS[key.scope]}; this is the only time that the key is shown")
    if first:
        notice("from now on each client of this daemon needs a key; this user's own `meshd` commands on this device do not")


_RIGHTS = {Scope.INFER: "ask models", Scope.READ: "see the cluster and its metrics", Scope.ADMIN: "do everything"}


def _list(folder: StateFolder, *, as_json: bool) -> None:
    file = KeyFile(folder)
    used = file.last_used()
    rows = [_row(key, used) for key in file.load() or ()]
    if as_json:
        print_json({"data": rows})
        return
    headers = ("PREFIX", "NAME", "SCOPE", "RATE", "AT ONCE", "EXPIRES", "LAST USED")
    print(table(headers, (_cells(row) for row in rows)))


def _remove(folder: StateFolder, which: str, *, as_json: bool) -> None:
    key, left = KeyFile(folder).remove(which)
    if as_json:
        print_json({"removed": key.prefix, "left": left})
        return
    print(f"{key.prefix} ({key.name}) is removed")
    if not left and folder.read(API_KEY_FILE) is None:
        path = folder.path / API_KEYS_FILE
        notice(f"no key is left: only this user's commands can use the API, until a key is added or {path} is removed")


def _row(key: ApiKey, used: dict[str, int]) -> dict[str, Any]:
    """Describe a key for JSON, without its hash."""
    fields = ("prefix", "name", "scope", "rate", "concurrency", "created", "expires")
    return {field: getattr(key, field) for field in fields} | {"last_used": used.get(key.prefix)}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    now = time.time()
    expires, used = row["expires"], row["last_used"]
    left = ABSENT if expires is None else "expired" if expires <= now else f"in {duration(expires - now)}"
    return (
        row["prefix"],
        row["name"],
        row["scope"],
        f"{row['rate']}/min" if row["rate"] else ABSENT,
        str(row["concurrency"] or ABSENT),
        left,
        ABSENT if used is None else f"{duration(max(0.0, now - used))} ago",
    )


def parse_rate(text: str) -> int:
    """Parse `N/min`, or `N`."""
    return _whole(text.strip().removesuffix("/min"), MAX_RATE, "a rate like 60/min")


def parse_concurrency(text: str) -> int:
    """Parse a number of requests at once."""
    return _whole(text, MAX_CONCURRENCY, "a number of requests")


def _whole(text: str, most: int, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= most):
        raise ValueError(f"{text!r} is not {what}, from 1 to {most}")
    return int(text)


def parse_expiry(text: str) -> int:
    """Parse a period from now (`30m`, `12h`, `30d`, `4w`) or a date (`2027-01-31`). Returns: seconds since 1970."""
    now = int(time.time())
    if match := _PERIOD.fullmatch(text):
        return now + int(match[1]) * _UNITS_S[match[2]]
    try:
        moment = int(datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"{text!r} is neither a period like 30d or 12h nor a date like 2027-01-31") from None
    if moment <= now:
        raise ValueError(f"{text!r} has passed already")
    return moment


def _argument(parse: Any) -> Any:
    """Make an argparse type whose error is the parser's own text."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    return convert
