"""The sockets of a daemon's two addresses."""

import dataclasses
import socket
from contextlib import closing

import pytest

from meshd.config import Config
from meshd.daemon.sockets import bound
from meshd.errors import ConfigError
from meshd.values import Address


def test_both_addresses_are_bound_and_then_closed(local_config: Config) -> None:
    with bound(local_config) as sockets:
        ports = [each.getsockname()[1] for each in (*sockets.api, *sockets.link)]
        assert len(set(ports)) == len(ports) == 2
        assert 0 not in ports
    assert [each.fileno() for each in (*sockets.api, *sockets.link)] == [-1, -1]


def test_a_taken_address_of_links_frees_that_of_the_api(local_config: Config) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        with closing(socket.create_server(("127.0.0.1", 0))) as spare:
            api = spare.getsockname()[1]
        taken = Address("127.0.0.1", other.getsockname()[1])
        config = dataclasses.replace(local_config, api=Address("127.0.0.1", api), link=taken)
        with pytest.raises(ConfigError, match="already in use"), bound(config):
            pass
        socket.create_server(("127.0.0.1", api)).close()
