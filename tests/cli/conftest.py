"""Runs commands in this process, against a server that answers like a daemon."""

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from fake_api.rows_server import Api, serve
from meshd.cli import main


@pytest.fixture
def api() -> Iterator[Api]:
    """A server at `api.url`. Tests add its routes."""
    server = Api()
    with serve(server):
        yield server


@pytest.fixture
def meshd(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CompletedProcess[str]]:
    """Runs a command in this process, with its own state folder, cache and settings."""
    for name in ("MESHD_DEBUG", "MESHD_API", "MESHD_API_KEY", "MESHD_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MESHD_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("MESHD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def run(*words: str) -> CompletedProcess[str]:
        try:
            status = main(words)
        except SystemExit as ended:
            status = int(ended.code or 0)
        captured = capsys.readouterr()
        return CompletedProcess(words, status, captured.out, captured.err)

    return run
