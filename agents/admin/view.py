"""The cluster as this peer sees it, and the operations on it. Rows are JSON-ready dicts; their keys are part of the API."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from meshd.agents.admin.event_relay import EventRelay
from meshd.agents.admin.listings import Listings
from meshd.agents.admin.model_files import ModelFiles
from meshd.agents.admin.story_collector import StoryCollector
from meshd.agents.admin.trace_collector import TraceCollector
from meshd.agents.cluster_service import CheckStep, DoctorRequest, EventLine, InviteStep, PlacementStep, PlaceRequest, PlanRequest
from meshd.agents.links.pairing.inviter import Inviter
from meshd.agents.membership.membership import Membership
from meshd.agents.observe.rows import RowFeed
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.plan_input import plan_input_of
from meshd.agents.service import AnswerSecret, MeshOptions
from meshd.agents.session.answer import header_of
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.keys import session_of
from meshd.agents.session.plan.drain import Drainer
from meshd.agents.session.plan.route import Router
from meshd.agents.stage.host import StageHost
from meshd.agents.trust.exchange import TrustExchange
from meshd.errors import InvalidRequest, UnknownModel, UnknownSession
from meshd.models.store.progress import PullProgress
from meshd.models.store.store import ModelPreview
from meshd.planner.explain.explain import explain
from meshd.planner.explain.whatif import with_what_if
from meshd.planner.profile import profiles_from_adverts
from meshd.planner.search.solve import solve
from meshd.planner.stages import resolve_peer
from meshd.planner.units import show_bytes
from meshd.types import ModelCard, ModelId, PeerId, SessionId

_PROBE_CONTEXT = 4096
"""Context in tokens that `meshd plan` assumes without `--context`, unless the model's own context is shorter."""
_WHOLE_ID = re.compile(r"(.*[-_])?([0-9a-f]{32})")
"""A session's id, or an answer's id: a prefix and the secret from which the session's id follows."""
_SHOWN_MATCHES = 3
"""How many sessions the error for an ambiguous beginning of an id lists."""


