"""Which plans keep to one numerics id, and when a plan over several is worth it.

A plan on one id gives the same tokens whatever its split, its batches and its recoveries, if the id promises that. So such a plan
is chosen although a mixed one is faster, unless that is clearly faster or nothing else fits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import Protocol, TypeVar

from meshd.numerics import NumericsId, is_promised
from meshd.planner.profile import PeerProfile
from meshd.planner.search.limits import SearchLimits

MIXING_GAIN = 0.25
"""A less exact plan is chosen only if its value is lower by at least this share. Predictions are off by up to a tenth, and people
hardly notice a gain below a quarter; a machine that is worth mixing for, such as one with a GPU, gains several times as much."""


class Exactness(IntEnum):
    """What a plan promises of its tokens, most first."""

    PROMISED = 0
    """One id, which promises that a token's bits do not depend on what is computed beside it."""
    ONE = 1
    """One id that makes no promise, or that is not known."""
    MIXED = 2
    """Several ids: a near-tie may be decided otherwise than on one device."""


class Valued(Protocol):
    """A plan found by a search. Lower values are better."""

    @property
    def value(self) -> float: ...

    @property
    def numerics(self) -> tuple[NumericsId, ...]: ...


Found = TypeVar("Found", bound=Valued)


def exactness(numerics: Iterable[NumericsId]) -> Exactness:
    """Say what a plan over peers with these ids promises."""
    ids = set(numerics)
    if len(ids) > 1:
        return Exactness.MIXED
    return Exactness.PROMISED if all(map(is_promised, ids)) else Exactness.ONE


def preferred(found: Iterable[Found]) -> Found | None:
    """Choose among plans: the most exact one, unless the value of a less exact one is lower by `MIXING_GAIN`. None: no plan."""
    chosen: Found | None = None
    for plan in sorted(found, key=lambda plan: (exactness(plan.numerics), plan.value)):
        if chosen is None or (
            exactness(plan.numerics) > exactness(chosen.numerics) and plan.value <= chosen.value * (1 - MIXING_GAIN)
        ):
            chosen = plan
    return chosen


def groups_of(peers: Sequence[PeerProfile]) -> list[tuple[int, ...]]:
    """Divide peers by their ids. Returns: the places of each group's peers, in order; nothing if all peers have the same id."""
    groups: dict[NumericsId, list[int]] = {}
    for place, peer in enumerate(peers):
        groups.setdefault(peer.numerics, []).append(place)
    return [tuple(places) for places in groups.values()] if len(groups) > 1 else []


def limits_within(limits: SearchLimits, group: Sequence[int]) -> SearchLimits | None:
    """Express limits in the places of a group. None: no chain within the group keeps them."""
    places = {place: index for index, place in enumerate(group)}
    if not limits.require <= places.keys():
        return None
    forbid = limits.forbid if limits.forbid is not None and limits.forbid <= places.keys() else None
    return replace(
        limits,
        require=frozenset(places[place] for place in limits.require),
        forbid=None if forbid is None else frozenset(places[place] for place in forbid),
    )


def in_use(peers: Iterable[PeerProfile]) -> frozenset[NumericsId]:
    """Return the ids with which a model is served now, or else those of its standby copies. Empty: nobody holds layers of it."""
    holders = [(peer.numerics, holding.standby) for peer in peers for holding in peer.usable_holdings]
    return frozenset(numerics for numerics, standby in holders if not standby) or frozenset(numerics for numerics, _ in holders)
