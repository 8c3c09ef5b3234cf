"""Home Assistant's device discovery: one retained message that makes a peer's sensors appear.

The form is that of https://www.home-assistant.io/integrations/mqtt/#device-discovery-payload (Home Assistant 2024.11 and later).
The state is the peer's telemetry, the availability its presence, so that the last will makes the sensors unavailable.
"""

from collections.abc import Collection
from typing import Any

import msgspec

from meshd.agents.membership.fleet.topics import Topics
from meshd.types import PeerId

_SENSORS: dict[str, dict[str, str]] = {
    "tokens_per_s": {"name": "Tokens per second", "unit_of_measurement": "tokens/s", "icon": "mdi:speedometer"},
    "sessions": {"name": "Sessions", "icon": "mdi:message-processing"},
    "peers": {"name": "Linked peers", "icon": "mdi:lan"},
    "memory_free_bytes": {
        "name": "Free memory",
        "device_class": "data_size",
        "unit_of_measurement": "B",
        "entity_category": "diagnostic",
    },
    "memory_used_percent": {
        "name": "Memory used",
        "unit_of_measurement": "%",
        "icon": "mdi:memory",
        "entity_category": "diagnostic",
    },
    "battery_percent": {
        "name": "Battery",
        "device_class": "battery",
        "unit_of_measurement": "%",
        "entity_category": "diagnostic",
    },
    "temperature_c": {
        "name": "Temperature",
        "device_class": "temperature",
        "unit_of_measurement": "°C",
        "entity_category": "diagnostic",
    },
}
"""A sensor for each field of the telemetry."""
_AVAILABLE = """{{ 'offline' if '"leaves":true' in value else 'online' }}"""


def discovery_topic(prefix: str, peer: PeerId) -> str:
    """Where the message is published. An empty retained message there removes the sensors."""
    return f"{prefix}/device/meshd_{peer[:16]}/config"


def discovery_payload(topics: Topics, peer: PeerId, name: str, version: str, measured: Collection[str], expire_s: float) -> bytes:
    """Describe a peer's sensors. `measured`: the fields of its telemetry. After `expire_s` without one, they are unavailable."""
    telemetry = topics.telemetry(peer)
    return msgspec.json.encode(
        {
            "device": {
                "identifiers": [f"meshd_{peer}"],
                "name": f"meshd {name}",
                "manufacturer": "meshd",
                "model": f"peer of cluster {topics.cluster}",
                "sw_version": version,
            },
            "origin": {"name": "meshd", "sw_version": version},
            "components": {field: _sensor(field, peer, expire_s) for field in _SENSORS if field in measured},
            "state_topic": telemetry,
            "availability": [{"topic": topics.presence(peer), "value_template": _AVAILABLE}],
            "qos": 0,
        }
    )


def _sensor(field: str, peer: PeerId, expire_s: float) -> dict[str, Any]:
    return {
        "platform": "sensor",
        "unique_id": f"meshd_{peer[:16]}_{field}",
        "state_class": "measurement",
        "value_template": f"{{{{ value_json.{field} }}}}",
        "expire_after": max(1, round(expire_s)),
        **_SENSORS[field],
    }
