"""`meshd key api add|list|rm`."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from meshd.api.access.keys import digest_of
from meshd.cli.support.api_keys import parse_concurrency, parse_expiry, parse_rate
from meshd.config import API_KEYS_FILE

Meshd = Callable[..., CompletedProcess[str]]


def test_a_key_is_shown_once_and_then_only_by_its_prefix(meshd: Meshd, tmp_path: Path) -> None:
    added = meshd("key", "api", "add", "phone", "--rate", "60/min", "--concurrency", "2", "--expires", "30d")
    key = added.stdout.strip()
    prefix = key.rpartition("-")[0]
    assert "only time" in added.stderr
    assert "each client of this daemon needs a key" in added.stderr
    (row,) = json.loads(meshd("key", "api", "list", "--json").stdout)["data"]
    assert {name: row[name] for name in ("name", "prefix", "scope", "rate", "concurrency", "last_used")} == {
        "name": "phone", "prefix": prefix, "scope": "infer", "rate": 60, "concurrency": 2, "last_used": None,
    }  # fmt: skip
    listed = meshd("key", "api", "list").stdout
    assert prefix in listed
    assert key not in listed
    assert digest_of(key).hex() in (tmp_path / "state" / API_KEYS_FILE).read_text()


def test_a_second_key_is_added_without_the_warning(meshd: Meshd) -> None:
    meshd("key", "api", "add", "phone")
    assert "needs a key" not in meshd("key", "api", "add", "laptop", "--scope", "admin").stderr


@pytest.mark.parametrize("by", ["name", "prefix"])
def test_a_key_is_removed(meshd: Meshd, by: str) -> None:
    row = json.loads(meshd("key", "api", "add", "phone", "--json").stdout)
    removed = meshd("key", "api", "rm", row[by])
    assert removed.returncode == 0
    assert "no key is left" in removed.stderr
    assert meshd("key", "api", "rm", "phone").returncode == 2


def test_a_listing_without_keys_is_empty(meshd: Meshd) -> None:
    assert json.loads(meshd("key", "api", "list", "--json").stdout) == {"data": []}


@pytest.mark.parametrize(
    "words",
    [
        ("add",),
        ("add", "two words"),
        ("add", "x", "--scope", "root"),
        ("add", "x", "--rate", "0"),
        ("add", "x", "--rate", "1/s"),
        ("add", "x", "--concurrency", "-1"),
        ("add", "x", "--expires", "soon"),
        ("add", "x", "--expires", "2001-01-01"),
        ("rm",),
    ],
)
def test_wrong_usage_is_one_line_and_adds_no_key(meshd: Meshd, words: tuple[str, ...]) -> None:
    outcome = meshd("key", "api", *words)
    assert outcome.returncode == 2
    assert outcome.stderr.count("\n") == 1
    assert json.loads(meshd("key", "api", "list", "--json").stdout) == {"data": []}


def test_a_torn_file_is_one_error_with_a_remedy(meshd: Meshd, tmp_path: Path) -> None:
    meshd("key", "api", "add", "phone")
    (tmp_path / "state" / API_KEYS_FILE).write_text("{")
    outcome = meshd("key", "api", "list")
    assert outcome.returncode == 1
    assert "is broken" in outcome.stderr
    assert "meshd key api add" in outcome.stderr


def test_values_of_limits() -> None:
    assert (parse_rate("60/min"), parse_rate("60"), parse_concurrency("3")) == (60, 60, 3)
    assert abs(parse_expiry("2d") - (time.time() + 2 * 86_400)) < 60
    assert parse_expiry("2999-01-01") > parse_expiry("999d")
