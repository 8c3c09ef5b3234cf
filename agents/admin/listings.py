"""The listings of the cluster as this peer sees it. Rows are JSON-ready dicts; their keys are part of the API."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from meshd.agents.admin.plan_rows import PlanRows
from meshd.agents.membership.membership import Membership
from meshd.agents.observe.events import Listing
from meshd.agents.observe.rows import Key
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.session.answer import Answer
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.stage.host import StageHost
from meshd.types import Advert, ModelCard, ModelId

_AGES = ("first_seen_s", "last_seen_s", "since_s")
"""Keys of a peer's row that grow all the time, so that the row would never be the same as before."""


@dataclass(frozen=True, slots=True)
class Listings:
    """Makes the rows of `GET /mesh/v1/peers`, `links`, `models`, `plans` and `sessions`."""

    membership: Membership
    library: ModelLibrary
    coordinator: Coordinator
    stages: StageHost
    plan_rows: PlanRows

    async def by_key(self, wanted: Collection[Listing]) -> dict[Key, dict[str, Any]]:
        """Return all rows of some listings, each by its listing and its key there, without `_AGES`."""
        rows: dict[Key, dict[str, Any]] = {}
        if "peers" in wanted:
            for row in self.peers():
                known = {key: value for key, value in row.items() if key not in _AGES}
                rows["peers", row["id"] or ",".join(row["addresses"])] = known | {"clock_ahead_s": _whole(known["clock_ahead_s"])}
        if "links" in wanted:
            rows |= {("links", f"{row['source']} {row['target']}"): row for row in self.links()}
        if "models" in wanted:
            rows |= {("models", row["id"]): row for row in await self.models()}
        if "plans" in wanted:
            rows |= {("plans", row["session"]): row for row in self.plans()}
        if "sessions" in wanted:
            me = self.membership.description.peer
            rows |= {("sessions", f"{row['id']} {me} {row['role']}"): row for row in self.sessions()}
        return rows

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

    async def models(self) -> list[dict[str, Any]]:
        """List the models that live peers have on disk or in memory."""
        loaded = {model.card.id: model.loaded for model in await self.coordinator.models()}
        adverts = self.membership.adverts()
        return [_model_row(card, adverts, loaded.get(card.id)) for card in self.library.cards().values()]

    def plans(self) -> list[dict[str, Any]]:
        """List the plans of the answers that this peer coordinates now."""
        return self.plan_rows.of(list(self.coordinator.answers.values()))

    def sessions(self) -> list[dict[str, Any]]:
        """List the answers that this peer coordinates, and the stages that it runs for other coordinators."""
        cards = self.library.cards()

        def name_of(model: ModelId) -> str:
            return cards[model].name if model in cards else ""

        own = [self._session_row(answer, name_of) for answer in self.coordinator.answers.values()]
        return own + self.stages.rows(name_of)

    def _session_row(self, answer: Answer, name_of: Callable[[ModelId], str]) -> dict[str, Any]:
        return {
            "id": answer.session,
            "role": "coordinator",
            "model": name_of(answer.card.id),
            "state": answer.machine.state.value,
            "tokens": len(answer.machine.tokens),
            "prompt_tokens": answer.prompt_tokens,
            "ttft_s": answer.ttft_s or None,
            "epoch": answer.machine.epoch,
            "plan": answer.plan_header,
            "numerics": answer.numerics_header,
            "method": answer.recoveries[-1].method if answer.recoveries else "",
            "recoveries": [
                {
                    "epoch": each.epoch,
                    "method": each.method,
                    "reason": each.reason,
                    "pause_ms": 1000 * each.pause_s,
                    "other_numerics": each.other_numerics,
                }
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


def _whole(seconds: float | None) -> float | None:
    """Round to whole tens of seconds, so that the row does not change with every status."""
    return None if seconds is None else 10.0 * round(seconds / 10)


def _own_row(advert: Advert, address: str) -> dict[str, Any]:
    return {
        "id": advert.peer,
        "name": advert.name,
        "state": "alive",
        "reason": "",
        "trouble": "",
        "hint": "",
        "clock_ahead_s": 0.0,
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
        "trouble": row.pop("trouble"),
        "hint": row.pop("hint"),
        "addresses": list(dict.fromkeys(f"{known['host']}:{known['port']}".removesuffix(":0") for known in hosts)),
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
        "device": msgspec.to_builtins(advert.device),
    }
