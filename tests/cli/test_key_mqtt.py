import json
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from meshd.protocol.identity import ClusterKey

Meshd = Callable[..., CompletedProcess[str]]


def listed(meshd: Meshd) -> list[tuple[str, str]]:
    return [(row["name"], row["state"]) for row in json.loads(meshd("key", "mqtt", "list", "--json").stdout)["data"]]


@pytest.fixture
def code(meshd: Meshd) -> str:
    return meshd("key", "new").stdout.strip()


def test_a_key_needs_a_cluster(meshd: Meshd) -> None:
    outcome = meshd("key", "mqtt", "add", "door")
    assert outcome.returncode == 1
    assert "there is no cluster key" in outcome.stderr


def test_a_key_is_derived_and_shown_once(meshd: Meshd, code: str) -> None:
    given = json.loads(meshd("key", "mqtt", "add", "door", "--json").stdout)
    cluster = ClusterKey.from_code(code)
    assert given["cluster"] == cluster.fingerprint
    assert given["key"] == cluster.device_key("door", bytes.fromhex(given["serial"])).hex()
    shown = meshd("key", "mqtt", "list").stdout
    assert given["serial"] in shown
    assert given["key"] not in shown + meshd("key", "mqtt", "list", "--json").stdout


def test_a_revoked_key_stays_in_the_list_and_the_name_can_be_used_again(meshd: Meshd, code: str) -> None:
    meshd("key", "mqtt", "add", "door")
    assert meshd("key", "mqtt", "add", "door").returncode == 2
    assert meshd("key", "mqtt", "rm", "door").returncode == 0
    assert meshd("key", "mqtt", "rm", "door").returncode == 2
    assert meshd("key", "mqtt", "add", "door").returncode == 0
    assert listed(meshd) == [("door", "revoked"), ("door", "valid")]


def test_a_new_cluster_key_ends_the_keys_of_before(meshd: Meshd, code: str) -> None:
    meshd("key", "mqtt", "add", "door")
    meshd("key", "new", "--replace")
    assert listed(meshd) == [("door", "of an earlier cluster key")]


@pytest.mark.parametrize("name", ["a/b", "a+", "#", "", "a b", "x" * 64])
def test_a_name_must_be_one_level_of_a_topic(meshd: Meshd, code: str, name: str) -> None:
    outcome = meshd("key", "mqtt", "add", name)
    assert outcome.returncode == 2
    assert "name of a device" in outcome.stderr


def test_mqtt_needs_a_known_command(meshd: Meshd) -> None:
    outcome = meshd("key", "mqtt")
    assert outcome.returncode == 2
    assert "see `meshd key mqtt --help`" in outcome.stderr
