"""The history of holdings: which layers are lost, and which models are unplaced."""

from in_process.adverts import KV, advert, held
from in_process.clusters import MODEL
from meshd.agents.placement.history import HoldingHistory, ServedLayers
from meshd.agents.placement.replication import orphaned_copies
from meshd.types import LayerRange


def test_the_layers_of_a_peer_that_is_gone_are_lost() -> None:
    history = HoldingHistory()
    history.update([advert("a", held(0, 17)), advert("b", held(17, 30, pinned=True))])
    history.update([advert("a", held(0, 17))])
    assert history.lost == {MODEL: {ServedLayers(LayerRange(17, 30), KV, pinned=True)}}


def test_the_layers_of_a_restarted_peer_are_lost() -> None:
    history = HoldingHistory()
    history.update([advert("a", held(0, 17)), advert("b", held(17, 30))])
    history.update([advert("a", held(0, 17)), advert("b", incarnation=2)])
    assert history.lost == {MODEL: {ServedLayers(LayerRange(17, 30), KV)}}


def test_layers_loaded_and_lost_between_two_updates_are_lost() -> None:
    history = HoldingHistory()
    history.update([advert("a"), advert("b")])
    history.note(advert("b", held(17, 30)))
    history.update([advert("a", held(0, 17))])
    assert history.lost == {MODEL: {ServedLayers(LayerRange(17, 30), KV)}}


def test_layers_loaded_and_unplaced_between_two_updates_are_not_lost() -> None:
    history = HoldingHistory()
    history.update([advert("a", held(0, 17)), advert("b")])
    history.note(advert("b", held(17, 30)))
    history.note(advert("b"))
    history.update([advert("a", held(0, 17)), advert("b")])
    history.update([advert("a", held(0, 17))])
    assert not history.lost


def test_layers_are_no_longer_lost_once_another_peer_serves_them() -> None:
    history = HoldingHistory()
    history.update([advert("a", held(0, 17)), advert("b", held(17, 30))])
    history.update([advert("a", held(0, 17)), advert("c", held(17, 30, state="loading"))])
    assert history.lost
    history.update([advert("a", held(0, 17)), advert("c", held(17, 30, standby=True))])
    assert history.lost
    history.update([advert("a", held(0, 17)), advert("c", held(17, 30))])
    assert not history.lost


def test_unplaced_layers_are_not_lost() -> None:
    history = HoldingHistory()
    history.update([advert("a", held(0, 17)), advert("b", held(17, 30))])
    history.update([advert("b", held(17, 30))])
    history.update([advert("b")])
    assert not history.lost
    assert not history.unplaced


def test_a_copy_that_was_loading_when_its_model_was_unplaced_is_an_orphan() -> None:
    history = HoldingHistory()
    history.update([advert("a", held(0, 30)), advert("b", held(0, 30, standby=True, state="loading"))])
    history.update([advert("a"), advert("b", held(0, 30, standby=True, state="loading"))])
    after = [advert("a"), advert("b", held(0, 30, standby=True))]
    history.update(after)
    assert history.unplaced == {MODEL}
    assert orphaned_copies(after, history.unplaced) == [("b", MODEL)]
    history.update([advert("a"), advert("b")])
    assert not history.unplaced


def test_a_copy_of_lost_layers_is_no_orphan() -> None:
    history = HoldingHistory()
    history.update([advert("a", held(0, 30)), advert("b", held(0, 30, standby=True))])
    history.update([advert("b", held(0, 30, standby=True))])
    assert not history.unplaced


def test_a_model_that_is_placed_again_is_no_longer_unplaced() -> None:
    history = HoldingHistory()
    copy = advert("b", held(0, 30, standby=True))
    history.update([advert("a", held(0, 30)), copy])
    history.update([advert("a"), copy])
    assert history.unplaced
    history.update([advert("a", held(0, 30, state="loading")), copy])
    assert not history.unplaced
