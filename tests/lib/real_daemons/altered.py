"""Run `meshd` with a wrong clock or other versions: `python tests/lib/real_daemons/altered.py KEY=VALUE ... up ...`.

`ahead=SECONDS` sets the clock, `protocol=MAJOR.MINOR` and `version=TEXT` what the peer says of itself.
"""

import sys
import time

import meshd.daemon.daemon
from meshd.__main__ import run
from meshd.clock import SystemClock


def everywhere(name: str, value: object) -> None:
    """Set a constant in all modules of meshd that have imported it."""
    for module in list(sys.modules.values()):
        if module.__name__.startswith("meshd") and hasattr(module, name):
            setattr(module, name, value)


if __name__ == "__main__":
    words = sys.argv[1:]
    while words and "=" in words[0]:
        key, _, value = words.pop(0).partition("=")
        if key == "ahead":
            SystemClock.wall = lambda self, ahead_s=float(value): time.time() + ahead_s  # type: ignore[method-assign, misc]
        elif key == "protocol":
            everywhere("PROTOCOL_VERSION", tuple(map(int, value.split("."))))
            everywhere("PROTOCOL", value)
        else:
            everywhere("__version__", value)
            meshd.__version__ = value
    sys.argv = ["meshd", *words]
    run()
