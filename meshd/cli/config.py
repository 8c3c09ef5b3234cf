"""`meshd config`: show every setting, its value and its origin."""

from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_json, add_settings, settings_of
from meshd.cli.support.output import print_json, table
from meshd.display import ABSENT
from meshd.settings import SETTINGS

EXAMPLE = "MESHD_THREADS=4 meshd config"


def add_arguments(parser: Parser) -> None:
    add_settings(parser, (setting.name for setting in SETTINGS))
    add_json(parser)


def run(args: Namespace) -> int:
    settings = settings_of(args)
    values = [settings[setting.name] for setting in SETTINGS]
    if args.json:
        print_json({value.setting.name: {"value": value.plain(), "origin": value.origin} for value in values})
        return 0
    print(table(("SETTING", "VALUE", "FROM"), ((value.setting.name, _shown(value.plain()), value.origin) for value in values)))
    return 0


def _shown(plain: object) -> str:
    if isinstance(plain, bool):
        return "on" if plain else "off"
    return ",".join(plain) or ABSENT if isinstance(plain, list) else ABSENT if plain is None else str(plain)
