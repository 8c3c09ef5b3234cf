"""Dialling: the back-off, and how long an address is dialled."""

import asyncio
from itertools import pairwise

import pytest

from meshd.agents.links.dial import HINTS_AT_ONCE, HINTS_S, MAX_HINTS, MAX_HINTS_PER_HOST, MAX_TARGETS, Dialler, back_off_s
from meshd.agents.links.link_table import LinkTable, Timing
from meshd.agents.links.log import LinkLog
from meshd.agents.links.rpc import Dispatcher
from meshd.clock import SystemClock
from meshd.errors import PeerLost
from meshd.protocol.transport import Address
from meshd.types import PeerId

OWN = PeerId("a" * 52)


def test_the_back_off_grows_from_a_fifth_of_a_second_to_its_limit() -> None:
    waits = [back_off_s(failures, 5.0, 1.0) for failures in range(1, 30)]
    assert waits[0] == pytest.approx(0.2)
    assert waits[-1] == 5.0
    assert all(before <= after for before, after in pairwise(waits))
    assert back_off_s(3, 5.0, 0.0) == pytest.approx(0.4)
    assert back_off_s(2000, 0.5, 1.0) == 0.5


@pytest.fixture
def table() -> LinkTable:
    clock = SystemClock()
    linklog = LinkLog(clock)
    dispatcher = Dispatcher(lambda peer, message, payload: None, linklog)
    return LinkTable(OWN, dispatcher, clock, linklog, Timing(), lambda *_: None, lambda *_: None)


class Telephone:
    """Records each dial; no peer answers."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Address] = asyncio.Queue()

    async def dial(self, address: Address) -> PeerId:
        self.calls.put_nowait(address)
        raise PeerLost("nobody answers")


async def dialled_for(dialler: Dialler, seconds: float) -> None:
    async with asyncio.timeout(seconds + 5), asyncio.TaskGroup() as group:
        dialler.start(group)
        await asyncio.sleep(seconds)
        dialler.stop()


async def test_repeated_reports_of_an_address_where_nobody_answers_cause_no_dials(table: LinkTable) -> None:
    telephone = Telephone()
    dialler = Dialler(telephone.dial, OWN, table, SystemClock())
    dialler.connect(("10.0.0.7", 1), "mdns")
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        dialler.start(group)
        for _ in range(100):
            await asyncio.sleep(0.005)
            dialler.connect(("10.0.0.7", 1), "mdns")
        dialler.stop()
    assert telephone.calls.qsize() <= 4  # now, and after 0.2, 0.6 and 1.4 s at the latest


async def test_a_source_that_reports_an_address_again_does_not_reset_its_back_off(table: LinkTable) -> None:
    telephone = Telephone()
    dialler = Dialler(telephone.dial, OWN, table, SystemClock())
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        dialler.start(group)
        for _ in range(50):
            dialler.connect(("10.0.0.7", 1), "mdns")
            await asyncio.sleep(0.01)
            dialler.forget(("10.0.0.7", 1), "mdns")
        dialler.stop()
    assert telephone.calls.qsize() <= 4


async def test_forged_addresses_share_a_budget_of_dials_and_the_users_own_address_needs_none(table: LinkTable) -> None:
    telephone = Telephone()
    dialler = Dialler(telephone.dial, OWN, table, SystemClock())
    for number in range(5000):
        dialler.connect((f"10.0.{number % 200}.{number // 200}", 7000), "mdns")
    dialler.connect(("10.9.9.9", 6375), "static")
    await dialled_for(dialler, 0.5)
    calls = [telephone.calls.get_nowait() for _ in range(telephone.calls.qsize())]
    assert len([host for host, port in calls if port == 7000]) <= HINTS_AT_ONCE + HINTS_S
    assert ("10.9.9.9", 6375) in calls


async def test_one_host_takes_few_of_the_addresses_that_are_dialled(table: LinkTable) -> None:
    dialler = Dialler(Telephone().dial, OWN, table, SystemClock())
    for port in range(1000):
        dialler.connect(("10.0.0.7", 1 + port), "mdns")
    assert len(dialler._targets) == MAX_HINTS_PER_HOST


async def test_an_address_is_dialled_until_its_last_source_forgets_it(table: LinkTable) -> None:
    telephone = Telephone()
    dialler = Dialler(telephone.dial, OWN, table, SystemClock())
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        dialler.start(group)
        for source in ("mdns", "mqtt"):
            dialler.connect(("h", 1), source)
        await telephone.calls.get()
        dialler.forget(("h", 1), "mdns")
        await telephone.calls.get()
        dialler.forget(("h", 1), "mqtt")
        dialler.forget(("h", 1), "mqtt")
        await asyncio.sleep(0.5)  # longer than the first two waits
        assert telephone.calls.empty()


async def test_a_static_address_is_never_forgotten(table: LinkTable) -> None:
    telephone = Telephone()
    dialler = Dialler(telephone.dial, OWN, table, SystemClock())
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        dialler.start(group)
        dialler.connect(("h", 1), "static")
        await telephone.calls.get()
        dialler.forget(("h", 1), "static")
        await telephone.calls.get()
        dialler.stop()


async def test_the_number_of_addresses_is_bounded(table: LinkTable) -> None:
    dialler = Dialler(Telephone().dial, OWN, table, SystemClock())
    for number in range(MAX_TARGETS + 10):
        dialler.connect((f"10.0.{number % 256}.{number // 256}", 1), "mdns")
    assert len(dialler._targets) == MAX_HINTS
    for number in range(10):
        dialler.connect((f"10.9.9.{number}", 1), "static")
    assert len(dialler._targets) == MAX_HINTS + 10


async def test_an_excluded_device_hardly_dials_until_its_key_changes(table: LinkTable) -> None:
    telephone = Telephone()
    dialler = Dialler(telephone.dial, OWN, table, SystemClock())
    dialler.rarely = True
    dialler.connect(("10.0.0.7", 1), "static")
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        dialler.start(group)
        await telephone.calls.get()
        await asyncio.sleep(0.5)
        for _ in range(5):
            dialler.connect(("10.0.0.7", 1), "static")
        await asyncio.sleep(0.5)
        assert telephone.calls.empty()
        dialler.rarely = False
        dialler.wake()
        await telephone.calls.get()
        dialler.stop()
