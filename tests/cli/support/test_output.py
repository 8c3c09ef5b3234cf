import io
import json
import sys

import pytest

from meshd.cli.support.answering import write_out
from meshd.cli.support.output import duration, flops, layers, plural, print_json, rate, short_id, show, size, table


def test_a_table_is_aligned_and_has_no_trailing_space() -> None:
    assert table(("A", "LONG"), [("abc", "x"), ("", "longest")]) == "A    LONG\nabc  x\n     longest"


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (98_362_432, "93.8 MiB"), (2**50, "1024 TiB")]
)
def test_sizes_are_binary(count: int | None, text: str) -> None:
    assert size(count) == text


def test_rates_are_decimal() -> None:
    assert rate(8.29e9) == "8.3 GB/s"
    assert rate(117_600_000) == "118 MB/s"
    assert rate(None) == rate(0) == "-"
    assert flops(1.069e11) == "107 GFLOP/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0.0, "0 us"), (8.5e-5, "85 us"), (0.0123, "12.3 ms"), (0.5, "500 ms"), (4.2, "4.2 s"),
        (119.0, "119 s"), (150.0, "2 min"), (7200.0, "2 h"), (200_000.0, "2 d"),
    ],
)  # fmt: skip
def test_durations_have_a_suitable_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_ids_counts_and_layers() -> None:
    assert short_id("k3j2x9d1" + "a" * 44) == "k3j2x9d1"
    assert [plural(count, "peer") for count in (0, 1, 2)] == ["0 peers", "1 peer", "2 peers"]
    assert layers([0, 12]) == layers("0-12") == "0-12"


HOSTILE = "\x1b]0;owned\x07\x1b[2Jb\u202e\r\x9b31m"


def test_nothing_that_is_printed_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(f"{HOSTILE}\nline")
    print_json({"name": HOSTILE})
    print(table(("A",), [(HOSTILE,), ("two\nlines",)]))
    printed = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in printed)
    assert printed.startswith("\\x1b]0;owned\\x07\\x1b[2Jb\\u202e \\x9b31m\nline\n")
    assert json.loads(printed[printed.index("{") : printed.index("}") + 1]) == {"name": HOSTILE}
    assert printed.endswith("\ntwo lines\n")


def test_an_answer_is_filtered_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for on_terminal, expected in ((True, "a\n\tb\\x1b[2J"), (False, "a\n\tb\x1b[2J")):
        screen = io.StringIO()
        monkeypatch.setattr(screen, "isatty", lambda shown=on_terminal: shown)
        monkeypatch.setattr(sys, "stdout", screen)
        write_out("a\n\tb\x1b[2J")
        assert screen.getvalue() == expected
