import json
from collections.abc import Callable
from subprocess import CompletedProcess

from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]


def _steps(*steps: tuple[str, list[int], str, float, str]) -> list[bytes]:
    rows = [
        {"peer": "p" + name, "name": name, "layers": layers, "state": state, "progress": progress, "message": message}
        for name, layers, state, progress, message in steps
    ]
    return [f"data: {json.dumps(row)}\n\n".encode() for row in rows] + [b"data: [DONE]\n\n"]


def test_a_placement_shows_its_progress_and_who_holds_what(meshd: Meshd, api: Api) -> None:
    steps = (("birch", [12, 30], "loading", 0.5, ""), ("ash", [0, 12], "active", 1.0, ""), ("birch", [12, 30], "active", 1.0, ""))
    api.stream("/mesh/v1/place", _steps(*steps))
    outcome = meshd("place", "m", "--stages", "ash:0-12,birch:12-30", "--context", "512", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, "ash holds layers 0-12\nbirch holds layers 12-30\n")
    assert outcome.stderr == "birch layers 12-30: loading 50 %\nash layers 0-12: active 100 %\nbirch layers 12-30: active 100 %\n"
    assert api.bodies == [{"model": "m", "stages": "ash:0-12,birch:12-30", "context": 512}]


def test_a_peer_that_can_not_load_fails_the_command(meshd: Meshd, api: Api) -> None:
    api.stream("/mesh/v1/place", _steps(("ash", [0, 12], "active", 1.0, ""), ("birch", [12, 30], "failed", 0.2, "disk full")))
    outcome = meshd("place", "m", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert "meshd: m could not be placed: birch layers 12-30 disk full" in outcome.stderr


def test_stages_and_min_peers_exclude_each_other(meshd: Meshd) -> None:
    assert meshd("place", "m", "--stages", "a:0-1", "--min-peers", "2").returncode == 2
