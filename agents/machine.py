"""The base class of all state machines, and the diagram that is generated from a machine's table.

A machine is pure: events in, commands out, no I/O and no clock. Its table lists, for each state, the allowed events, the action
of each event, and the states that may follow. An event that is not in the table raises IllegalTransition and changes nothing. A
machine keeps its latest changes of state (its story) for error reports.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

EventT = TypeVar("EventT")
CommandT = TypeVar("CommandT")

STORY_LINES = 16
"""Changes of state that a machine remembers. A recovery of a session makes four, so this covers four recoveries."""


class IllegalTransition(RuntimeError):
    """The event is not allowed in this state, which is a bug in meshd. The machine is unchanged."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What one event does in one state."""

    action: Callable[[Any, Any], list[Any]]
    """(machine, event) -> commands."""
    to: tuple[Enum, ...] = ()
    """States that may follow, besides the current one."""


Table = Mapping[tuple[Enum, type[Any]], Transition]
"""(state, type of event) -> transition."""


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a machine's story."""

    event: str
    before: Enum
    after: Enum

    def __str__(self) -> str:
        return f"{self.before.value} -{self.event}-> {self.after.value}"


class Machine(Generic[EventT, CommandT]):
    """A state machine. A subclass has a field `state` and sets `table`. Only `handle` changes a machine."""

    __slots__ = ("story",)
    table: ClassVar[Table]
    state: Any
    story: tuple[Change, ...]
    """The latest changes of state, oldest first. A tuple, to save memory: a fetch has thousands of machines."""

    def __new__(cls, *args: object, **kwargs: object) -> "Machine[EventT, CommandT]":
        machine = super().__new__(cls)
        machine.story = ()
        return machine

    def handle(self, event: EventT) -> list[CommandT]:
        """Apply one event.

        Returns: commands, which the caller must carry out; none for a stale event.
        Raises: IllegalTransition, with nothing changed; AssertionError if the action entered a state that the table does not allow.
        """
        if self.is_stale(event):
            return []
        before = self.state
        transition = self.table.get((before, type(event)))
        if transition is None:
            raise IllegalTransition(f"{self.title()}: {type(event).__name__} in state {before.value}{self._history()}")
        commands = transition.action(self, event)
        if self.state is not before:
            change = Change(type(event).__name__, before, self.state)
            if self.state not in transition.to:
                raise AssertionError(f"{self.title()}: {change} is not in its table")
            self.story = (*self.story, change)[-STORY_LINES:]
        return commands

    def validate(self) -> None:
        """Check the invariants that hold between events; tests call it after each event. Raises: AssertionError."""

    def is_stale(self, event: EventT) -> bool:
        """Whether the event belongs to work that is over. `handle` drops such an event before it consults the table."""
        return False

    def title(self) -> str:
        """Returns: the machine's name in error messages."""
        return type(self).__name__

    def _history(self) -> str:
        return f" (after {', '.join(map(str, self.story))})" if self.story else ""


def diagram(table: Table, initial: Enum) -> str:
    """Convert a table to a Mermaid state diagram: one arrow for each pair of states, labelled with its events."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), transition in table.items():
        for after in transition.to:
            if after is not state:
                arrows.setdefault((state.value, after.value), []).append(event.__name__)
    order = [state.value for state in type(initial)]
    in_order = sorted(arrows, key=lambda arrow: (order.index(arrow[0]), order.index(arrow[1])))
    drawn = [f"    {before} --> {after}: {', '.join(sorted(arrows[before, after]))}" for before, after in in_order]
    return "\n".join(["stateDiagram-v2", f"    [*] --> {initial.value}", *drawn])
