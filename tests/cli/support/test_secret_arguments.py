import os
import sys
from collections.abc import Iterator

import pytest

from meshd.cli.support.secret_arguments import given, without_secrets
from meshd.errors import ConfigError


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The writing end of a pipe that is standard input."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield writer
        if not sys.stdin.closed:
            os.close(writer)


def test_keys_are_removed_and_nothing_else() -> None:
    words = ["python", "-P", "-m", "meshd", "up", "--key", "mesh-A", "--name", "key", "--api-key=s", "--key=mesh-B", "--mirror"]
    assert without_secrets(words) == ["python", "-P", "-m", "meshd", "up", "--name", "key", "--mirror"]
    plain = ["meshd", "up", "--name", "desk"]
    assert without_secrets(plain) == plain


def test_a_dash_is_the_first_line_of_standard_input_and_leaves_the_rest(stdin: int) -> None:
    os.write(stdin, b"mesh-CODE\nrest")
    assert given("-", "join code") == "mesh-CODE"
    assert os.read(sys.stdin.fileno(), 100) == b"rest"


def test_an_empty_standard_input_is_reported(stdin: int) -> None:
    os.write(stdin, b"\n")
    with pytest.raises(ConfigError, match="standard input has no join code"):
        given("-", "join code")


def test_any_other_value_is_taken_as_it_is(stdin: int) -> None:
    assert given("mesh-CODE", "join code") == "mesh-CODE"
