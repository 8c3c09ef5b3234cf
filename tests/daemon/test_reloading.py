"""Settings that are read again while a daemon runs."""

import dataclasses

import pytest

from meshd.config import Config
from meshd.daemon.reloading import Reloader, describe
from meshd.errors import ConfigError
from meshd.peer.peer import Peer
from meshd.values import Address


async def test_settings_take_effect_at_once_or_are_named_as_waiting_for_a_restart(local_config: Config, peer: Peer) -> None:
    new = dataclasses.replace(local_config, copies=4, mirror=True, drain_timeout=1.5, link=Address("127.0.0.1", 9))
    reloader = Reloader(local_config, peer, lambda: new)
    done = reloader.reload()
    assert sorted(done.applied) == ["copies", "drain-timeout", "mirror"]
    assert done.needs_restart == ("link",)
    assert (peer.keeper.copies, peer.coordinator.retrier.mirror) == (4, True)
    assert (reloader.config.drain_timeout, reloader.config.link) == (1.5, local_config.link)


async def test_a_setting_that_waits_for_a_restart_is_named_again(local_config: Config, peer: Peer) -> None:
    reloader = Reloader(local_config, peer, lambda: dataclasses.replace(local_config, threads=3))
    assert [reloader.reload().needs_restart for _ in range(2)] == [("threads",)] * 2


async def test_settings_that_cannot_be_read_change_nothing(local_config: Config, peer: Peer) -> None:
    def read() -> Config:
        raise ConfigError("config.toml: line 1", hint="mend it")

    reloader = Reloader(local_config, peer, read)
    copies = peer.keeper.copies
    with pytest.raises(ConfigError):
        reloader.reload()
    assert (reloader.config, peer.keeper.copies) == (local_config, copies)


def test_what_has_changed_is_said_in_a_few_words() -> None:
    assert describe((), ()) == "nothing has changed"
    assert describe(("copies", "mirror"), ("link",)) == "copies, mirror changed; link need a restart"
