"""JSON files of a model: limits on size, depth and items, encoding, and duplicate keys."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshd.errors import ModelFileError
from meshd.models.files.json_files import parse_object, read_bytes, read_json, shown, string_map, whole_number


def test_a_file_may_have_exactly_the_allowed_size(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, most_bytes=8) == {"a": 1}
    with pytest.raises(ModelFileError, match="larger than 7 bytes"):
        read_bytes(path, most_bytes=7)
    with pytest.raises(ModelFileError, match=r"gone\.json can't be read: No such file"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(ModelFileError, match="can't be read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "can't be read"),
        (b"[]", "not an object"),
        (b'"x"', "not an object"),
        (b"\xff{}", "can't be read"),
        (b'{"a": 1', "can't be read"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        (b'{"a": "\\ud800"}', "can't be read"),
        (b'{"a":' * 5000, "nested too deep|can't be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "can't be read"),
    ],
)
def test_anything_but_a_json_object_is_an_error_with_the_files_name(data: bytes, why: str) -> None:
    with pytest.raises(ModelFileError, match=why) as caught:
        parse_object(data, "x.json")
    assert caught.value.message.startswith("x.json can't be used: ")
    assert len(caught.value.message) < 500


def test_items_are_counted_before_they_are_parsed() -> None:
    data = json.dumps({"a": [1, 2, 3]}).encode()  # one object, one list, two commas
    assert parse_object(data, "x", most_items=4) == {"a": [1, 2, 3]}
    with pytest.raises(ModelFileError, match="more than 3 items"):
        parse_object(data, "x", most_items=3)


def test_values_in_messages_are_short_and_ascii() -> None:
    assert shown("é\ud800\n") == "'\\xe9\\ud800\\n'"
    assert len(shown("x" * 10_000)) == 102


@pytest.mark.parametrize(("value", "found"), [(0, 0), (5, 5), (6, None), (-1, None), (True, None), (1.0, None), ("1", None)])
def test_whole_numbers_are_integers_within_the_bound(value: Any, found: int | None) -> None:
    assert whole_number(value, 5) == found


def test_a_string_map_is_an_object_of_strings() -> None:
    assert string_map({"a": "b"}) == {"a": "b"}
    assert string_map({}) == {}
    for value in ({"a": 1}, ["a"], None):
        assert string_map(value) is None
