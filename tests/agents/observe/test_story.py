"""The notes of one peer on its sessions, and how many of them it keeps."""

from in_process.journals import HandClock, S
from meshd.agents.observe.story import Story
from meshd.types import SessionId


def test_a_peer_remembers_the_latest_lines_and_sessions() -> None:
    clock = HandClock(0.0)
    story = Story(clock)
    for number in range(300):
        clock.now = float(number)
        story.note(S, "step", number=number)
    first, second, *_, last = story.lines(S)
    assert first == {"at": 44.0, "what": "dropped", "lines": 44}
    assert second == {"at": 44.0, "what": "step", "number": 44}
    assert last["number"] == 299
    for number in range(512):
        story.note(SessionId(f"{number}"), "opened")
    assert story.lines(S) == []
    assert len(story.lines(SessionId("511"))) == 1


def test_an_unknown_session_has_no_lines() -> None:
    assert Story(HandClock(0.0)).lines(S) == []


def test_long_texts_of_peers_are_cut_and_all_lines_together_are_bounded() -> None:
    story = Story(HandClock(0.0))
    for session in range(512):
        for _ in range(256):
            story.note(SessionId(f"{session}"), "closed", reason="x" * 32_000)
        assert story.size <= 16 << 20
    assert [line["reason"] for line in story.lines(SessionId("511"))] == ["x" * 500] * 256
    story.note(S, "planned", stages=[{"held": 1}] * 10_000)
    assert story.lines(S) == [{"at": 0.0, "what": "planned", "facts": "too long to be kept"}]
    kept = sum(bool(story.lines(SessionId(f"{session}"))) for session in range(512))
    assert 0 < kept < 512, "the oldest sessions make room"
