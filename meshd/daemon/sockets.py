"""The sockets of a daemon's two addresses."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from meshd.agents.links import links
from meshd.api.http import server
from meshd.config import Config


@dataclass(frozen=True, slots=True)
class Sockets:
    """The sockets of the two addresses, bound before the device is measured, so that a taken port is reported at once."""

    api: list[socket.socket]
    link: list[socket.socket]


@contextmanager
def bound(config: Config) -> Iterator[Sockets]:
    """Bind the addresses of the API and the links. Raises: ConfigError if one can't be used."""
    with ExitStack() as stack:
        api = [stack.enter_context(closing(each)) for each in server.bind(config.api.host, config.api.port)]
        link = [stack.enter_context(closing(each)) for each in links.bind(config.link.host, config.link.port)]
        yield Sockets(api, link)
