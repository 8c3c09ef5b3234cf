"""Colours follow what they mean."""

from meshd.tui.widgets.paint import Paint

PAINT = Paint(good="g", calm="c", warn="w", bad="b")


def test_bars_warn_when_they_are_nearly_full() -> None:
    assert [PAINT.bar(share, 8).spans[0].style for share in (0.5, 0.8, 0.95)] == ["g", "w", "b"]
    assert [PAINT.bar(share, 8).plain for share in (-1.0, 0.5, 2.0)] == ["░" * 8, "████░░░░", "█" * 8]
    assert PAINT.progress(0.25, 8).plain == "██░░░░░░"


def test_states_that_are_not_known_have_no_colour() -> None:
    assert (PAINT.state("alive").style, PAINT.state("dead").style, PAINT.state("of a later version").style) == ("g", "b", "")
    assert PAINT.state("alive", "alive, draining").plain == "alive, draining"
    assert (PAINT.kind("error"), PAINT.kind("info")) == ("b", "")
