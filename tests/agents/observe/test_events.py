"""Events reach every reader in order; a slow reader loses the oldest events and gets the number of lost events."""

import asyncio

from meshd.agents.observe.events import EventBus
from meshd.clock import SystemClock


async def test_every_reader_gets_every_event_in_order() -> None:
    bus = EventBus(SystemClock())
    readers = [bus.subscribe(), bus.subscribe()]
    waiting = [asyncio.ensure_future(anext(reader)) for reader in readers]
    await asyncio.sleep(0)
    bus.publish("peer", name="a")
    bus.publish("peer", name="b")
    first = [await event for event in waiting]
    second = [await anext(reader) for reader in readers]
    assert [(event["type"], event["name"]) for event in first + second] == [("peer", "a")] * 2 + [("peer", "b")] * 2
    for reader in readers:
        await reader.aclose()


async def test_a_slow_reader_gets_the_number_of_events_it_lost() -> None:
    bus = EventBus(SystemClock())
    reader = bus.subscribe()
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    for number in range(300):
        bus.publish("tick", number=number)
    first, second = await waiting, await anext(reader)
    assert (first["type"], first["events"]) == ("lost", 300 - 256)
    assert (second["type"], second["number"]) == ("tick", 300 - 256)
    await reader.aclose()
