"""Keys on the command line: all users of a machine can read the arguments of running programs (`ps`), so keys must not stay."""

import os
import sys
from collections.abc import Sequence

from meshd.errors import ConfigError
from meshd.settings import SETTINGS

STDIN = "-"
"""The value of a key's argument that stands for a line of standard input."""
_MOST = 4096
JOIN = "join"
"""The flag of `meshd up` that takes an invite's code."""
_FLAGS = frozenset({f"--{JOIN}", *(f"--{setting.name}" for setting in SETTINGS if setting.secret)})


def given(value: str, what: str) -> str:
    """Return the value of an argument, or for `-` a line of standard input. Raises: ConfigError if that line is empty."""
    if value != STDIN:
        return value
    line = _read_line().strip()
    if not line:
        raise ConfigError(f"standard input has no {what}", hint=f"write the {what} on its first line")
    return line


def _read_line() -> str:
    """Read standard input up to the end of a line, and no byte beyond it: what follows is not for this function."""
    line = b""
    while len(line) < _MOST and (byte := os.read(sys.stdin.fileno(), 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace")


def without_secrets(words: Sequence[str]) -> list[str]:
    """Remove the flags of secret settings, with their values, from a command line."""
    kept: list[str] = []
    value_follows = False
    for word in words:
        if value_follows:
            value_follows = False
        elif word in _FLAGS:
            value_follows = True
        elif word.partition("=")[0] not in _FLAGS:
            kept.append(word)
    return kept


def start_anew(words: Sequence[str]) -> None:
    """Replace this program by the same one, with other arguments: the process id and the open files stay. Does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *words[1:]])
