"""The planner's input, from a request and the adverts of live peers."""

import msgspec
import pytest

from in_process.adverts import CARD, advert, held
from meshd.agents.placement.plan_input import USUAL_CONTEXT, named_peers, plan_input_of, repair_input, with_peer_ids
from meshd.agents.service import MeshOptions
from meshd.errors import InvalidRequest, NoPeer
from meshd.planner.profile import profiles_from_adverts

MESH = [advert("a", held(0, 17)), advert("b", held(17, 30, standby=True)), advert("c")]


def test_standby_layers_are_left_out_on_request() -> None:
    def holders(standby: bool) -> list[str]:
        problem = plan_input_of(CARD, MESH, MeshOptions(), context=1024, standby=standby)
        return [profile.id for profile in problem.profiles if profile.holdings]

    assert holders(standby=True) == ["a", "b"]
    assert holders(standby=False) == ["a"]


def test_a_repair_uses_only_peers_that_are_allowed_and_not_avoided() -> None:
    assert repair_input(CARD, MESH, avoid=["b"]).peers == ("a", "c")
    assert repair_input(CARD, MESH, avoid=["b"], among=["b", "c"]).peers == ("c",)
    assert repair_input(CARD, MESH).context <= USUAL_CONTEXT


def test_named_peers_that_left_are_skipped_unless_all_have_left() -> None:
    profiles = profiles_from_adverts(MESH, CARD.id)
    assert named_peers(MeshOptions(), profiles) is None
    assert named_peers(MeshOptions(peers=("gone", "b")), profiles) == ("b",)
    with pytest.raises(NoPeer, match="not in the cluster now: gone"):
        named_peers(MeshOptions(peers=("gone",)), profiles)


def test_a_peer_that_takes_a_name_later_does_not_change_a_request() -> None:
    first = msgspec.structs.replace(advert("b-id"), name="b")
    twin = msgspec.structs.replace(advert("c"), name="b")
    known = with_peer_ids(MeshOptions(stages="b:0-30", peers=("b", "gone")), [first, advert("c")], CARD.id)
    assert known == MeshOptions(stages="b-id:0-30", peers=("b-id", "gone"))
    assert named_peers(known, profiles_from_adverts([first, twin], CARD.id)) == ("b-id",)
    with pytest.raises(InvalidRequest, match="'b' matches several peers"):
        with_peer_ids(MeshOptions(peers=("b",)), [first, twin], CARD.id)
    assert with_peer_ids(MeshOptions(), [advert("b")], CARD.id) == MeshOptions()
