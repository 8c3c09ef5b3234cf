"""First plans of answers whose length nobody asked for: they take a share of the KV that is there, and end with `length`.

Without this, a request without `max_tokens` would need KV for the model's whole context, which few devices have for a model with a
long one, and which would leave nothing for other sessions.
"""

from collections.abc import Iterable

from meshd.agents.placement.plan_input import CONTEXTS_OF_KV
from meshd.agents.service import MeshOptions
from meshd.agents.session.plan.route import Router
from meshd.errors import DoesNotFit, NotReady, Overloaded
from meshd.planner.profile import USABLE_STATE
from meshd.types import Advert, ModelCard, Plan

LEAST_ANSWER = 256
"""Such an answer waits for KV rather than be limited to fewer tokens than this."""


async def plan_open_ended(
    router: Router, card: ModelCard, mesh: MeshOptions, *, prompt_tokens: int, max_tokens: int, least_tokens: int
) -> Plan:
    """Make a plan with KV for the prompt and for as many answer tokens as one session may take, at least `least_tokens`.

    That is the session's share of the KV of the layers that are placed, or what is free of it. Places the model first if layers are
    not resident.

    Raises: as `Router.plan_for`, but not because there is too little KV for `max_tokens`.
    """
    least = min(least_tokens, max_tokens)
    if placed_kv(router.adverts(), card)[0] < prompt_tokens + least:
        # Even for this small context the placement reserves KV for a usual one, if there is memory for it.
        await router.plan_for(card, mesh, prompt_tokens=prompt_tokens, max_tokens=least)
    total, free = placed_kv(router.adverts(), card)
    answer = max(least, min(max_tokens, max(LEAST_ANSWER, total // CONTEXTS_OF_KV), free - prompt_tokens))
    while answer > least:
        try:
            return router.route(card, mesh, prompt_tokens + answer, prompt_tokens)
        except (NotReady, DoesNotFit, Overloaded):
            answer = max(least, answer // 2)
    return await router.plan_for(card, mesh, prompt_tokens=prompt_tokens, max_tokens=least)


def placed_kv(adverts: Iterable[Advert], card: ModelCard) -> tuple[int, int]:
    """Returns: number of tokens for which every layer has KV on some live peer, in all and free; 0 while layers are missing."""
    total, free = [0] * card.spec.layers, [0] * card.spec.layers
    for holding in (holding for advert in adverts for holding in advert.holdings):
        if holding.model != card.id or holding.state != USABLE_STATE:
            continue
        for layer in holding.layers:
            total[layer] = max(total[layer], holding.kv_tokens_total)
            free[layer] = max(free[layer], holding.kv_tokens_free)
    return min(total), min(free)
