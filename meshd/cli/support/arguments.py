"""Arguments that verbs share. The flags of settings are made from the table in `meshd.settings`."""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from meshd.config import Settings
from meshd.models.importing.quants import QUANTS
from meshd.models.store.catalogue import one_spelling, quantised
from meshd.settings import SETTINGS, RawValue, Setting


class Parser(ArgumentParser):
    """An argument parser whose help ends with an example and whose errors are one line."""

    def __init__(self, verb: str, summary: str, example: str) -> None:
        super().__init__(
            prog=f"meshd {verb}".strip(),
            description=summary[:1].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"meshd: wrong usage of `{self.prog}`: {message}; see `{self.prog} --help`\n")


def add_commands(
    parser: ArgumentParser, commands: Mapping[str, str], example: str, *, dest: str = "command", required: bool = True
) -> dict[str, Parser]:
    """Add the commands of a verb, name -> summary; `dest` gets the name. The help of each ends with its lines of `example`.

    Returns: the parser of each command, by its name.
    """
    lines = [line.strip() for line in example.splitlines()]

    class CommandParser(Parser):
        """The parser that argparse creates for each command."""

        def __init__(self, *, prog: str, description: str) -> None:
            own = [line for line in lines if f"{prog} " in f"{line} "]
            super().__init__(prog.removeprefix("meshd "), description, "\n  ".join(own or lines))

    added = parser.add_subparsers(
        dest=dest,
        required=required,
        metavar="COMMAND",
        prog=f"meshd {parser.prog.removeprefix('meshd ')}",
        parser_class=CommandParser,
    )
    return {name: added.add_parser(name, help=summary, description=summary) for name, summary in commands.items()}


def add_settings(parser: ArgumentParser, names: Iterable[str]) -> None:
    """Add a flag for each of these settings. The value of a flag that is not given is None."""
    wanted = set(names)
    for setting in SETTINGS:
        if setting.name in wanted:
            _add_setting(parser, setting)


def _add_setting(parser: ArgumentParser, setting: Setting) -> None:
    options: dict[str, Any] = {"action": "append"} if setting.many else {}
    if setting.switch:
        options |= {"nargs": "?", "const": "on"}
    parser.add_argument(
        f"--{setting.name}",
        dest=_destination(setting),
        metavar=setting.metavar,
        default=None,
        help=_help(setting).replace("%", "%%"),
        **options,
    )


def _help(setting: Setting) -> str:
    default = _shown(setting.default)
    return f"{setting.help}{f'; default: {default}' if default else ''} [{setting.variable}]"


def _shown(default: object) -> str:
    match default:
        case None:
            return ""
        case bool():
            return "on" if default else "off"
        case tuple():
            return ",".join(map(str, default))
    return str(default)


def _destination(setting: Setting) -> str:
    return "setting_" + setting.name.replace("-", "_")


def settings_of(args: Namespace, fixed: Mapping[str, RawValue] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Resolve the settings from this command's flags, the environment and the config file. `fixed` values count as flags.

    `environ`: another environment than that of this process.
    """
    flags: dict[str, RawValue | None] = {setting.name: getattr(args, _destination(setting), None) for setting in SETTINGS}
    return Settings({**flags, **(fixed or {})}, environ)


def add_state(parser: ArgumentParser) -> None:
    """Add `--state` and `--config`."""
    add_settings(parser, ("state", "config"))


def add_client(parser: ArgumentParser) -> None:
    """Add the flags of a verb that calls a daemon: its address, and the API key."""
    parser.add_argument(
        "--api", dest="setting_api", metavar="URL", help="address of the daemon's HTTP API; default: the local daemon [MESHD_API]"
    )
    add_settings(parser, ("api-key", "state", "config"))


def add_quant(parser: ArgumentParser) -> None:
    """Add `--quant`, for a verb that may import its `model`."""
    parser.add_argument(
        "--quant",
        choices=sorted(QUANTS),
        help="quantise the large weights of an hf: or file: model to 4 or 8 bits at import; the same as REF+q4 or REF+q8",
    )


def model_of(args: Namespace) -> str:
    """Return the reference that `model` and, where the verb has it, `--quant` make, in its one spelling: the path after `file:` is
    absolute, and `hf.co/` is `hf:`.

    Raises: InvalidRequest.
    """
    ref = one_spelling(args.model)
    return one_spelling(quantised(ref, getattr(args, "quant", None)))


def add_json(parser: ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
