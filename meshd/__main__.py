"""The command `meshd`, also as `python -m meshd`."""

from typing import NoReturn

from meshd.cli import main
from meshd.cli.support.interrupt import end_process


def run() -> NoReturn:
    """Run a command, and end the process at once.

    Taking the interpreter down costs a second once the tensor libraries are loaded, two to four on a busy machine, and does nothing
    that the system does not do: files are closed, locks are released.
    """
    end_process(main())


if __name__ == "__main__":
    run()
