"""A site whose daemons are linked through relays, so that a test can break all connections while every process lives on."""

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from in_process.cables import Cable
from real_daemons.sites import LocalSite

T = TypeVar("T")

_RELAY_HOST = "127.0.0.2"
"""Each daemon listens at 127.0.0.1, and its relay at this address, on the same port. A daemon sees the others come from here, so it
dials them here, too."""
_WAIT_S = 10.0


class CabledSite(LocalSite):
    """A `LocalSite` with a relay before the link port of each daemon."""

    def __init__(self, peers: int) -> None:
        super().__init__(peers)
        self._cable = Cable()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays")
        self._thread.start()
        self._relays = AsyncExitStack()
        for port in self._link.values():
            self._do(self._relays.enter_async_context(self._cable.to(port, host=_RELAY_HOST, at=port)))

    def flags(self, name: str) -> list[str]:
        return [flag.replace("127.0.0.1", _RELAY_HOST) if before == "--peer" else flag for before, flag in self._pairs(name)]

    def snap(self) -> int:
        """Reset all connections between daemons; what is on its way is lost. Returns: the number of connections."""

        async def snap() -> int:
            return self._cable.snap()

        return self._do(snap())

    def close(self) -> None:
        self._do(self._relays.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_WAIT_S)
        self._loop.close()

    def _pairs(self, name: str) -> list[tuple[str, str]]:
        flags = super().flags(name)
        return list(zip(["", *flags], flags, strict=False))

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_WAIT_S)
