"""Builds adverts of invented peers that hold layers of an invented model."""

from collections.abc import Sequence
from typing import Any

import msgspec

from in_process.clusters import make_card, make_holding
from meshd.agents.placement.replication import LoadRequest, apply_request
from meshd.numerics import UNKNOWN, NumericsId
from meshd.types import Advert, Capability, Holding, LinkStats, ModelCard, PeerId, Rates

CARD = make_card(30)
KV = 2048
FREE_MEMORY = 4 << 30
LINK = LinkStats(rtt_s=2e-4, bandwidth_bytes_s=1e8, hop_s=1e-4)


def advert(
    name: str,
    *holdings: Holding,
    memory: int = FREE_MEMORY,
    gb_s: float = 10.0,
    others: Sequence[str] = "abcde",
    roles: tuple[str, ...] = ("compute",),
    incarnation: int = 1,
    draining: bool = False,
    numerics: NumericsId = UNKNOWN,
) -> Advert:
    """Build the advert of a peer with these holdings, `memory` further bytes that are free, and links to `others`."""
    rates = Rates(
        decode_bytes_s=gb_s * 1e9,
        prefill_flops_s=gb_s * 1e10,
        memory_bytes_s=gb_s * 1e9,
        attention_bytes_s=gb_s * 1e9,
        disk_bytes_s=1e9,
        layer_overhead_s=2e-5,
    )
    return Advert(
        peer=PeerId(name),
        name=name,
        incarnation=incarnation,
        revision=1,
        version="",
        capability=Capability(
            backend="torch",
            numerics=numerics,
            processor="",
            threads=1,
            memory_total_bytes=2 * memory,
            memory_free_bytes=memory,
            rates=rates,
            roles=roles,
        ),
        holdings=holdings,
        models=(CARD,),
        links={PeerId(other): LINK for other in others if other != name},
        draining=draining,
    )


def held(start: int, end: int, **fields: Any) -> Holding:
    """Build the entry of an advert for layers that the peer holds. They are active unless `fields` say otherwise."""
    return msgspec.structs.replace(make_holding(start, end, kv_tokens=fields.pop("kv_tokens", KV)), **fields)


def once_loaded(adverts: Sequence[Advert], requests: Sequence[LoadRequest], cards: Sequence[ModelCard] = (CARD,)) -> list[Advert]:
    """Compute the adverts that the peers send once every request is met."""
    by_peer = {advert.peer: advert for advert in adverts}
    by_model = {card.id: card for card in cards}
    for request in requests:
        after = apply_request(by_peer[request.peer], request, by_model[request.model])
        ready = tuple(msgspec.structs.replace(each, state="active") for each in after.holdings)
        by_peer[request.peer] = msgspec.structs.replace(after, holdings=ready)
    return list(by_peer.values())
