"""A cluster with fixed answers, for tests of the HTTP API alone."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from meshd.agents.cluster_service import (
    CheckResult,
    CheckStatus,
    CheckStep,
    DoctorRequest,
    EventLine,
    InviteStep,
    PlacementStep,
    PlaceRequest,
    PlanRequest,
)
from meshd.errors import DownloadError, InvalidRequest, NoPeer, Overloaded, PeerLost, UnknownModel, UnknownSession
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.types import LayerRange, PeerId

SESSION = "5e" * 16
"""The session that `WordsMesh` runs."""


class WordsMesh:
    """A cluster of one peer whose answers are fixed."""

    invite_open = False

    def identity(self) -> dict[str, Any]:
        return {"id": "p" * 52, "name": "here", "notices": []}

    def peers(self) -> list[dict[str, Any]]:
        return [{"id": "p" * 52, "name": "here", "state": "alive"}]

    def links(self) -> list[dict[str, Any]]:
        return []

    async def known_models(self) -> list[dict[str, Any]]:
        return [{"name": "words"}]

    def plans(self) -> list[dict[str, Any]]:
        return []

    def sessions(self) -> list[dict[str, Any]]:
        return []

    async def events(self, after: int | None) -> AsyncIterator[EventLine]:
        if after is None:
            yield EventLine(None, "row", b'{"type":"row","list":"models","key":"words","row":{"name":"words"}}')
        for number in range(0 if after is None else after + 1, 3):
            yield EventLine(number, "peer", b'{"type":"peer","state":"alive"}')
        await asyncio.Event().wait()

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        if request.model != "words":
            raise UnknownModel(f"no model {request.model!r}")
        return {"model": request.model, "objective": request.objective, "stages": []}

    async def place(self, request: PlaceRequest) -> AsyncIterator[PlacementStep]:
        if request.model == "missing":
            raise UnknownModel("no model 'missing'")
        if request.model == "stalls":
            await asyncio.Event().wait()
        layers = LayerRange(0, 2)
        yield PlacementStep(peer=PeerId("p" * 52), name="here", layers=layers, state="loading", progress=0.5)
        if request.model == "breaks":
            raise PeerLost("peer there is lost")
        yield PlacementStep(peer=PeerId("p" * 52), name="here", layers=layers, state="active", progress=1.0)

    async def unplace(self, model: str) -> int:
        return 1024

    async def pull(self, model: str) -> AsyncIterator[PullProgress]:
        if model == "missing":
            raise UnknownModel("no model 'missing'")
        yield PullProgress(model=model, source="here", phase=PullPhase.DOWNLOADING, done_bytes=512, total_bytes=1024)
        if model == "breaks":
            raise DownloadError("the source is gone")
        yield PullProgress(model=model, source="here", phase=PullPhase.DONE, done_bytes=1024, total_bytes=1024)

    async def remove_model(self, model: str) -> int:
        if model != "hf:org/words":
            raise UnknownModel(f"no model {model!r}")
        return 1024

    async def drain(self, peer: str, *, undo: bool = False, timeout_s: float = 60.0) -> dict[str, Any]:
        if peer != "there":
            raise NoPeer(f"no peer is called {peer!r}", hint="see `meshd status`")
        return {"peer": "q" * 52, "name": "there", "sessions_left": 0 if undo or timeout_s > 1 else 2}

    async def migrate(self, session: str, target: str, source: str | None = None) -> dict[str, Any]:
        if session != SESSION:
            raise UnknownSession(f"no live peer runs or keeps session {session}")
        if source == target:
            raise InvalidRequest("it is there already", param="source")
        return {"session": session, "plan": f"{source or 'here'}:0-1,{target}:1-2", "pause_ms": 1.5}

    async def cancel(self, session: str) -> str:
        if session != "0" * 32:
            raise UnknownSession(f"nobody knows session {session}")
        return session

    async def story(self, session: str) -> list[dict[str, Any]]:
        if session != SESSION:
            raise UnknownSession(f"no live peer knows session {session}")
        return [{"at_s": 0.0, "peer": "p" * 52, "name": "here", "what": "planned", "epoch": 1}]

    async def trace(self, session: str) -> bytes:
        if session != SESSION:
            raise UnknownSession(f"no live peer has a trace of session {session}")
        return b'{"traceEvents": [], "displayTimeUnit": "ms"}'

    def reload(self) -> dict[str, Any]:
        return {"applied": ["log-level"], "needs_restart": ["threads"]}

    async def probe_links(self) -> list[dict[str, Any]]:
        return [{"peer": "q" * 52, "rtt_s": 0.001}]

    async def invite(self, minutes: float) -> AsyncIterator[InviteStep]:
        step = InviteStep(state="waiting", number=7, left_s=60 * minutes, tries_left=3)
        self.invite_open = True
        try:
            yield msgspec.structs.replace(step, code="7-amber-lion")
            if minutes == 5:
                yield msgspec.structs.replace(step, state="joined", joined="there")
                return
            await asyncio.Event().wait()
        finally:
            self.invite_open = False

    def invites(self) -> list[InviteStep]:
        return [InviteStep(state="waiting", number=7, left_s=1.0, tries_left=3)] if self.invite_open else []

    def close_invite(self) -> bool:
        return self.invite_open

    async def doctor(self, request: DoctorRequest) -> AsyncIterator[CheckStep]:
        if request.model == "busy":
            raise Overloaded("another `meshd doctor` runs on this daemon", retry_after_s=10.0)
        fault = CheckResult(check="firewall", status=CheckStatus.WRONG, found="closed", mend="sudo ufw allow 6375/tcp")
        yield CheckStep(check="firewall", done=1, total=2, results=(fault,))
        yield CheckStep(check="swap", done=2, total=2, results=(CheckResult(check="swap", status=CheckStatus.OK, found="no swap"),))

    def cluster_key(self) -> dict[str, Any]:
        return {"generation": 1, "peers": []}

    async def rotate(self, chain: bytes, secret: bytes) -> dict[str, Any]:
        if chain != b"chain":
            raise InvalidRequest("the rotation is refused", param="rotation")
        return {"generation": 2, "peers": [], "key": secret.hex()}

    async def give_owner_key(self, peer: str, seed: bytes) -> dict[str, Any]:
        if peer != "b":
            raise NoPeer(f"no peer is called {peer}")
        return {"peer": "b" * 52, "name": "b"}