@dataclass(slots=True)
class ClusterView:
    """Implements `cluster_service.ClusterService`."""

    membership: Membership
    library: ModelLibrary
    router: Router
    placer: PlacementClient
    coordinator: Coordinator
    stages: StageHost
    drainer: Drainer
    story_collector: StoryCollector
    trace_collector: TraceCollector
    stream: EventStream
    listings: Listings
    rows: RowFeed
    relay: EventRelay
    inviter: Inviter
    reload_settings: Callable[[], dict[str, Any]]
    exchange: TrustExchange
    files: ModelFiles
    about: Callable[[], dict[str, Any]]
    """Returns this peer's row for `identity`."""
    checks: Callable[[DoctorRequest], AsyncGenerator[CheckStep, None]]
    """Runs the checks of `doctor`."""

    def identity(self) -> dict[str, Any]:
        """See `cluster_service.ClusterService.identity`."""
        return self.about()

    def peers(self) -> list[dict[str, Any]]:
        """See `Listings.peers`."""
        return self.listings.peers()

    def links(self) -> list[dict[str, Any]]:
        """See `Listings.links`."""
        return self.listings.links()

    async def known_models(self) -> list[dict[str, Any]]:
        """See `Listings.models`."""
        return await self.listings.models()

    def plans(self) -> list[dict[str, Any]]:
        """See `Listings.plans`."""
        return self.listings.plans()

    def sessions(self) -> list[dict[str, Any]]:
        """See `Listings.sessions`."""
        return self.listings.sessions()

    async def events(self, after: int | None) -> AsyncIterator[EventLine]:
        """See `cluster_service.ClusterService.events`."""
        if after is None:
            await self.rows.refresh()
            after = self.stream.last
            for line in self._rows_of_all():
                yield EventLine(None, "row", line)
        async with aclosing(self.stream.read(after)) as published:
            async for event in published:
                yield EventLine(event.number, event.kind, event.line)
                if event.kind == "lost":
                    for line in self._rows_of_all():
                        yield EventLine(None, "row", line)

    def _rows_of_all(self) -> list[bytes]:
        return [*self.rows.whole(), *self.relay.whole()]

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        """See `cluster_service.ClusterService.plan`."""
        card, preview = await self._card_or_preview(request.model)
        mesh = msgspec.structs.replace(request.mesh, objective=request.mesh.objective or request.objective)
        context = request.context or mesh.context or min(card.spec.context_length, _PROBE_CONTEXT)
        problem = plan_input_of(card, self.membership.adverts(), mesh, context=context)
        profiles, network = with_what_if(request.what_if, problem.profiles, problem.network)
        problem = msgspec.structs.replace(problem, profiles=profiles, network=network)
        explained = explain(problem, solve(problem))
        if preview is not None:
            explained["text"] += [f"to place it, {show_bytes(preview.fetch_bytes)} are fetched from {preview.source} first"]
        return explained | {"fetch": {"bytes": preview.fetch_bytes, "source": preview.source} if preview else None}

    async def place(self, request: PlaceRequest) -> AsyncIterator[PlacementStep]:
        """See `cluster_service.ClusterService.place`."""
        card = await self._card(request.model)
        mesh = MeshOptions(stages=request.stages, min_peers=request.min_peers, objective=request.objective)
        async for step in self.placer.place(card, mesh, context=request.context):
            yield step

    async def unplace(self, model: str) -> int:
        """See `cluster_service.ClusterService.unplace`."""
        return await self.placer.unplace((await self.library.known(model)).id)

    def pull(self, model: str) -> AsyncIterator[PullProgress]:
        """See `cluster_service.ClusterService.pull`."""
        return self.files.pull(model)

    async def remove_model(self, model: str) -> int:
        """See `cluster_service.ClusterService.remove_model`."""
        return await self.files.remove(model)

    async def drain(self, peer: str, *, undo: bool = False, timeout_s: float = 60.0) -> dict[str, Any]:
        """See `cluster_service.ClusterService.drain`."""
        target = self._peer(peer, "peer")
        left = await self.drainer.drain(target, undo, timeout_s)
        return {"peer": target, "name": self.membership.name_of(target), "sessions_left": left}

    async def migrate(self, session: str, target: str, source: str | None = None) -> dict[str, Any]:
        """See `cluster_service.ClusterService.migrate`."""
        known, to = self._session(session), self._peer(target, "target")
        moved = await self.coordinator.move(known, to, self._peer(source, "source") if source is not None else None)
        return {"session": known, "plan": header_of(moved.plan, self.membership.name_of), "pause_ms": 1000 * moved.pause_s}

    async def cancel(self, session: str) -> str:
        """See `cluster_service.ClusterService.cancel`."""
        known = self._session(session)
        await self.coordinator.end(known)
        return known

    async def story(self, session: str) -> list[dict[str, Any]]:
        """See `cluster_service.ClusterService.story`."""
        return await self.story_collector.collect(self._session(session))

    async def trace(self, session: str) -> bytes:
        """See `cluster_service.ClusterService.trace`."""
        return await self.trace_collector.collect(self._session(session))

    def reload(self) -> dict[str, Any]:
        """See `cluster_service.ClusterService.reload`."""
        return self.reload_settings()

    async def probe_links(self) -> list[dict[str, Any]]:
        """See `cluster_service.ClusterService.probe_links`."""
        await self.membership.probe_links()
        return self.links()

    async def invite(self, minutes: float) -> AsyncIterator[InviteStep]:
        """See `cluster_service.ClusterService.invite`."""
        async with aclosing(self.inviter.invite(minutes)) as steps:
            async for step in steps:
                yield step

    def invites(self) -> list[InviteStep]:
        """See `cluster_service.ClusterService.invites`."""
        row = self.inviter.row()
        return [row] if row is not None else []

    def close_invite(self) -> bool:
        """See `cluster_service.ClusterService.close_invite`."""
        return self.inviter.close()

    async def doctor(self, request: DoctorRequest) -> AsyncIterator[CheckStep]:
        """See `cluster_service.ClusterService.doctor`."""
        async with aclosing(self.checks(request)) as steps:
            async for step in steps:
                yield step

    def cluster_key(self) -> dict[str, Any]:
        """See `cluster_service.ClusterService.cluster_key`."""
        return self.exchange.describe()

    async def rotate(self, chain: bytes, secret: bytes) -> dict[str, Any]:
        """See `cluster_service.ClusterService.rotate`."""
        await self.exchange.trust.order(chain, secret)
        return self.exchange.describe()

    async def give_owner_key(self, peer: str, seed: bytes) -> dict[str, Any]:
        """See `cluster_service.ClusterService.give_owner_key`."""
        target = self._peer(peer, "peer")
        await self.exchange.give_owner_key(target, seed)
        return {"peer": target, "name": self.membership.name_of(target)}

    async def _card_or_preview(self, model: str) -> tuple[ModelCard, ModelPreview | None]:
        """Find the card of a model. That of a model that no live peer has is read from its source, without the weights."""
        try:
            return await self.library.known(model), None
        except UnknownModel:
            preview = await self.library.look(model)
            return preview.card, preview

    async def _card(self, model: str) -> ModelCard:
        """Find the card of a model. A model that no live peer has is downloaded first."""
        try:
            return await self.library.known(model)
        except UnknownModel:
            return await self.library.pull(model)

    def _peer(self, text: str, param: str) -> PeerId:
        """Find a peer by its name or the beginning of its id. `param`: the field that an error names.

        Raises: NoPeer, InvalidRequest.
        """
        return resolve_peer(text, profiles_from_adverts(self.membership.adverts(), ModelId("")), param=param)

    def _session(self, text: str) -> SessionId:
        """Find a session by its whole id, or by the beginning of the id if this peer knows the session.

        Raises: UnknownSession, InvalidRequest.
        """
        if whole := _WHOLE_ID.fullmatch(text):
            return session_of(AnswerSecret(whole[2])) if whole[1] else SessionId(whole[2])
        here = {*self.coordinator.answers, *self.coordinator.retained, *(row["id"] for row in self.stages.rows(str))}
        matches = sorted(session for session in here if text and session.startswith(text))
        if not matches:
            raise UnknownSession(f"no session here has an id that begins with {text!r}", hint="write the whole id")
        if len(matches) > 1:
            first = ", ".join(matches[:_SHOWN_MATCHES]) + (", ..." if len(matches) > _SHOWN_MATCHES else "")
            raise InvalidRequest(f"{text!r} matches {len(matches)} sessions: {first}", param="session", hint="write more of the id")
        return SessionId(matches[0])
