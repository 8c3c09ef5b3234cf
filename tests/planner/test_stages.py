import msgspec
import pytest

from in_process.clusters import make_peer, make_problem
from meshd.errors import InvalidRequest, NoPeer
from meshd.planner.profile import PeerProfile
from meshd.planner.stages import check_cover, check_stages, parse_stages, resolve_peer, stages_text, with_ids
from meshd.types import LayerRange, PeerId, StagePlan

Peers = tuple[PeerProfile, ...]


@pytest.fixture
def peers() -> Peers:
    renamed = [("a", "k3xq" + "a" * 48), ("b", "k3zz" + "b" * 48), ("pi:4", "m" * 52)]
    return tuple(msgspec.structs.replace(make_peer(name), id=PeerId(peer)) for name, peer in renamed)


def test_peers_are_found_by_name_id_and_prefix_of_id(peers: Peers) -> None:
    stages = parse_stages("a:0-12, k3zz:12-20,pi:4:20-30", peers, 30)
    assert [stage.peer for stage in stages] == [peer.id for peer in peers]
    assert [str(stage.layers) for stage in stages] == ["0-12", "12-20", "20-30"]
    assert stages_text(stages, peers) == "a:0-12,b:12-20,pi:4:20-30"
    assert parse_stages(f"{peers[0].id}:0-30", peers, 30)[0].peer == peers[0].id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a:0-12,b:14-30", "gap at layers 12-14"),
        ("a:0-12,b:10-30", "overlap at layers 10-12"),
        ("a:0-12,b:12-29", "gap at layers 29-30"),
        ("a:2-30", "gap at layers 0-2"),
        ("a:0-12,b:12-31", "out of range"),
        ("a:0-12,a:12-30", "two stages"),
        ("a:0-12,b", "not a stage like"),
        ("", "not a stage like"),
        ("a:0-x", "not a layer range"),
        ("a:12-3", "not a layer range"),
        ("a:-3-12", "not a layer range"),
        (":0-30", "not a stage like"),
        ("k3:0-30", "several peers"),
    ],
)
def test_the_error_names_what_is_wrong(peers: Peers, text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse_stages(text, peers, 30)
    assert caught.value.param == "stages"


def test_the_error_for_an_unknown_peer_lists_the_known_ones(peers: Peers) -> None:
    with pytest.raises(NoPeer, match="the peers here are a, b, pi:4"):
        parse_stages("c:0-30", peers, 30)
    with pytest.raises(NoPeer, match="none"):
        resolve_peer("", ())


def test_an_id_distinguishes_two_peers_of_one_name(peers: Peers) -> None:
    twins = (peers[0], msgspec.structs.replace(peers[1], name="a"))
    with pytest.raises(InvalidRequest, match=r"a \(k3xqaaaa\), a \(k3zzbbbb\)"):
        resolve_peer("a", twins)
    assert resolve_peer("k3z", twins) == twins[1].id


def test_no_stages_leave_a_gap() -> None:
    with pytest.raises(InvalidRequest, match="gap at layers 0-4"):
        check_cover((), 4)


def test_stages_that_contradict_the_problem_are_refused() -> None:
    a, b, raw = make_peer("a"), make_peer("b"), make_peer("raw", decode_gb_s=0.0)
    stages = tuple(StagePlan(peer=p.id, layers=LayerRange(*cut)) for p, cut in ((a, (0, 10)), (b, (10, 30))))
    check_stages(stages, make_problem(a, b))
    with pytest.raises(NoPeer, match="not in the cluster"):
        check_stages(stages, make_problem(a))
    with pytest.raises(InvalidRequest, match="`peers` does not name"):
        check_stages(stages, make_problem(a, b, peers=(a.id,)))
    with pytest.raises(InvalidRequest, match="min_peers asks for 3"):
        check_stages(stages, make_problem(a, b, min_peers=3))
    with pytest.raises(NoPeer, match="not measured yet"):
        check_stages((StagePlan(peer=raw.id, layers=LayerRange(0, 30)),), make_problem(raw))


def test_a_peer_that_takes_the_name_or_the_id_of_another_is_not_mistaken_for_it(peers: Peers) -> None:
    twin = msgspec.structs.replace(peers[2], name="b")
    with pytest.raises(InvalidRequest, match=r"'b' matches several peers: b [(]k3zzbbbb[)], b [(]mmmmmmmm[)]"):
        parse_stages("b:0-30", (*peers[:2], twin), 30)
    posing = msgspec.structs.replace(peers[2], name=peers[1].id)
    assert resolve_peer(peers[1].id, (*peers[:2], posing)) == peers[1].id
    assert stages_text(parse_stages("a:0-12,k3zz:12-30", (*peers[:2], twin), 30), (*peers[:2], twin)) == "a:0-12,k3zzbbbb:12-30"


def test_names_in_a_list_of_stages_become_ids(peers: Peers) -> None:
    assert with_ids("a:0-12, k3zz:12-20,gone:20-30", peers) == f"{peers[0].id}:0-12,{peers[1].id}:12-20,gone:20-30"
    assert with_ids("b", peers) == "b"
    with pytest.raises(InvalidRequest, match="several peers"):
        with_ids("k3:0-30", peers)
