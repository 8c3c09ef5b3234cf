"""`meshd config`: show every setting, its value and its origin; with `--reload`, have the daemon read the config file again."""

from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_json, add_settings, settings_of
from meshd.cli.support.client import daemon_of
from meshd.cli.support.output import print_json, show, table
from meshd.display import ABSENT
from meshd.settings import SETTINGS

EXAMPLE = "MESHD_THREADS=4 meshd config\n  meshd config --reload"


def add_arguments(parser: Parser) -> None:
    add_settings(parser, (setting.name for setting in SETTINGS))
    parser.add_argument("--reload", action="store_true", help="have the running daemon read the config file again")
    add_json(parser)


def run(args: Namespace) -> int:
    if args.reload:
        return _reload(args)
    settings = settings_of(args)
    values = [settings[setting.name] for setting in SETTINGS]
    if args.json:
        print_json({value.setting.name: {"value": value.plain(), "origin": value.origin} for value in values})
        return 0
    print(table(("SETTING", "VALUE", "FROM"), ((value.setting.name, _shown(value.plain()), value.origin) for value in values)))
    return 0


def _reload(args: Namespace) -> int:
    changed = daemon_of(args).post("/mesh/v1/reload", {})
    if args.json:
        print_json(changed)
        return 0
    for names, text in ((changed["applied"], "valid now"), (changed["needs_restart"], "valid after a restart of the daemon")):
        if names:
            show(f"{text}: {', '.join(names)}")
    if not changed["applied"] and not changed["needs_restart"]:
        show("nothing has changed; the daemon keeps the values of its own flags and environment")
    return 0


def _shown(plain: object) -> str:
    if isinstance(plain, bool):
        return "on" if plain else "off"
    return ",".join(plain) or ABSENT if isinstance(plain, list) else ABSENT if plain is None else str(plain)
