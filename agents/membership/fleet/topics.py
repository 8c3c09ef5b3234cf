"""The topics of a fleet at an MQTT broker, and the size of what is taken from each. `docs/fleet.md` describes them.

All topics of a cluster begin with `meshd/1/FINGERPRINT`, so that the broker's access list can name them.
"""

import re
from dataclasses import dataclass

from meshd.types import PeerId, is_peer_id

PRESENCE_BYTES = 4096
"""Most bytes of a presence. The largest one, with eight addresses and 16 unreached peers, has less than 3,000."""
REQUEST_BYTES = 64 << 10
"""Most bytes of a job's request."""
PACKET_BYTES = REQUEST_BYTES + 1024
"""Most bytes of an MQTT packet, with its topic. Longer ones are skipped while they are read."""
DEVICE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
"""A name that is one level of a topic."""
JOB_ID = r"[0-9a-f]{32}"
_JOB = re.compile(rf"({DEVICE_NAME})/({JOB_ID})")


@dataclass(frozen=True, slots=True)
class JobTopic:
    """The parts of a job's topic at a peer."""

    device: str
    job: str
    """16 random bytes in hexadecimal digits, chosen by the device."""


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one cluster."""

    cluster: str
    """The cluster's fingerprint."""

    @property
    def root(self) -> str:
        return f"meshd/1/{self.cluster}"

    def presence(self, peer: PeerId | str) -> str:
        """A peer's presence, retained. `+` in place of the id: those of all peers."""
        return f"{self.root}/peer/{peer}/presence"

    def telemetry(self, peer: PeerId) -> str:
        return f"{self.root}/peer/{peer}/telemetry"

    def event(self, peer: PeerId, kind: str) -> str:
        return f"{self.root}/peer/{peer}/event/{kind}"

    def jobs(self, peer: PeerId) -> str:
        """What a peer subscribes to for its jobs."""
        return f"{self.root}/peer/{peer}/job/+/+"

    def job(self, peer: PeerId, device: str, job: str) -> str:
        """Where a device sends a job's request."""
        return f"{self.root}/peer/{peer}/job/{device}/{job}"

    def answer(self, device: str, job: str) -> str:
        """Where a peer sends the chunks of a job's answer. The device subscribes to it with `+` for the job."""
        return f"{self.root}/device/{device}/{job}"

    def peer_of_presence(self, topic: str) -> PeerId | None:
        """Returns: whose presence the topic has; None if it is no topic of presence."""
        before, after = self.presence("\0").split("\0")
        peer = topic.removeprefix(before).removesuffix(after)
        return PeerId(peer) if self.presence(peer) == topic and is_peer_id(peer) else None

    def job_of(self, topic: str, peer: PeerId) -> JobTopic | None:
        """Returns: the device and the job of a request to `peer`; None if the topic is another one."""
        found = _JOB.fullmatch(topic.removeprefix(f"{self.root}/peer/{peer}/job/"))
        return JobTopic(found[1], found[2]) if found and self.job(peer, found[1], found[2]) == topic else None
