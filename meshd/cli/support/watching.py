"""Follow a daemon's events: redraw a text on a terminal, print lines elsewhere."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from meshd.bounds import printable
from meshd.cli.support.client import Daemon
from meshd.cli.support.output import show
from meshd.errors import MeshdError
from meshd.tui.log_filter import kind_of, text_of, time_of

EVENTS = "/mesh/v1/events"
_SILENT_S = 30.0
"""The daemon sends a comment at least every 10 s."""
_RETRY_S, _LONGEST_RETRY_S = 0.25, 4.0
_REDRAW_S = 0.5
"""Shortest time between two drawings. Rows change twice a second."""
_FROM_THE_TOP, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


def follow(daemon: Daemon) -> Iterator[dict[str, Any] | MeshdError]:
    """Yield a daemon's events for ever. When the daemon goes away, yield the reason, and events again once it is back.

    Raises: MeshdError if it never answered, or refused, for example because of a wrong key.
    """
    known, retry_s = False, _RETRY_S
    while True:
        try:
            with daemon.stream(EVENTS, None, silence_s=_SILENT_S) as stream:
                for event in stream.events():
                    known, retry_s = True, _RETRY_S
                    yield event
        except MeshdError as error:  # a daemon that stops says so with an error of its own
            if not known:
                raise
            yield error
        time.sleep(retry_s)
        retry_s = min(2 * retry_s, _LONGEST_RETRY_S)


def print_events(daemon: Daemon, status: Callable[[], str], *, as_json: bool) -> None:
    """Print the status once, then what happens, one line for each event, until interrupted.

    as_json: print the events themselves, with those that change rows.
    """
    lost = True
    for event in follow(daemon):
        if isinstance(event, MeshdError):
            if not lost:
                show(f"the daemon is gone: {event.message}; trying again", file=sys.stderr)
            lost = True
            continue
        if as_json:
            print(json.dumps(event), flush=True)
        elif lost:
            show(status())
        lost = False
        if not as_json and event["type"] not in ("row", "gone", "work"):
            show(f"{time_of(event)} {event['name']} {kind_of(event)} {text_of(event)}")


def redraw(daemon: Daemon, status: Callable[[], str]) -> None:
    """Draw the status, and draw it again whenever an event comes, until interrupted."""
    shown = status()  # first, so that a daemon that does not answer is reported at once
    changed, stopped = threading.Event(), threading.Event()
    failures: list[MeshdError] = []

    def read() -> None:
        try:
            for _ in follow(daemon):
                changed.set()
                if stopped.is_set():
                    return
        except MeshdError as error:
            failures.append(error)
            changed.set()

    threading.Thread(target=read, daemon=True).start()
    problem = ""
    try:
        while not failures:
            _draw(f"{problem}{shown}")
            changed.wait()
            changed.clear()
            try:
                shown, problem = status(), ""
            except MeshdError as error:
                problem = f"{error.message}; trying again. This is what was there before:\n\n"
            time.sleep(_REDRAW_S)
        raise failures[0]
    finally:
        stopped.set()


def _draw(text: str) -> None:
    """Write over what the terminal shows, line by line, so that nothing flickers."""
    columns, lines = shutil.get_terminal_size()
    shown = [line[:columns] for line in printable(text, keep="\n").split("\n")[: lines - 1]]
    sys.stdout.write(_FROM_THE_TOP + "".join(f"{line}{_CLEAR_LINE}\n" for line in shown) + _CLEAR_BELOW)
    sys.stdout.flush()
