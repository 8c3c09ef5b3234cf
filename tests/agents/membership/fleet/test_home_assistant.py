"""The messages from which Home Assistant makes sensors."""

import json

from jinja2 import Environment

from meshd.agents.membership.fleet.home_assistant import discovery_payload, discovery_topic
from meshd.agents.membership.fleet.presence import Presence, sign_presence
from meshd.agents.membership.fleet.topics import Topics
from meshd.protocol.identity import Identity

DEVICE_CLASSES = {"data_size": {"B", "KiB", "MiB", "GiB"}, "battery": {"%"}, "temperature": {"°C", "°F", "K"}}
"""Units that Home Assistant accepts for these classes of sensors."""


def payload(identity: Identity, *fields: str) -> dict[str, object]:
    data = discovery_payload(Topics(identity.fingerprint), identity.peer, "desk", "1.0", fields, 30.0)
    described: dict[str, object] = json.loads(data)
    return described


def test_only_what_is_measured_becomes_a_sensor(identity: Identity) -> None:
    described = payload(identity, "tokens_per_s", "peers", "at")
    assert isinstance(described["components"], dict)
    assert set(described["components"]) == {"tokens_per_s", "peers"}


def test_the_payload_has_what_device_discovery_needs(identity: Identity) -> None:
    described = payload(identity, "tokens_per_s", "memory_free_bytes", "battery_percent", "temperature_c")
    assert {"device", "origin", "components", "state_topic", "availability"} <= described.keys()
    assert isinstance(described["components"], dict)
    ids = set()
    for field, sensor in described["components"].items():
        assert sensor["platform"] == "sensor"
        assert sensor["unit_of_measurement"] in DEVICE_CLASSES.get(sensor.get("device_class"), {sensor["unit_of_measurement"]})
        rendered = Environment(autoescape=False).from_string(sensor["value_template"]).render(value_json={field: 12.5})
        assert rendered == "12.5"
        ids.add(sensor["unique_id"])
    assert len(ids) == len(described["components"])
    assert discovery_topic("homeassistant", identity.peer) == f"homeassistant/device/meshd_{identity.peer[:16]}/config"


def test_the_availability_follows_the_presence(identity: Identity) -> None:
    described = payload(identity, "peers")
    assert isinstance(described["availability"], list)
    template = Environment(autoescape=False).from_string(described["availability"][0]["value_template"])
    common = {"cluster": identity.fingerprint, "peer": identity.peer, "name": "one", "at": 1, "since": 1}
    for leaves, expected in ((False, "online"), (True, "offline")):
        text = sign_presence(identity, Presence(**common, leaves=leaves)).decode()  # type: ignore[arg-type]
        assert template.render(value=text) == expected
