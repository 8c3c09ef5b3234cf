"""Plans for sessions that lost layers which no other peer has: they are loaded first."""

import asyncio

import pytest

from in_process.clusters import make_holding, make_peer
from in_process.placing import Cluster
from in_process.recoveries import CARD, NO_OPTIONS, fill_memory, ids, recover, recovery_request, text_of, three_peers
from meshd.agents.session.plan import route as routing
from meshd.agents.session.plan.resume import REPLAY
from meshd.errors import DoesNotFit, NoPeer, NotReady
from meshd.types import PeerId


async def test_only_the_missing_layers_are_loaded() -> None:
    cluster = three_peers(make_peer("d"))
    fill_memory(cluster, "a", "c")
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert [(peer, str(place.layers), place.kv_tokens, place.standby) for peer, place in cluster.asked] == [
        ("d-id", "10-20", 4096, False)
    ]


async def test_layers_with_too_little_kv_for_the_context_are_loaded_again() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, kv_tokens=256, standby=True),)))
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert [str(place.layers) for _, place in cluster.asked] == ["10-20"]
    assert found.method == REPLAY


async def test_loading_takes_less_kv_where_memory_is_short() -> None:
    cluster = three_peers(make_peer("d", memory=120 << 20))
    fill_memory(cluster, "a", "c")
    await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert [place.kv_tokens for _, place in cluster.asked] == [1024]


async def test_when_the_layers_fit_nowhere_the_error_names_them_and_the_missing_memory() -> None:
    cluster = three_peers(make_peer("d", memory=25 << 20))
    fill_memory(cluster, "a", "c")
    lost = cluster.lose("b")
    missing = r"layers 10-20 of tiny fit nowhere: they need [\d.]+ MiB .* on d, .* \(lost: b\)"
    with pytest.raises(DoesNotFit, match=missing) as caught:
        await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", lost))
    assert 10 << 20 < caught.value.missing_bytes < 200 << 20
    assert caught.value.hint
    assert not cluster.asked


async def test_a_peer_that_cannot_load_is_replaced_by_another() -> None:
    cluster = three_peers(make_peer("d", decode_gb_s=100.0), make_peer("e", decode_gb_s=50.0))
    cluster.refusing[PeerId("d-id")] = "out_of_memory"
    found = await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert text_of(found.plan) == "a:0-10,e:10-20,c:20-30"
    assert [peer for peer, _ in cluster.asked] == ["d-id", "e-id"]


async def test_when_no_peer_can_load_the_error_says_so() -> None:
    cluster = three_peers()
    cluster.refusing = dict.fromkeys(ids("a", "c"), "download_failed")
    with pytest.raises(NoPeer, match="no live peer can take layers") as caught:
        await recover(cluster, recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b")))
    assert "lost: b" in caught.value.message
    assert len(cluster.asked) == 2


async def test_requests_share_a_slow_load_and_report_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_REQUEST_WAIT_S", 0.2)
    cluster = three_peers(make_peer("d", decode_gb_s=100.0))
    cluster.load_s = 0.8
    lost = cluster.lose("b")
    request = recovery_request("a:0-10,b:10-20,c:20-30", lost)
    tries = await asyncio.gather(*(cluster.router.recover(CARD, NO_OPTIONS, request) for _ in range(3)), return_exceptions=True)
    for error in tries:
        assert isinstance(error, NotReady)
        assert error.progress == 0.5
        assert "layers 10-20 of tiny are being loaded" in error.message
    assert len(cluster.asked) == 1
    monkeypatch.setattr(routing, "_REQUEST_WAIT_S", 5.0)
    found = await recover(cluster, request)
    assert text_of(found.plan) == "a:0-10,d:10-20,c:20-30"
    assert len(cluster.asked) == 1
    await cluster.router.close()


async def test_a_slow_load_is_not_waited_for_when_the_lost_peer_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_LOOK_AGAIN_S", 0.02)
    cluster = three_peers(make_peer("d", decode_gb_s=100.0))
    cluster.load_s = 30.0
    before = dict(cluster.adverts)
    request = recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b"))
    task = asyncio.ensure_future(recover(cluster, request))
    await asyncio.sleep(0.1)
    assert len(cluster.asked) == 1
    assert not task.done()
    cluster.adverts.update(before)
    assert text_of((await asyncio.wait_for(task, 5.0)).plan) == "a:0-10,b:10-20,c:20-30"
    await cluster.router.close()


async def test_a_load_that_another_peer_started_is_waited_for() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, state="loading"),)), make_peer("e", decode_gb_s=100.0))
    request = recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b"))
    task = asyncio.ensure_future(recover(cluster, request))
    await asyncio.sleep(0.1)
    assert not task.done()
    cluster.change("d", holdings=(make_holding(10, 20),))
    assert text_of((await task).plan) == "a:0-10,d:10-20,c:20-30"
    assert not cluster.asked


async def test_a_load_that_another_peer_started_and_that_failed_is_retried_by_the_next_request() -> None:
    cluster = three_peers(make_peer("d", holdings=(make_holding(10, 20, state="loading"),)))
    request = recovery_request("a:0-10,b:10-20,c:20-30", cluster.lose("b"))
    task = asyncio.ensure_future(recover(cluster, request))
    await asyncio.sleep(0.05)
    cluster.change("d", holdings=())
    with pytest.raises(NotReady, match="layers 10-20 of tiny are not loaded on any live peer"):
        await task
    await recover(cluster, request)
    assert [str(place.layers) for _, place in cluster.asked] == ["10-20"]


async def test_a_model_whose_peers_are_all_lost_replaces_idle_layers() -> None:
    old = make_holding(0, 20, kv_tokens=128)
    cluster = Cluster(make_peer("a", memory=150 << 20, holdings=(old,)))
    found = await recover(cluster, recovery_request("b:0-30", ids("b"), prompt_tokens=100, max_tokens=156, known=120))
    assert text_of(found.plan) == "a:0-30"
    assert [str(place.layers) for _, place in cluster.asked] == ["0-30"]
