"""Which events the screen of logs shows, and how they look there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self

from meshd.bounds import printable
from meshd.display import duration

LEVELS = ("debug", "info", "warning", "error")
_WARNINGS = frozenset({"refusal", "recovery", "lost", "missed", "notice"})
"""Kinds of events that have no level, and deserve one."""
_HIDDEN = frozenset({"type", "at", "peer", "name", "level", "logger"})


@dataclass(frozen=True, slots=True)
class LogFilter:
    """A filter that was typed, such as `peer:attic level:warning session:3f2a timeout`. All of its parts must match."""

    peer: str = ""
    level: str = ""
    """The least severe level that is shown."""
    session: str = ""
    words: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a filter. A level that does not exist is a word like any other."""
        named = {"peer": "", "level": "", "session": ""}
        words: list[str] = []
        for word in text.lower().split():
            name, colon, value = word.partition(":")
            if colon and name in named and (name != "level" or value in LEVELS):
                named[name] = value
            else:
                words.append(word)
        return cls(**named, words=tuple(words))

    def __str__(self) -> str:
        named = (("peer", self.peer), ("level", self.level), ("session", self.session))
        return " ".join([*(f"{name}:{value}" for name, value in named if value), *self.words])

    def __call__(self, event: Mapping[str, Any]) -> bool:
        """Whether an event is shown."""
        if self.peer and not (str(event["name"]).lower().startswith(self.peer) or event["peer"].startswith(self.peer)):
            return False
        if self.level and LEVELS.index(level_of(event)) < LEVELS.index(self.level):
            return False
        if self.session and not str(event.get("session", "")).startswith(self.session):
            return False
        return not self.words or self._has_words(f"{kind_of(event)} {text_of(event)}".lower())

    def _has_words(self, text: str) -> bool:
        return all(word in text for word in self.words)


def level_of(event: Mapping[str, Any]) -> str:
    """Return the level of a line, or of another event."""
    level = event.get("level")
    if level in LEVELS:
        return str(level)
    return "warning" if event["type"] in _WARNINGS else "info"


def kind_of(event: Mapping[str, Any]) -> str:
    """Return the level of a line, and the type of another event."""
    return str(event["level"] if event["type"] == "log" else event["type"])


def text_of(event: Mapping[str, Any]) -> str:
    """Format an event as a sentence; one that this version does not know, as its fields."""
    known = _SENTENCES.get(str(event["type"]))
    try:
        text = known(event) if known is not None else _fields(event)
    except (KeyError, TypeError, ValueError):  # of another version
        text = _fields(event)
    return printable(text)


def time_of(event: Mapping[str, Any]) -> str:
    """Format the time at which an event was published, in this machine's time zone."""
    try:
        return datetime.fromtimestamp(event["at"]).strftime("%H:%M:%S")
    except (OverflowError, OSError, ValueError):  # a peer's clock can show anything
        return "--:--:--"


def _fields(event: Mapping[str, Any]) -> str:
    fields = ((name, value) for name, value in event.items() if name not in _HIDDEN and value not in ("", None))
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in fields)


def _was(event: Mapping[str, Any]) -> str:
    return f" (was {event['was']})" if event["was"] else ""


def _why(event: Mapping[str, Any], name: str = "reason") -> str:
    return f": {event[name]}" if event[name] else ""


def _session(event: Mapping[str, Any]) -> str:
    return f"session {event['session'][:8]}"


_SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "log": lambda event: str(event["text"]),
    "peer": lambda event: f"{event['of_name']} is {event['state']}{_was(event)}{_why(event)}",
    "refusal": lambda event: f"no link with {event['address']}{_why(event)}" + (f"; {event['hint']}" if event["hint"] else ""),
    "notice": lambda event: event["message"] + (f"; {event['hint']}" if event["hint"] else ""),
    "holding": lambda event: f"{event['model']} {event['layers']} is {event['state']}{_was(event)}",
    "load": lambda event: f"{event['model']} {event['layers']} is loaded to {100 * event['progress']:.0f} %",
    "session": lambda event: (
        f"{_session(event)} of {event['model']} is {event['state']}{_was(event)}, {event['tokens']} tokens{_why(event)}"
    ),
    "plan": lambda event: (
        f"{_session(event)}, epoch {event['epoch']}: {event['plan']}, {duration(event['predicted_tpot_s'])} a token predicted"
        f"{_why(event)}"
    ),
    "recovery": lambda event: (
        f"{_session(event)} continued by {event['method']} after {duration(event['pause_s'])} on {event['plan']}{_why(event)}"
    ),
    "prediction": lambda event: (
        f"{_session(event)}: {event['what']} predicted {duration(event['predicted_s'])}, measured {duration(event['measured_s'])}"
    ),
    "pull": lambda event: f"{event['model']}: {event['phase']} from {event['source']}{_why(event, 'message')}",
    "lost": lambda event: f"{event['events'] or 'some'} events were lost: this reader was too slow, or the daemon restarted",
    "missed": lambda event: f"{event['events']} events of this peer were too many to show",
}
