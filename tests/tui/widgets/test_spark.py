"""Bars of a series."""

import pytest

from meshd.tui.widgets.spark import bars


@pytest.mark.parametrize(
    ("values", "width", "height", "top", "shown"),
    [
        ((), 3, 1, None, "   "),
        ((0.0, 4.0, 8.0), 3, 1, None, " ▄█"),
        ((1.0, 2.0, 3.0, 8.0), 2, 1, None, "▃█"),
        ((8.0,), 3, 1, None, "  █"),
        ((0.5,), 1, 1, 1.0, "▄"),
        ((0.001,), 1, 1, 1.0, "▁"),
        ((2.0,), 1, 1, 1.0, "█"),
        ((0.0, 0.5, 0.75, 1.0), 4, 2, 1.0, "  ▄█\n ███"),
        ((0.0, 0.0), 2, 1, None, "  "),
        ((1.0,), 0, 1, None, ""),
    ],
)
def test_bars(values: tuple[float, ...], width: int, height: int, top: float | None, shown: str) -> None:
    assert bars(values, width, height, top).plain == shown
