import io
import json
import sys

import pytest

from meshd.cli.support.answering import write_out
from meshd.cli.support.output import print_json, show, table


def test_a_table_is_aligned_and_has_no_trailing_space() -> None:
    assert table(("A", "LONG"), [("abc", "x"), ("", "longest")]) == "A    LONG\nabc  x\n     longest"


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
