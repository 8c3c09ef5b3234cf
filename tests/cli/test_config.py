import json
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from meshd.settings import SETTINGS

Meshd = Callable[..., CompletedProcess[str]]


def test_every_setting_is_shown_with_its_origin(meshd: Meshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHD_THREADS", "3")
    document = json.loads(meshd("config", "--memory", "4GiB", "--peer", "a:1", "--peer", "b", "--json").stdout)
    assert list(document) == [setting.name for setting in SETTINGS]
    assert document["memory"] == {"value": 4 * 2**30, "origin": "flag --memory"}
    assert document["threads"] == {"value": 3, "origin": "environment MESHD_THREADS"}
    assert document["peer"] == {"value": ["a:1", "b:6375"], "origin": "flag --peer"}
    assert document["link"] == {"value": "0.0.0.0:6375", "origin": "default"}


def test_the_table_shows_the_same_and_hides_secrets(meshd: Meshd) -> None:
    lines = meshd("config", "--api-key", "hidden", "--interface", "eth0").stdout.splitlines()
    assert lines[0].split() == ["SETTING", "VALUE", "FROM"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["api-key"] == ["(set)", "flag", "--api-key"]
    assert rows["interface"] == ["eth0", "flag", "--interface"]
    assert rows["memory"] == ["-", "default"]
