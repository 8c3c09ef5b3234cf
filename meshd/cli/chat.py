"""`meshd chat MODEL`: talk with a model."""

import sys
from argparse import Namespace

from meshd.cli.support.answering import MODEL_HELP, add_sampling, notice, request_of, sampling_of, stream_answer, write_out
from meshd.cli.support.arguments import Parser, add_client
from meshd.cli.support.client import Daemon, daemon_of
from meshd.cli.support.fetching import known_model, with_model
from meshd.errors import MeshdError

EXAMPLE = "meshd chat smollm2:135m\n  (then: /new starts over, /quit or Ctrl-D leaves, Ctrl-C stops an answer)"
_HELP = "/new starts over, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_sampling(parser)
    add_client(parser)


def run(args: Namespace) -> int:
    daemon = daemon_of(args)
    daemon.get("/health")
    args.model = known_model(args, daemon)
    interactive = sys.stdin.isatty()
    if interactive:
        _enable_line_editing()
        notice(_HELP)
    messages: list[dict[str, str]] = []
    while (line := _next_line(interactive)) not in {None, "/quit", "/exit"}:
        if line == "/new":
            messages.clear()
        elif line:
            turns = [*messages, {"role": "user", "content": line}]
            messages = _turn(daemon, args, turns, interactive)
    return 0


def _next_line(interactive: bool) -> str | None:
    """Read the next line; None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input(">>> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _turn(daemon: Daemon, args: Namespace, messages: list[dict[str, str]], interactive: bool) -> list[dict[str, str]]:
    """Send the conversation and print the answer as it streams.

    Returns: the messages with the answer appended, or without the last message if no text arrived.
    """
    chunks: list[str] = []

    def receive(text: str) -> None:
        chunks.append(text)
        write_out(text)

    try:
        with_model(args, daemon, lambda: stream_answer(daemon, request_of(args, messages, sampling_of(daemon, args)), receive))
    except KeyboardInterrupt:
        if not interactive:
            raise
    except MeshdError as error:
        if not interactive:
            raise
        notice(f"meshd: {error}")
    write_out("\n")
    return [*messages, {"role": "assistant", "content": "".join(chunks)}] if chunks else messages[:-1]


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  (importing it gives input() a history)
    except ImportError:  # Python has no readline on some platforms
        return
