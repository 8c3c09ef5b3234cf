"""The story of a session, collected from all peers and sorted by time."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from in_process.journals import HandClock, Keepers, S
from in_process.peers import Peers
from meshd.agents.admin.story_collector import decode_lines, merge_stories, to_local_time
from meshd.agents.observe.story import Story
from meshd.errors import ProtocolViolation, UnknownSession
from meshd.types import PeerId, SessionId


@pytest.fixture
def keepers(peers: Peers) -> Keepers:
    return Keepers(peers)


class InvalidStory(Story):
    """Returns lines that are not valid."""

    def lines(self, session: SessionId) -> list[dict[str, Any]]:
        return [{"what": 7}]


async def test_the_lines_of_all_peers_come_in_one_order(keepers: Keepers) -> None:
    async with keepers.linked("a", "b", "c") as (a, b, c):
        b.story_collector.clock = HandClock(50_000.0)  # the clocks of peers have different origins
        a.story_collector.story.note(S, "planned", epoch=1)
        b.story_collector.story.clock = b.story_collector.clock

        def pass_time(seconds: float) -> None:
            keepers.clock.now += seconds
            b.story_collector.clock.now += seconds  # type: ignore[attr-defined]

        pass_time(0.25)
        b.story_collector.story.note(S, "opened", stage=1, peer="x", name="y")
        pass_time(1.25)
        b.story_collector.story.note(S, "sent")
        pass_time(0.5)
        a.story_collector.story.note(S, "emitted")
        lines = await c.story_collector.collect(S)
        assert [(line["at_s"], line["peer"], line["what"]) for line in lines] == [
            (0.0, a.id, "planned"),
            (0.25, b.id, "opened"),
            (1.5, b.id, "sent"),
            (2.0, a.id, "emitted"),
        ]
        assert [line.pop("unix_s") for line in lines] == pytest.approx(
            [keepers.clock.wall() - 2.0 + each for each in (0, 0.25, 1.5, 2)]
        )
        assert lines[0] == {"at_s": 0.0, "epoch": 1, "peer": a.id, "name": a.id[:4], "what": "planned"}
        assert lines[1] == {"at_s": 0.25, "stage": 1, "peer_": "x", "name_": "y", "peer": b.id, "name": b.id[:4], "what": "opened"}
        assert [line["what"] for line in await a.story_collector.collect(S)] == [line["what"] for line in lines]


async def test_a_session_without_notes_on_any_peer_is_unknown(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, _):
        with pytest.raises(UnknownSession):
            await a.story_collector.collect(S)


async def test_a_peer_that_sends_an_invalid_story_is_listed_at_the_end(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        a.story_collector.story.note(S, "planned")
        b.story_collector.story = InvalidStory(b.clock)
        lines = await a.story_collector.collect(S)
        assert [(line["peer"], line["what"]) for line in lines] == [(a.id, "planned"), (b.id, "gave no answer")]


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"{}", b"[1]", b'[{"at": 1}]', b'[{"at": "x", "what": "y"}]', b'[{"at": 1, "what": 2}]', b"[" * 100_000, b"\xff"),
        b"[" + b",".join([b'{"at":1,"what":"x"}'] * 2000) + b"]",
        b" " * (2**20 + 1),
    ],
    ids=lambda payload: f"{payload[:16]!r}",
)
def test_an_invalid_story_is_a_protocol_violation(payload: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        decode_lines(payload)


def test_lines_are_converted_to_this_peers_clock() -> None:
    moved = to_local_time([{"at": 900.0, "what": "x"}, {"at": 901.0, "what": "y"}], theirs=910.0, ours=20.0)
    assert moved == [{"at": 10.0, "what": "x"}, {"at": 11.0, "what": "y"}]


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.floats(0, 10)), max_size=40))
def test_the_order_of_one_peers_lines_is_kept(noted: list[tuple[str, float]]) -> None:
    stories: dict[PeerId, list[dict[str, object]]] = {}
    for number, (peer, at) in enumerate(sorted(noted, key=lambda each: each[1])):
        stories.setdefault(PeerId(peer), []).append({"at": at, "what": f"{number}"})
    lines = merge_stories(stories, str)
    assert len(lines) == len(noted)
    assert all(math.isfinite(line["at"]) for line in lines)
    assert [line["at"] for line in lines] == sorted(line["at"] for line in lines)
    for peer, own in stories.items():
        assert [line["what"] for line in lines if line["peer"] == peer] == [line["what"] for line in own]


def test_lines_of_the_same_time_stay_in_the_order_of_the_peers() -> None:
    lines = merge_stories({PeerId(peer): [{"at": 1.0, "what": peer}] for peer in "cab"}, str)
    assert [line["what"] for line in lines] == ["c", "a", "b"]


async def test_a_fact_named_like_a_key_of_the_line_gets_an_underscore(keepers: Keepers) -> None:
    async with keepers.linked("a", "b") as (a, b):
        b.story_collector.story.note(S, "moved", at_s=7, peer="x")
        (line,) = await a.story_collector.collect(S)
        assert line.pop("unix_s") == pytest.approx(keepers.clock.wall())
        assert line == {"at_s": 0.0, "at_s_": 7, "peer": b.id, "peer_": "x", "name": b.id[:4], "what": "moved"}
