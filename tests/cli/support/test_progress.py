import pytest
from rich.console import Console

from meshd.cli.support.progress import Bars, Lines, Measuring, progress


def test_lines_are_printed_at_begin_change_and_end_only(capsys: pytest.CaptureFixture[str]) -> None:
    with Lines(of_bytes=True) as shown:
        for done in range(101):
            shown.update("model", done * 2**20, 100 * 2**20, "downloading")
        shown.update("model", 0, None, "checking")
    assert capsys.readouterr().err.splitlines() == [
        "model: downloading 0 B of 100 MiB",
        "model: downloading 100 MiB of 100 MiB",
        "model: checking 0 B",
    ]


def test_without_a_terminal_progress_is_lines() -> None:
    assert isinstance(progress(), Lines)


def test_bars_are_drawn_and_closed(capsys: pytest.CaptureFixture[str]) -> None:
    with Bars(Console(stderr=True), of_bytes=True) as shown:
        shown.update("a [bold]", 1, None, "[/]")
        shown.update("a [bold]", 2, 2, "done")
    assert "a [bold]" in capsys.readouterr().err


def test_a_stored_measurement_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    measuring = Measuring()
    measuring("done", 1.0)
    measuring.close()
    assert capsys.readouterr().err == ""


def test_a_measurement_shows_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measuring = Measuring()
    measuring("disk", 0.0)
    measuring("torch", 0.5)
    measuring("done", 1.0)
    measuring.close()
    assert capsys.readouterr().err == "".join(
        f"measuring this device: {step}\n" for step in ("disk 0 %", "torch 50 %", "done 100 %")
    )
