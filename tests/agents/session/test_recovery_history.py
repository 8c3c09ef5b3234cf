"""The recovery history: distrust that expires, copies that are lost, changes of plan that a token completes."""

from meshd.agents.session.recovery_history import Recovered, RecoveryHistory
from meshd.types import LayerRange, PeerId

A, B = PeerId("a"), PeerId("b")


def test_distrust_expires_after_half_a_minute_and_a_new_fault_renews_it() -> None:
    history = RecoveryHistory()
    history.distrust(A, 0.0)
    history.distrust(B, 0.0)
    history.distrust(B, 10.0)
    assert history.distrusted(29.9) == {A, B}
    assert history.distrusted(30.0) == {B}
    assert history.distrusted(40.0) == set()


def test_a_fault_of_an_unknown_peer_distrusts_no_peer() -> None:
    history = RecoveryHistory()
    history.distrust(None, 0.0)
    assert history.distrusted(0.0) == set()


def test_only_the_copies_at_a_lost_peer_are_forgotten() -> None:
    history = RecoveryHistory(mirrors={0: (A, 10), 1: (B, 20), 2: (A, 30)})
    history.forget_copies(A)
    assert history.mirrors == {1: (B, 20)}


def test_the_first_token_completes_a_change_of_plan_once() -> None:
    history = RecoveryHistory(mirrors={0: (A, 10)}, reason="b: killed")
    assert history.first_token(0.1) is None
    history.changed(2, "replay")
    assert history.mirrors == {}
    history.reason = "another one"
    completed = Recovered(2, "replay", "loss", "b: killed", 0.5)
    assert history.first_token(0.5) == completed
    assert history.first_token(0.1) is None
    assert history.recoveries == [completed]


def test_layers_with_other_numerics_are_named_for_the_change_that_brought_them() -> None:
    history = RecoveryHistory(reason="b: killed", other_numerics=(LayerRange(4, 8), LayerRange(10, 12)))
    history.changed(2, "replay")
    history.other_numerics = ()
    completed = history.first_token(0.5)
    assert completed is not None
    assert completed.other_numerics == "4-8,10-12"
    history.changed(3, "kept")
    again = history.first_token(0.5)
    assert again is not None
    assert again.other_numerics == ""


def test_of_two_changes_without_a_token_between_them_the_last_counts() -> None:
    history = RecoveryHistory(reason="first")
    history.changed(2, "replay")
    history.reason = "second"
    history.changed(3, "prefill")
    assert history.first_token(1.0) == Recovered(3, "prefill", "loss", "second", 1.0)
    assert len(history.recoveries) == 1
