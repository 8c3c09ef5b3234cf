"""Fixtures: the monitor on recorded events, and a server that takes its commands."""

import time
from collections.abc import Iterator
from functools import partial

import pytest

from fake_api.rows_server import Api, serve
from monitor.watching import Watch, watching


@pytest.fixture(autouse=True)
def same_clock_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Show times in UTC, so that a picture is the same on every machine."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def api() -> Iterator[Api]:
    """A daemon with fixed answers. Routes are set before the first request."""
    api = Api()
    with serve(api):
        yield api


@pytest.fixture
def watch(api: Api) -> Watch:
    """Runs the monitor on the recorded events, with its commands going to `api`."""
    return partial(watching, api.url)
