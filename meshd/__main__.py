"""The command `meshd`, also as `python -m meshd`."""

import os
import sys
from contextlib import suppress
from typing import NoReturn

from meshd.cli import main


def run() -> NoReturn:
    """Run a command, and end the process at once.

    Taking the interpreter down costs a second once the tensor libraries are loaded, two to four on a busy machine, and does nothing
    that the system does not do: files are closed, locks are released.
    """
    status = main()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
