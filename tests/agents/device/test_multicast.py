"""Multicast on this machine's own interfaces: what one socket sends, another one hears."""

import asyncio
import contextlib
import socket

import pytest

from meshd.agents.device.multicast import ask_and_hear, hear, heard_itself, listening, question, send
from meshd.agents.membership.interfaces import choose_interfaces, present_interfaces, used_addresses

ONE, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


@pytest.fixture
def address() -> str:
    """An address that multicast can be sent from."""
    for each in used_addresses(choose_interfaces(present_interfaces())):
        with contextlib.suppress(OSError):
            send(ONE, each)
            return each
    pytest.skip("no interface here can multicast")


def test_a_question_is_a_dns_message_with_the_nonce_as_its_name() -> None:
    data = question(ONE)
    assert data[:12] == bytes(4) + b"\0\1" + bytes(6)
    assert data[12:] == b"\x20" + ONE.encode() + b"\6_meshd\4_tcp\5local\0\0\x10\0\1"


async def test_a_device_hears_itself(address: str) -> None:
    assert await heard_itself(ONE, address)


async def test_only_the_question_that_is_waited_for_counts(address: str) -> None:
    with listening([address]) as receiver:
        send(OTHER, address)
        assert not await hear(receiver, ONE, within_s=0.2)
        send(ONE, address)
        assert await hear(receiver, ONE, within_s=1.0)


async def test_two_sides_hear_one_another(address: str) -> None:
    both = await asyncio.gather(ask_and_hear(ONE, OTHER, [address]), ask_and_hear(OTHER, ONE, [address]))
    assert both == [True, True]


async def test_one_that_is_alone_hears_nothing(address: str) -> None:
    assert not await ask_and_hear(ONE, OTHER, [address])


async def test_a_port_that_is_taken_for_itself_alone_is_an_error() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as owner:
        try:
            owner.bind(("", 5353))  # without SO_REUSEADDR
        except OSError:
            pytest.skip("port 5353 is in use here already")
        with pytest.raises(OSError, match="in use"):
            await heard_itself(ONE, "127.0.0.1")
