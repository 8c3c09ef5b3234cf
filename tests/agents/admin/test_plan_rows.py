"""A plan's row has a prediction for each stage and each hop, as of the moment at which it was listed first."""

from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from in_process.adverts import CARD, advert
from meshd.agents.admin.plan_rows import PlanRows
from meshd.types import Advert, LayerRange, LinkStats, PeerId, Plan, PlanId, SessionId, StagePlan

A, B = PeerId("a"), PeerId("b")


def linked(peer: PeerId, other: PeerId) -> Advert:
    return msgspec.structs.replace(advert(peer), links={other: LinkStats(rtt_s=0.002, hop_s=0.001, bandwidth_bytes_s=1e8)})


def answer(epoch: int = 1) -> Any:
    plan = Plan(
        id=PlanId("p"),
        model=CARD.id,
        stages=(StagePlan(peer=A, layers=LayerRange(0, 10)), StagePlan(peer=B, layers=LayerRange(10, CARD.spec.layers))),
        prefill_chunk_tokens=64,
        context=128,
        predicted_tpot_s=0.05,
    )
    return SimpleNamespace(
        session=SessionId("s"),
        card=CARD,
        plan=plan,
        plan_header="a:0-10,b:10-30",
        numerics_header="",
        machine=SimpleNamespace(epoch=epoch),
        prompt_tokens=7,
        ttft_s=0.0,
        measured_tpot_s=0.0,
    )


@pytest.fixture
def adverts() -> list[Advert]:
    return [linked(A, B), linked(B, A)]


@pytest.fixture
def rows(adverts: list[Advert]) -> PlanRows:
    return PlanRows(lambda: adverts, lambda peer: f"name of {peer}")


def test_stages_and_hops_are_predicted(rows: PlanRows) -> None:
    (row,) = rows.of([answer()])
    assert [(stage["name"], stage["layers"]) for stage in row["stages"]] == [("name of a", "0-10"), ("name of b", "10-30")]
    assert all(stage["predicted_s"] > 0 for stage in row["stages"])
    there, back = row["hops"]
    assert (there["source_name"], there["target_name"], there["link"]) == ("name of a", "name of b", "measured")
    assert there["bytes_per_token"] == CARD.hidden_bytes_per_token()
    assert there["predicted_s"] == pytest.approx(0.001 + there["bytes_per_token"] / 1e8, rel=0.01)
    assert (back["source"], back["target"]) == (B, A)
    assert row["measured_ttft_s"] is None
    msgspec.json.encode(row)


def test_a_prediction_stays_until_the_plan_changes(rows: PlanRows, adverts: list[Advert]) -> None:
    (before,) = rows.of([answer()])
    adverts[:] = [msgspec.structs.replace(advert(A), links={}), msgspec.structs.replace(advert(B), links={})]
    assert rows.of([answer()]) == [before]
    (after,) = rows.of([answer(epoch=2)])
    assert after["hops"][0]["link"] == "not measured"
    assert rows.of([]) == []
    assert rows._estimates == {}


def test_a_plan_with_a_peer_that_has_left_has_hops_without_predictions(rows: PlanRows, adverts: list[Advert]) -> None:
    del adverts[1]
    (row,) = rows.of([cast("Any", answer())])
    assert [stage["predicted_s"] for stage in row["stages"]] == [None, None]
    assert [(hop["source"], hop["target"], hop["predicted_s"]) for hop in row["hops"]] == [(A, B, None), (B, A, None)]
