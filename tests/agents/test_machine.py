"""The base class of state machines: the table decides, an illegal event changes nothing, and its error lists earlier changes."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from meshd.agents.machine import STORY_LINES, IllegalTransition, Machine, Table, Transition, diagram
from scripts import load_script


class Light(Enum):
    OFF = "off"
    ON = "on"
    BROKEN = "broken"


@dataclass(frozen=True)
class Pressed:
    pass


@dataclass(frozen=True)
class Struck:
    pass


@dataclass(slots=True)
class Lamp(Machine[Pressed | Struck, str]):
    state: Light = Light.OFF
    presses: int = 0
    goes_to: Light | None = None
    deaf: bool = False

    def is_stale(self, event: Pressed | Struck) -> bool:
        return self.deaf


def _press(lamp: Lamp, event: Pressed) -> list[str]:
    lamp.presses += 1
    lamp.state = lamp.goes_to or (Light.OFF if lamp.state is Light.ON else Light.ON)
    return [lamp.state.value]


def _break(lamp: Lamp, event: Struck) -> list[str]:
    lamp.state = Light.BROKEN
    return []


TABLE: Table = {
    (Light.OFF, Pressed): Transition(_press, (Light.ON,)),
    (Light.ON, Pressed): Transition(_press, (Light.OFF,)),
    (Light.ON, Struck): Transition(_break, (Light.BROKEN,)),
}
Lamp.table = TABLE


def test_an_event_does_what_its_row_says() -> None:
    lamp = Lamp()
    assert lamp.handle(Pressed()) == ["on"]
    assert lamp.handle(Pressed()) == ["off"]
    assert lamp.presses == 2


def test_an_illegal_event_raises_with_the_story_and_changes_nothing() -> None:
    lamp = Lamp()
    lamp.handle(Pressed())
    lamp.handle(Struck())
    before = repr(lamp)
    with pytest.raises(IllegalTransition, match=r"Lamp: Pressed in state broken \(after off -Pressed-> on, on -Struck-> broken\)"):
        lamp.handle(Pressed())
    assert repr(lamp) == before


def test_an_action_may_only_enter_a_state_that_its_row_names() -> None:
    with pytest.raises(AssertionError, match="off -Pressed-> broken is not in its table"):
        Lamp(goes_to=Light.BROKEN).handle(Pressed())


def test_an_action_may_always_keep_the_state() -> None:
    assert Lamp(goes_to=Light.OFF).handle(Pressed()) == ["off"]


def test_a_stale_event_is_dropped_before_the_table_is_consulted() -> None:
    assert Lamp(deaf=True).handle(Struck()) == []


def test_the_story_keeps_only_the_latest_changes() -> None:
    lamp = Lamp()
    for _ in range(STORY_LINES + 3):
        lamp.handle(Pressed())
    assert len(lamp.story) == STORY_LINES
    assert lamp.story[-1].after is lamp.state


def test_a_diagram_has_every_arrow_of_the_table() -> None:
    def anything(machine: Any, event: Any) -> list[str]:
        return []

    table = {**TABLE, (Light.OFF, Struck): Transition(anything, (Light.OFF,))}
    assert diagram(table, Light.OFF).splitlines() == [
        "stateDiagram-v2",
        "    [*] --> off",
        "    off --> on: Pressed",
        "    on --> off: Pressed",
        "    on --> broken: Struck",
    ]


def test_the_page_of_diagrams_matches_the_tables() -> None:
    module = load_script("diagrams")
    assert module.PAGE.read_text() == module.page(), "run `make diagrams`"
