"""The cluster as this peer sees it, and the operations on it. Rows are JSON-ready dicts; their keys are part of the API."""

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from meshd.agents.admin.story_collector import StoryCollector
from meshd.agents.membership.membership import Membership
from meshd.agents.observe.events import EventBus
from meshd.agents.placement.client import PlacementClient
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.plan_input import plan_input_of
from meshd.agents.service import AnswerSecret, MeshOptions, PlacementStep, PlaceRequest, PlanRequest
from meshd.agents.session.answer import Answer, header_of
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.keys import session_of
from meshd.agents.session.plan.drain import Drainer
from meshd.agents.session.plan.route import Router
from meshd.agents.stage.host import StageHost
from meshd.errors import InvalidRequest, UnknownModel, UnknownSession
from meshd.models.store.store import ModelPreview
from meshd.planner.explain.explain import explain
from meshd.planner.explain.whatif import with_what_if
from meshd.planner.profile import profiles_from_adverts
from meshd.planner.search.solve import solve
from meshd.planner.stages import resolve_peer
from meshd.planner.units import show_bytes
from meshd.types import Advert, ModelCard, ModelId, PeerId, SessionId

_PROBE_CONTEXT = 4096
"""Context in tokens that `meshd plan` assumes without `--context`, unless the model's own context is shorter."""
_WHOLE_ID = re.compile(r"(.*[-_])?([0-9a-f]{32})")
"""A session's id, or an answer's id: a prefix and the secret from which the session's id follows."""
_SHOWN_MATCHES = 3
"""How many sessions the error for an ambiguous beginning of an id lists."""


@dataclass(slots=True)
class ClusterView:
    """Implements `service.ClusterService`."""

    membership: Membership
    library: ModelLibrary
    router: Router
    placer: PlacementClient
    coordinator: Coordinator
    stages: StageHost
    drainer: Drainer
    story_collector: StoryCollector
    bus: EventBus
    about: Callable[[], dict[str, Any]]
    """Returns this peer's row for `identity`."""

    def identity(self) -> dict[str, Any]:
        """See `service.ClusterService.identity`."""
        return self.about()

    def peers(self) -> list[dict[str, Any]]:
        """List this peer, then the others in the order of the peer table."""
        return [_own_row(self.membership.own_advert(), self.membership.link_address), *map(_peer_row, self.membership.rows())]

    def links(self) -> list[dict[str, Any]]:
        """List the links that live peers have measured, one row for each direction."""
        return [
            {
                "source": advert.peer,
                "target": target,
                "source_name": advert.name,
                "target_name": self.membership.name_of(target),
                **msgspec.to_builtins(stats),
            }
            for advert in self.membership.adverts()
            for target, stats in advert.links.items()
        ]

    async def known_models(self) -> list[dict[str, Any]]:
        """List the models that live peers have on disk or in memory."""
        loaded = {model.card.id: model.loaded for model in await self.coordinator.models()}
        adverts = self.membership.adverts()
        return [_model_row(card, adverts, loaded.get(card.id)) for card in self.library.cards().values()]

    def plans(self) -> list[dict[str, Any]]:
        """List the plans of the answers that this peer coordinates now."""
        return [
            {
                "id": answer.plan.id,
                "session": answer.session,
                "model": answer.plan.model,
                "epoch": answer.machine.epoch,
                "plan": answer.plan_header,
                "stages": [
                    {"peer": stage.peer, "name": self.membership.name_of(stage.peer), "layers": str(stage.layers)}
                    for stage in answer.plan.stages
                ],
                "context": answer.plan.context,
                "predicted_ttft_s": answer.plan.predicted_ttft_s,
                "predicted_tpot_s": answer.plan.predicted_tpot_s,
                "measured_tpot_s": answer.measured_tpot_s,
            }
            for answer in self.coordinator.answers.values()
            if answer.plan is not None
        ]

    def sessions(self) -> list[dict[str, Any]]:
        """List the answers that this peer coordinates, and the stages that it runs for other coordinators."""
        cards = self.library.cards()

        def name_of(model: ModelId) -> str:
            return cards[model].name if model in cards else ""

        own = [self._session_row(answer, name_of) for answer in self.coordinator.answers.values()]
        return own + self.stages.rows(name_of)

    def events(self) -> AsyncIterator[dict[str, Any]]:
        """See `service.ClusterService.events`."""
        return self.bus.subscribe()

    async def plan(self, request: PlanRequest) -> dict[str, Any]:
        """See `service.ClusterService.plan`."""
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
        """See `service.ClusterService.place`."""
        card = await self._card(request.model)
        mesh = MeshOptions(stages=request.stages, min_peers=request.min_peers, objective=request.objective)
        async for step in self.placer.place(card, mesh, context=request.context):
            yield step

    async def unplace(self, model: str) -> int:
        """See `service.ClusterService.unplace`."""
        return await self.placer.unplace((await self.library.known(model)).id)

    async def drain(self, peer: str, *, undo: bool = False, timeout_s: float = 60.0) -> dict[str, Any]:
        """See `service.ClusterService.drain`."""
        target = self._peer(peer, "peer")
        left = await self.drainer.drain(target, undo, timeout_s)
        return {"peer": target, "name": self.membership.name_of(target), "sessions_left": left}

    async def migrate(self, session: str, target: str, source: str | None = None) -> dict[str, Any]:
        """See `service.ClusterService.migrate`."""
        known, to = self._session(session), self._peer(target, "target")
        moved = await self.coordinator.move(known, to, self._peer(source, "source") if source is not None else None)
        return {"session": known, "plan": header_of(moved.plan, self.membership.name_of), "pause_ms": 1000 * moved.pause_s}

    async def story(self, session: str) -> list[dict[str, Any]]:
        """See `service.ClusterService.story`."""
        return await self.story_collector.collect(self._session(session))

    async def probe_links(self) -> list[dict[str, Any]]:
        """See `service.ClusterService.probe_links`."""
        await self.membership.probe_links()
        return self.links()

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
            return await self.library.pull(model, lambda share: None)

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

    def _session_row(self, answer: Answer, name_of: Callable[[ModelId], str]) -> dict[str, Any]:
        return {
            "id": answer.session,
            "role": "coordinator",
            "model": name_of(answer.card.id),
            "state": answer.machine.state.value,
            "tokens": len(answer.machine.tokens),
            "prompt_tokens": answer.prompt_tokens,
            "epoch": answer.machine.epoch,
            "plan": answer.plan_header,
            "method": answer.recoveries[-1].method if answer.recoveries else "",
            "recoveries": [
                {"epoch": each.epoch, "method": each.method, "reason": each.reason, "pause_ms": 1000 * each.pause_s}
                for each in answer.recoveries
            ],
            "mirrors": [
                {"stage": stage, "peer": peer, "name": self.membership.name_of(peer), "held": held}
                for stage, (peer, held) in answer.mirrors.items()
            ],
            "deputies": self.coordinator.journal.deputies_of(answer.session),
        }


