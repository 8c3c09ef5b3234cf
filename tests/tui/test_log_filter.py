"""Which events the screen of logs shows, and how."""

from typing import Any

import msgspec
import pytest

from meshd.agents.observe.events import KINDS, Event, Lost, Row, Work
from meshd.agents.observe.stream import kind_of as tag_of
from meshd.tui.log_filter import LogFilter, kind_of, level_of, text_of, time_of

LINE = {
    "type": "log", "at": 3600.0, "peer": "p" * 52, "name": "attic", "level": "warning", "text": "a step timed out", "session": "5e"
}  # fmt: skip
LOSS = {
    "type": "recovery", "at": 0.0, "peer": "q" * 52, "name": "desk", "session": "3f" * 16, "epoch": 2, "plan": "desk:0-30",
    "method": "replay", "cause": "loss", "reason": "attic: silent", "pause_s": 0.25,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "loss"),
    [
        ("", True, True),
        ("timed OUT", True, False),
        ("step replay", False, False),
        ("peer:att", True, False),
        ("peer:qqqq", False, True),
        ("level:warning", True, True),
        ("level:error", False, False),
        ("level:info recovery", False, True),
        ("session:3f", False, True),
        ("session:5e level:warning step", True, False),
        ("level:loud", False, False),
    ],
)
def test_all_parts_of_a_filter_must_match(text: str, line: bool, loss: bool) -> None:
    wanted = LogFilter.parse(text)
    assert (wanted(LINE), wanted(LOSS)) == (line, loss)


def test_a_filter_is_written_as_it_was_typed() -> None:
    assert str(LogFilter.parse("  slow   level:info peer:Attic session:5e link ")) == "peer:attic level:info session:5e slow link"
    assert str(LogFilter.parse("")) == ""


def example(kind: type[Event]) -> dict[str, Any]:
    """Make an event of a kind, with plausible fields."""
    values: dict[str, Any] = {"str": "text", "int": 3, "float": 0.5}
    hints = {field.name: field.type for field in msgspec.structs.fields(kind)}
    made = {name: values.get(getattr(hint, "__name__", ""), "text") for name, hint in hints.items()}
    known = {"total_bytes": 5, "level": "info", "cause": "loss", "what": "ttft"}
    made |= {name: value for name, value in known.items() if name in made}
    return {"type": tag_of_kind(kind), "at": 1.0, "peer": "p", "name": "attic", **made}


def tag_of_kind(kind: type[Event]) -> str:
    return str(kind.__struct_config__.tag)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (Row, Work)], ids=tag_of_kind)
def test_every_kind_of_event_is_a_sentence(kind: type[Event]) -> None:
    text = text_of(example(kind))
    assert text
    assert "of_name" not in text  # not merely its fields
    assert tag_of(Lost(events=1)) == "lost"


def test_an_event_of_a_later_version_is_shown_by_its_fields() -> None:
    envelope = {"at": 1.0, "peer": "p", "name": "attic"}
    event = envelope | {"type": "of a later version", "speed": 0.123456, "empty": "", "what": "x\x1b[2J"}
    assert text_of(event) == "speed 0.1235, what x\\x1b[2J"
    assert (kind_of(event), level_of(event)) == ("of a later version", "info")
    assert "later" in text_of(envelope | {"type": "peer", "field": "later"})


@pytest.mark.parametrize(("at", "shown"), [(3661.0, "01:01:01"), (1e300, "--:--:--"), (float("nan"), "--:--:--")])
def test_times(at: float, shown: str) -> None:
    assert time_of({"at": at}) == shown
