"""File descriptors: raises this process's limit, and divides it between the API, the links and everything else."""

import logging
import sys
from dataclasses import dataclass

log = logging.getLogger(__name__)

WANTED = 65536
_MACOS_MOST = 10240
"""OPEN_MAX of macOS: setrlimit(2) refuses a higher soft limit there, even if the hard limit is infinite."""
_OTHERS = 96
"""Descriptors for everything but clients and links: files, downloads, pipes, the sockets of discovery (several per interface)."""
_MOST_CLIENTS = 4096
_FEWEST_CLIENTS = 16
_MOST_LINKS = 256
_FEWEST_LINKS = 4
_MOST_HALF_OPEN = 64
_FEWEST_HALF_OPEN = 8
_UNLIMITED = 2**20


@dataclass(frozen=True, slots=True)
class DescriptorShares:
    """The most connections of each kind, so that all of them together can't use up the descriptors."""

    clients: int
    """Connections to the API."""
    links: int
    """Links with other peers. Each has two connections."""
    half_open: int
    """Accepted connections of other devices that have not identified themselves yet."""


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard limit, at most `WANTED`. Returns: the soft limit from now on."""
    if sys.platform == "win32":
        return WANTED
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (WANTED, min(WANTED, _MACOS_MOST)):
        possible = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < possible:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
            except (OSError, ValueError) as error:
                log.debug("the limit of open files can't be raised to %d: %s", possible, error)
            else:
                return possible
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def share_descriptors(limit: int) -> DescriptorShares:
    """Divide a limit of open files. Below about 180, the shares are the smallest useful ones, and a warning is logged."""
    free = limit - _OTHERS
    smallest = _FEWEST_CLIENTS + 2 * _FEWEST_LINKS + _FEWEST_HALF_OPEN
    if free < smallest:
        log.warning("only %d files may be open at once; raise the limit to %d or more (`ulimit -n`)", limit, _OTHERS + smallest)
    half_open = _within(free // 8, _FEWEST_HALF_OPEN, _MOST_HALF_OPEN)
    links = _within((free - half_open) // 5, _FEWEST_LINKS, _MOST_LINKS)
    clients = _within(free - half_open - 2 * links, _FEWEST_CLIENTS, _MOST_CLIENTS)
    return DescriptorShares(clients, links, half_open)


def _within(value: int, least: int, most: int) -> int:
    return max(least, min(value, most))
