"""The keys that a daemon accepts: finds whose key a request carries, and follows changes of the file of keys."""

import asyncio
import hmac
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from meshd.api.access.key_file import KeyFile
from meshd.api.access.keys import ApiKey, digest_of, prefix_of
from meshd.api.access.limits import Admission, BackgroundAnswer, KeyUse
from meshd.api.access.scopes import Scope
from meshd.clock import Clock
from meshd.errors import MeshdError, StorageError
from meshd.state import FileSignature
from meshd.telemetry import Telemetry

log = logging.getLogger(__name__)

WATCH_S = 0.5
"""How often the file is looked at for requests that run. For a new request it is looked at when the request comes."""
_USED_S = 60.0
"""How often the times of last use are stored: flash memory wears."""
_CANCEL_S = 5.0
_NOBODY = bytes(32)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, by its key."""

    label: str
    """Names the key, and is not secret: its prefix; `default`: the key of the setting `api-key`; `local`: this user's commands."""
    scope: Scope
    use: KeyUse | None = None
    """None: without limits."""

    def admit(self, now: float) -> Admission:
        """Admit a request of this caller. Raises: RateLimited."""
        return self.use.admit(now) if self.use is not None else Admission(self.label)


class KeyRing:
    """The accepted keys: that of the setting `api-key`, that of this user's commands, and those of the file."""

    def __init__(
        self,
        clock: Clock,
        telemetry: Telemetry,
        *,
        default: str | None = None,
        local: str | None = None,
        file: KeyFile | None = None,
        always_closed: bool = False,
    ) -> None:
        """`always_closed`: keys are needed even if there are none, as on an address that other machines can reach.

        Raises: StorageError if the file is broken.
        """
        self._clock = clock
        self._telemetry = telemetry
        self._fixed = [
            (Caller(label, Scope.ADMIN), digest_of(key))
            for label, key in (("default", default), ("local", local))
            if key is not None
        ]
        self._file = file
        self._always_closed = always_closed or default is not None
        self._signature: FileSignature | None = None
        self._uses: dict[str, KeyUse] = {}
        self._used: dict[str, int] = file.last_used() if file is not None else {}
        self._used_stored = dict(self._used)
        self._to_cancel: list[BackgroundAnswer] = []
        self._complained: FileSignature | None = None
        if file is not None:
            self._signature = file.signature()
            self._replace(file.load() or ())

    @property
    def closed(self) -> bool:
        """Whether a request needs a key. A file of keys closes the API even when its last key has been removed."""
        return self._always_closed or self._signature is not None

    def find(self, given: Iterable[str]) -> Caller | None:
        """Find whose key one of these texts is. Returns: None if none is valid."""
        found: Caller | None = None
        for text in given:
            digest = digest_of(text)
            for caller, expected in self._fixed:
                if hmac.compare_digest(digest, expected):
                    found = found or caller
            # The prefix is public. The digest is compared in constant time, against zeros if no key has the prefix.
            use = self._uses.get(prefix_of(text) or "")
            same = hmac.compare_digest(digest, use.key.digest if use is not None else _NOBODY)
            if same and use is not None and not use.key.expired(self._clock.wall()):
                self._used[use.key.prefix] = int(self._clock.wall())
                found = found or Caller(use.key.prefix, use.key.scope, use)
        return found

    def refresh(self) -> None:
        """Read the file if it has changed (a look takes 2 microseconds), and end what revoked and expired keys have running.

        If the file is broken or can't be read, the keys that were read before stay valid, and the log says so.
        """
        if self._file is None:
            return
        signature: FileSignature | None = None
        try:
            signature = self._file.signature()
            if signature != self._signature:
                keys = self._file.load() or ()
                self._signature = signature
                self._replace(keys)
        except (StorageError, OSError) as error:
            if signature != self._complained:
                self._complained = signature
                log.error("the API keys are not read again, so those of before stay valid: %s", error)

    async def watch(self) -> None:
        """Follow changes of the file, so that a running request ends soon after its key was revoked, until cancelled."""
        stored = self._clock.monotonic()
        try:
            while True:
                await self._clock.sleep(WATCH_S)
                self.refresh()
                now = self._clock.wall()
                for use in self._uses.values():
                    if use.key.expired(now):
                        self._to_cancel += use.revoke(f"the API key {use.key.prefix} has expired")
                await self._cancel_answers()
                if self._clock.monotonic() - stored >= _USED_S:
                    stored = self._clock.monotonic()
                    await asyncio.to_thread(self._store_used)  # a write to flash memory can take seconds
        finally:
            self._store_used()

    def _replace(self, keys: tuple[ApiKey, ...]) -> None:
        uses = {key.prefix: KeyUse(key) for key in keys}
        for prefix, use in self._uses.items():
            if prefix in uses and uses[prefix].key == use.key:
                uses[prefix] = use
                continue
            self._to_cancel += use.revoke(f"the API key {prefix} was revoked")
            self._telemetry.forget_api_key(prefix)
        self._uses = uses
        self._used = {prefix: at for prefix, at in self._used.items() if prefix in uses}

    async def _cancel_answers(self) -> None:
        answers, self._to_cancel = self._to_cancel, []
        for answer in answers:
            try:
                async with asyncio.timeout(_CANCEL_S):
                    await answer.cancel()
            except (MeshdError, TimeoutError) as error:
                log.warning("an answer of a revoked API key could not be cancelled: %s", error)

    def _store_used(self) -> None:
        used = dict(self._used)
        if self._file is None or used == self._used_stored:
            return
        try:
            self._file.store_last_used(used)
        except StorageError as error:
            log.warning("when API keys were used last is not stored: %s", error)
        self._used_stored = used
