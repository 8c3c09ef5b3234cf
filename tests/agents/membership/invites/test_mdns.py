"""Real mDNS on loopback: an invite is found by its number as long as it is announced."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from zeroconf import DNSOutgoing, DNSPointer
from zeroconf.const import _CLASS_IN, _FLAGS_AA, _FLAGS_QR_RESPONSE, _TYPE_PTR

from meshd.agents.links.pairing.joiner import Candidate
from meshd.agents.membership.invites import mdns

LOOPBACK = ("lo",)


@asynccontextmanager
async def running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def announced(number: int, port: int, host: str = "127.0.0.1") -> Coroutine[Any, Any, None]:
    return mdns.advertise(number, port, name=os.urandom(16).hex(), interfaces=LOOPBACK, host=host)


async def test_an_invite_is_found_by_its_number_and_others_are_not_reported() -> None:
    found: asyncio.Queue[Candidate] = asyncio.Queue()
    number = 100 + int.from_bytes(os.urandom(4), "big")  # no real code has it, so that tests may run at the same time
    async with (
        running(announced(number + 1, 1111)),
        running(announced(number, 2222)),
        running(mdns.look(number, found.put_nowait, interfaces=LOOPBACK)),
        asyncio.timeout(20),
    ):
        assert (await found.get()).addresses == (("127.0.0.1", 2222),)
    assert found.empty()


async def test_an_address_beyond_this_devices_networks_is_not_tried() -> None:
    found: asyncio.Queue[Candidate] = asyncio.Queue()
    number = 100 + int.from_bytes(os.urandom(4), "big")

    async def forged() -> None:
        with_records_of_another_network = mdns.AsyncServiceInfo(
            mdns.SERVICE, f"{os.urandom(16).hex()}.{mdns.SERVICE}", port=1, properties={"number": str(number)},
            server="forged.local.", parsed_addresses=["192.0.2.1"],
        )  # fmt: skip
        zeroconf = mdns.AsyncZeroconf(interfaces=["127.0.0.1"])
        try:
            await (await zeroconf.async_register_service(with_records_of_another_network, cooperating_responders=True))
            await asyncio.Event().wait()
        finally:
            await zeroconf.async_close()

    async with (
        running(forged()),
        running(mdns.look(number, found.put_nowait, interfaces=LOOPBACK)),
        running(announced(number, 3333)),
        asyncio.timeout(20),
    ):
        assert (await found.get()).addresses == (("127.0.0.1", 3333),)


async def test_a_forged_name_of_an_instance_does_no_harm() -> None:
    found: asyncio.Queue[Candidate] = asyncio.Queue()
    number = 100 + int.from_bytes(os.urandom(4), "big")
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))

    async def forged() -> None:
        packet = DNSOutgoing(_FLAGS_QR_RESPONSE | _FLAGS_AA)
        packet.add_answer_at_time(DNSPointer(mdns.SERVICE, _TYPE_PTR, _CLASS_IN, 120, "another._http._tcp.local."), 0)
        zeroconf = mdns.AsyncZeroconf(interfaces=["127.0.0.1"])
        try:
            while True:
                zeroconf.zeroconf.async_send(packet)
                await asyncio.sleep(0.2)
        finally:
            await zeroconf.async_close()

    async with running(mdns.look(number, found.put_nowait, interfaces=LOOPBACK)), running(forged()), asyncio.timeout(20):
        await asyncio.sleep(1)
        async with running(announced(number, 4444)):
            assert (await found.get()).addresses == (("127.0.0.1", 4444),)
    gc.collect()
    assert failures == []
