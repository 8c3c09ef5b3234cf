"""The command line: one file per verb. Only the file of the verb that runs is loaded."""

import errno
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from meshd import __version__
from meshd.bounds import printable
from meshd.cli.support.arguments import Parser
from meshd.config import debug_wanted
from meshd.errors import ConfigError, InvalidRequest, MeshdError, first_error

VERBS = {
    "up": "run this device's daemon and join its cluster",
    "demo": "start three daemons on this machine, which share a model, and ask it a question",
    "status": "show peers, the layers each holds, links and sessions",
    "top": "watch the cluster on the terminal, and act on it",
    "run": "ask a model one question and print its answer",
    "chat": "talk with a model, turn by turn",
    "models": "list the known models and the peers that hold their layers",
    "pull": "download or import a model to this device",
    "rm": "remove a model from this device",
    "plan": "predict which peers would hold which layers, and how fast answers would be",
    "place": "load a model's layers on peers before the first request",
    "unplace": "free a model's layers on every peer",
    "drain": "move all sessions off a peer, before it is stopped",
    "migrate": "move a running session to another peer",
    "bench": "measure this device, or its link to every peer",
    "invite": "let another device join, by a short code that works once",
    "key": "make or revoke keys of the cluster, its API and MQTT devices; exclude devices",
    "debug": "show a session's events, or trace its steps, on all peers",
    "service": "start the daemon at boot, under systemd or launchd",
    "doctor": "look for faults of this device and its connections, and say what to type",
    "config": "show every setting, its value and where the value comes from",
}
INTERRUPTED = 130
_SYSTEM_HINTS = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some disk space, or ask for a larger quota",
    errno.EROFS: "the disk is read-only: use another folder with --state DIR, or XDG_CACHE_HOME for models",
    errno.EMFILE: "raise the limit of open files: `ulimit -n 4096`",
    errno.ENFILE: "this system has too many open files: end other programs",
    errno.ENOMEM: "free some memory",
    errno.EACCES: "check its owner and permissions",
    errno.EIO: "the disk can't be read or written: check it",
}
"""Errors of the system that any verb may meet, and what the user can do."""
_OVERVIEW = """\
usage: meshd VERB [OPTION ...]

One language model across many devices: found, measured, encrypted, split and streamed without a master.

{verbs}

`meshd VERB --help` shows a verb's options. To begin: `meshd demo`, then `meshd up` on each device.
"""


class Verb(Protocol):
    """The interface of each verb's file in this folder."""

    EXAMPLE: str

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, args: Namespace) -> int:
        """Run the verb. Returns: the exit status. Raises: MeshdError."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns: the exit status, which is 0 for success, 1 for failure, 2 for wrong usage, 130 if interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if sys.platform == "win32":
        print("meshd: Windows is not supported: use Linux or macOS, or the Windows Subsystem for Linux (WSL)", file=sys.stderr)
        return 1
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except Exception as error:
        return _explain(first_error(error))
    return status


def _dispatch(words: list[str]) -> int:
    match words:
        case [] | ["-h" | "--help" | "help"]:
            print(overview(), end="")
            return 0
        case ["-V" | "--version"]:
            print(f"meshd {__version__}")
            return 0
        case [name, *rest] if name in VERBS:
            return _run_verb(name, rest)
        case _:
            print(f"meshd: unknown verb {words[0]!r}: {_nearest(words[0])}; see `meshd --help`", file=sys.stderr)
            return 2


def _run_verb(name: str, words: list[str]) -> int:
    verb, parser = verb_and_parser(name)
    return verb.run(parser.parse_args(words))


def verb_and_parser(name: str) -> tuple[Verb, Parser]:
    """Import a verb. Returns: it, and the parser of its arguments."""
    verb = cast("Verb", import_module(f"meshd.cli.{name}"))
    parser = Parser(name, VERBS[name], verb.EXAMPLE)
    verb.add_arguments(parser)
    return verb, parser


def overview() -> str:
    """Return the text that `meshd` prints without arguments."""
    return _OVERVIEW.format(verbs="\n".join(f"  {name:<9}{summary}" for name, summary in VERBS.items()))


def _nearest(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, VERBS, 1)
    return f"did you mean {near[0]}?" if near else f"the verbs are {', '.join(VERBS)}"


def _explain(error: BaseException) -> int:
    """Print an error on one line, after its traceback if MESHD_DEBUG is set. Returns: the exit status."""
    if debug_wanted():
        import traceback

        traceback.print_exception(error)
    known = error if isinstance(error, MeshdError) else _unexpected(error)
    print("meshd: " + printable(" ".join(str(known).split())), file=sys.stderr)
    return 2 if isinstance(error, ConfigError | InvalidRequest) else 1


def _unexpected(error: BaseException) -> MeshdError:
    if isinstance(error, OSError) and error.errno in _SYSTEM_HINTS:
        where = f"{error.filename}: " if error.filename is not None else ""
        return MeshdError(f"{where}{error.strerror}", hint=_SYSTEM_HINTS[error.errno])
    what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return MeshdError(f"unexpected error: {what}", hint="MESHD_DEBUG=1 shows where")


def _forget_stdout() -> None:
    """Redirect standard output to the null device: its reader has gone, and Python would report unwritten output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
