"""Run a command's work so that Ctrl-C and SIGTERM end it within a second, whatever its threads are doing."""

import os
import signal
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

_T = TypeVar("_T")
_GRACE_S = 0.7
"""Time that the work has to end in order. A thread may be in a read or a conversion that can't be cancelled."""


def run_interruptibly(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, in a new event loop.

    The first SIGINT or SIGTERM cancels the work; a second one, or the end of `_GRACE_S`, ends the process at once. Work that is
    interrupted must leave files that the next run can use, as after a crash.

    Raises: KeyboardInterrupt if the work was cancelled by SIGINT; SystemExit if by SIGTERM.
    """
    import asyncio  # most verbs have no event loop, and end sooner without it

    interrupted: list[int] = []

    async def watched() -> _T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)

        def interrupt(number: int) -> None:
            if interrupted:
                end_process(128 + number)
            interrupted.append(number)
            timer = threading.Timer(_GRACE_S, end_process, (128 + number,))
            timer.daemon = True
            timer.start()
            task.cancel()

        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # set by nohup, or by a shell for a background job
                loop.add_signal_handler(number, interrupt, number)
        return await task

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return asyncio.run(watched())
    except asyncio.CancelledError:
        if interrupted == [signal.SIGINT]:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + interrupted[0] if interrupted else 1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # the loop has set the defaults


def end_process(status: int) -> NoReturn:
    """End the process without waiting for its threads. Locks of files are the system's, and end with it."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
