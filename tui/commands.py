"""What the user can have done: requests to the daemon."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from meshd.tui.event_source import error_in
from meshd.tui.feed import headers_of

if TYPE_CHECKING:
    import aiohttp

_ANSWER_S = 60.0
_SILENT_S = 60.0
"""A stream of progress has a comment at least every 10 s."""


class CommandFailed(Exception):
    """The daemon did not do it. The text is for the user."""


@dataclass(frozen=True, slots=True)
class Commands:
    """Sends a user's commands to one daemon. Every method raises CommandFailed with the daemon's reason."""

    api: str
    api_key: str = ""

    async def cancel(self, session: str) -> None:
        """End a session's answer."""
        await self._send("DELETE", f"/mesh/v1/sessions/{quote(session)}")

    async def migrate(self, session: str, target: str) -> dict[str, Any]:
        """Move all stages of a session to a peer."""
        return await self._send("POST", "/mesh/v1/migrate", {"session": session, "target": target})

    async def plan(self, model: str) -> dict[str, Any]:
        """Ask what a placement of a model would be."""
        return await self._send("POST", "/mesh/v1/plan", {"model": model})

    async def place(self, model: str) -> None:
        """Load a model's layers on peers, and wait until they are active. Rows show the progress."""
        async for _ in self._stream("/mesh/v1/place", {"model": model}):
            pass

    async def unplace(self, model: str) -> int:
        """Free a model's layers on all peers. Returns: bytes of memory freed."""
        return int((await self._send("POST", "/mesh/v1/unplace", {"model": model}))["freed_bytes"])

    async def pull(self, model: str) -> None:
        """Fetch a model to the daemon's disk. Events show the progress. Cancel: the pull stops."""
        async for _ in self._stream("/mesh/v1/pull", {"model": model}):
            pass

    async def remove(self, model: str) -> int:
        """Remove a model from the daemon's disk. Returns: bytes freed."""
        return int((await self._send("DELETE", f"/mesh/v1/models/{quote(model, safe=':/@')}"))["freed_bytes"])

    async def catalogue(self) -> list[dict[str, Any]]:
        """List the models that can be pulled by a short name."""
        rows: list[dict[str, Any]] = (await self._send("GET", "/mesh/v1/catalogue"))["data"]
        return rows

    async def drain(self, peer: str, *, undo: bool) -> int:
        """Have a peer take no new work, or take work again. Returns: the number of its sessions that still run there."""
        return int((await self._send("POST", "/mesh/v1/drain", {"peer": peer, "undo": undo, "timeout_s": 0}))["sessions_left"])

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        async with self._request(method, path, body, total_s=_ANSWER_S) as response:
            document: dict[str, Any] = await response.json()
            return document

    async def _stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Post `body` and yield the events of the answer until `[DONE]`."""
        async with self._request("POST", path, body, total_s=None) as response:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise CommandFailed(str(event["error"].get("message")))
                    yield event
                elif line.startswith(b"data: [DONE]"):
                    return
        raise CommandFailed("the daemon broke off")

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, *, total_s: float | None
    ) -> AsyncIterator["aiohttp.ClientResponse"]:
        await asyncio.to_thread(import_module, "aiohttp")  # 0.2 s, in which the monitor still draws; only commands need it
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=total_s, sock_read=_SILENT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers_of(self.api_key)) as client,
                client.request(method, self.api + path, json=body) as response,
            ):
                if response.status >= 400:
                    raise CommandFailed(error_in(response.status, await response.read()))
                yield response
        except TimeoutError:
            raise CommandFailed("the daemon does not answer") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise CommandFailed(str(error) or type(error).__name__) from None
