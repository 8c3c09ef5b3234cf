"""The command line: one file per verb, each loaded only when it is asked for."""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from meshd import __version__
from meshd.cli.support.arguments import Parser
from meshd.config import debug_wanted
from meshd.errors import ConfigError, InvalidRequest, MeshdError

VERBS = {
    "up": "run this device's daemon and join its cluster",
    "demo": "three daemons on this machine share a model and answer",
    "status": "peers, what each holds, links, sessions",
    "run": "one answer from a model",
    "chat": "a conversation with a model",
    "models": "the models this mesh knows and where their layers lie",
    "pull": "fetch a model to this device",
    "rm": "remove a model from this device",
    "plan": "what would be placed where, and how fast it would be",
    "place": "put a model's layers on peers ahead of requests",
    "unplace": "let go of a model's layers on every peer",
    "drain": "move away what runs on a peer, before it is stopped",
    "migrate": "move a running answer to another peer",
    "bench": "measure this device, or every link",
    "key": "the cluster key: how another device joins",
    "debug": "what happened to a session, told by all peers",
    "config": "every setting, its value and where it came from",
}
INTERRUPTED = 130
_OVERVIEW = """\
usage: meshd VERB [OPTION ...]

One language model across many devices: found, measured, encrypted, split and streamed without a master.

{verbs}

`meshd VERB --help` tells more. First time here: `meshd demo`; then `meshd up` on each device.
"""


class Verb(Protocol):
    """What each file of this folder that is named like a verb offers."""

    EXAMPLE: str

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, args: Namespace) -> int:
        """The exit status. Raises: MeshdError."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 the thing asked for failed, 2 wrong usage, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except Exception as error:
        return _explain(_cause(error))
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
    verb = cast("Verb", import_module(f"meshd.cli.{name}"))
    parser = Parser(name, VERBS[name], verb.EXAMPLE)
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(words))


def overview() -> str:
    """What `meshd` with no arguments prints."""
    return _OVERVIEW.format(verbs="\n".join(f"  {name:<9}{summary}" for name, summary in VERBS.items()))


def _nearest(word: str) -> str:
    import difflib

    near = difflib.get_close_matches(word, VERBS, 1)
    return f"did you mean {near[0]}?" if near else f"there is {', '.join(VERBS)}"


def _cause(error: Exception) -> Exception:
    """The first of a group, which is what the others followed from."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _explain(error: Exception) -> int:
    """One line for people; the exit status."""
    if debug_wanted():
        import traceback

        traceback.print_exception(error)
    known = error if isinstance(error, MeshdError) else _unforeseen(error)
    print("meshd: " + " ".join(str(known).split()), file=sys.stderr)
    return 2 if isinstance(error, ConfigError | InvalidRequest) else 1


def _unforeseen(error: Exception) -> MeshdError:
    what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return MeshdError(f"this failed, and meshd did not foresee it: {what}", hint="MESHD_DEBUG=1 shows where")


def _forget_stdout() -> None:
    """The reader has gone: what is still buffered must not be complained about at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
