"""`meshd top`: watch the cluster on the terminal, and act on it."""

import sys
from argparse import Namespace

from meshd.cli.support.arguments import Parser, add_client
from meshd.cli.support.client import daemon_of
from meshd.errors import MeshdError

EXAMPLE = "meshd top\n  meshd top --api http://attic:6374 --api-key KEY"


def add_arguments(parser: Parser) -> None:
    add_client(parser)


def run(args: Namespace) -> int:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise MeshdError("meshd top needs a terminal", hint="`meshd status --watch` prints lines anywhere")
    daemon = daemon_of(args)
    from meshd.tui.feed import Feed

    feed = Feed(daemon.url, daemon.api_key)
    feed.begin()  # the rows come while Textual is loaded
    from meshd.tui.app import Monitor  # Textual takes a third of a second to load: too long for the help and for a wrong option

    Monitor(daemon.url, daemon.api_key, feed=feed).run()
    return 0
