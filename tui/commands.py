"""What the user can have done: requests to the daemon."""

from dataclasses import dataclass
from typing import Any

import aiohttp

from meshd.tui.feed import error_of, headers_of

_ANSWER_S = 120.0


class CommandFailed(Exception):
    """The daemon did not do it. The text is for the user."""


@dataclass(frozen=True, slots=True)
class Commands:
    """Sends a user's commands to one daemon. Every method raises CommandFailed with the daemon's reason."""

    api: str
    api_key: str = ""

    async def cancel(self, session: str) -> None:
        await self._send("DELETE", f"/mesh/v1/sessions/{session}")

    async def migrate(self, session: str, target: str) -> dict[str, Any]:
        return await self._send("POST", "/mesh/v1/migrate", {"session": session, "target": target})

    async def place(self, model: str) -> None:
        await self._send("POST", "/mesh/v1/place", {"model": model})

    async def unplace(self, model: str) -> dict[str, Any]:
        return await self._send("POST", "/mesh/v1/unplace", {"model": model})

    async def drain(self, peer: str, *, undo: bool) -> dict[str, Any]:
        return await self._send("POST", "/mesh/v1/drain", {"peer": peer, "undo": undo, "timeout_s": 0})

    async def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=_ANSWER_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers_of(self.api_key)) as client,
                client.request(method, self.api + path, json=body) as response,
            ):
                if response.status >= 400:
                    raise CommandFailed(await error_of(response))
                if response.content_type != "application/json":
                    await response.read()
                    return {}
                document: dict[str, Any] = await response.json()
                return document
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CommandFailed(str(error) or "the daemon does not answer") from None
