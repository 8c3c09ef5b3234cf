"""Topics are made and read the same way, and nothing else is taken for one."""

import pytest

from meshd.agents.membership.fleet.topics import JobTopic, Topics
from meshd.types import PeerId

TOPICS = Topics("l7vrhquktjyxwmik")
PEER = PeerId("a" * 52)
JOB = "0f" * 16


def test_a_topic_is_read_as_it_was_made() -> None:
    assert TOPICS.peer_of_presence(TOPICS.presence(PEER)) == PEER
    assert TOPICS.job_of(TOPICS.job(PEER, "door.lamp-1", JOB), PEER) == JobTopic("door.lamp-1", JOB)
    assert TOPICS.jobs(PEER) == f"meshd/1/l7vrhquktjyxwmik/peer/{PEER}/job/+/+"


@pytest.mark.parametrize(
    "topic",
    [
        "",
        TOPICS.presence("+"),
        TOPICS.presence(PEER) + "/x",
        TOPICS.presence(PEER)[:-1],
        TOPICS.presence(PEER[:-1]),
        TOPICS.presence(f"{PEER}/x"),
        "x" + TOPICS.presence(PEER),
        Topics("m" * 16).presence(PEER),
        TOPICS.job(PEER, "door", JOB[:-1]),
        TOPICS.job(PEER, "do or", JOB),
        TOPICS.job(PEER, "door/x", JOB),
        TOPICS.job(PEER, "door", JOB) + "\n",
        TOPICS.job(PeerId("b" * 52), "door", JOB),
    ],
)
def test_another_topic_is_none(topic: str) -> None:
    assert TOPICS.peer_of_presence(topic) is None
    assert TOPICS.job_of(topic, PEER) is None
