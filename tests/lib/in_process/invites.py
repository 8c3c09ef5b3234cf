"""An open invite on loopback, and joiners, for tests of pairings."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from meshd.agents.cluster_service import InviteStep
from meshd.agents.links.pairing.inviter import Inviter, InviterSettings
from meshd.agents.links.pairing.joiner import Candidate, Joiner
from meshd.clock import SystemClock
from meshd.protocol.pairing.code import InviteCode
from meshd.protocol.pairing.messages import Invitation

JOIN_CODE = "mesh-any-text"
LINK_PORT = 40_000


@dataclass
class OpenInvite:
    """An invite that is open, and its steps so far."""

    inviter: Inviter
    code: InviteCode
    port: int
    steps: list[InviteStep] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def end(self) -> InviteStep:
        """Wait until the invite has ended. Returns: its last step."""
        async with asyncio.timeout(30):
            await self.ended.wait()
        return self.steps[-1]

    def wrong(self) -> InviteCode:
        """A code that differs from the right one in one word."""
        first, second = self.code.words
        return InviteCode(self.code.number, (first, "lion" if second != "lion" else "amber"))


def make_inviter(folder: Path, advertised: list[tuple[int, int]] | None = None, join_code: str = JOIN_CODE) -> Inviter:
    async def advertise(number: int, port: int) -> None:
        if advertised is not None:
            advertised.append((number, port))
        try:
            await asyncio.Event().wait()
        finally:
            if advertised is not None:
                advertised.clear()

    settings = InviterSettings(
        name="desk", join_code=lambda: join_code, host="127.0.0.1", link_port=lambda: LINK_PORT, hosts=lambda: ["127.0.0.1"],
        folder=folder, advertise=advertise,
    )  # fmt: skip
    return Inviter(settings, SystemClock())


@asynccontextmanager
async def open_invite(inviter: Inviter, minutes: float = 1.0) -> AsyncIterator[OpenInvite]:
    """Open an invite, and read its steps until the end of the block."""
    first: asyncio.Future[InviteStep] = asyncio.get_running_loop().create_future()

    async def read() -> None:
        async with aclosing(inviter.invite(minutes)) as steps:
            async for step in steps:
                if first.done():
                    opened.steps.append(step)
                else:
                    first.set_result(step)
                    await asyncio.sleep(0)
        opened.ended.set()

    reading = asyncio.create_task(read())
    await asyncio.wait([reading, first], return_when=asyncio.FIRST_COMPLETED)
    if reading.done():
        reading.result()
    step = first.result()
    opened = OpenInvite(inviter, InviteCode.parse(step.code), int(step.addresses[0].rpartition(":")[2]), [step])
    try:
        yield opened
    finally:
        reading.cancel()
        await asyncio.wait([reading])


def make_joiner(
    code: InviteCode, port: int, *, name: str = "attic", store: Callable[[Invitation], None] = lambda invitation: None
) -> Joiner:
    """A joiner that was told one port of this machine."""
    joiner = Joiner(code, name, store, SystemClock())
    joiner.found(Candidate((("127.0.0.1", port),), lasting=True))
    return joiner