def _model_row(card: ModelCard, adverts: list[Advert], loaded: bool | None) -> dict[str, Any]:
    """Make a model's row. `loaded`: as in `AvailableModel`; None if no request would be answered with it."""
    return {
        "id": card.id,
        "name": card.name,
        "ref": card.ref,
        "quantisation": card.quantisation,
        "layers": card.spec.layers,
        "context_length": card.spec.context_length,
        "bytes": card.weight_bytes,
        "answers": loaded is not None,
        "loaded": bool(loaded),
        "on_disk": [advert.name for advert in adverts if any(known.id == card.id for known in advert.models)],
        "holdings": [
            {"peer": advert.peer, "name": advert.name, **msgspec.to_builtins(holding), "layers": str(holding.layers)}
            for advert in adverts
            for holding in advert.holdings
            if holding.model == card.id
        ],
    }


def _own_row(advert: Advert, address: str) -> dict[str, Any]:
    return {
        "id": advert.peer,
        "name": advert.name,
        "state": "alive",
        "reason": "",
        "addresses": [address],
        "sources": ["self"],
        "version": advert.version,
        "incarnation": advert.incarnation,
        **_advertised(advert),
    }


def _peer_row(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of the peer table to the public keys."""
    hosts = row.pop("addresses")
    public = {
        "id": row.pop("peer"),
        "name": row.pop("name"),
        "state": row.pop("state"),
        "reason": row.pop("why"),
        "addresses": list(dict.fromkeys(f"{known['host']}:{known['port']}" for known in hosts)),
        "sources": list(dict.fromkeys(known["source"] for known in hosts)),
    }
    for holding in row["holdings"]:
        holding["layers"] = "-".join(map(str, holding["layers"]))
    return public | row


def _advertised(advert: Advert) -> dict[str, Any]:
    holdings = [msgspec.to_builtins(holding) | {"layers": str(holding.layers)} for holding in advert.holdings]
    return {
        "capability": msgspec.to_builtins(advert.capability),
        "holdings": holdings,
        "models": [card.name for card in advert.models],
        "sessions": advert.sessions,
        "api": advert.api,
        "draining": advert.draining,
    }
