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


def test_unplacing_tells_what_it_freed(meshd: Meshd, api: Api) -> None:
    api.answer("POST", "/mesh/v1/unplace", {"model": "m", "freed_bytes": 3 * 2**20})
    assert meshd("unplace", "m", "--api", api.url).stdout == "m: 3.0 MiB freed\n"
    assert api.bodies == [{"model": "m"}]


def test_a_plan_shows_its_text_and_on_request_its_reasons(meshd: Meshd, api: Api) -> None:
    api.answer(
        "POST", "/mesh/v1/plan", {"object": "mesh.plan", "plan": "a:0-30", "text": ["m: a:0-30"], "explanation": ["stage a"]}
    )
    assert meshd("plan", "m", "--api", api.url).stdout == "m: a:0-30\n"
    assert meshd("plan", "m", "--explain", "--api", api.url).stdout == "m: a:0-30\nstage a\n"
    assert json.loads(meshd("plan", "m", "--json", "--api", api.url).stdout)["plan"] == "a:0-30"


def test_a_plans_question_is_what_was_asked(meshd: Meshd, api: Api) -> None:
    api.answer("POST", "/mesh/v1/plan", {"text": []})
    what_if = "+attic ram=32GiB bw=60GB/s"
    meshd("plan", "m", "--context", "512", "--objective", "throughput", "--what-if", what_if, "--min-peers", "2", "--api", api.url)
    expected = {"model": "m", "context": 512, "objective": "throughput", "what_if": [what_if], "mesh": {"min_peers": 2}}
    assert api.bodies == [expected]
