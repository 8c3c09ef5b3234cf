import json
from collections.abc import Callable
from subprocess import CompletedProcess

from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]


def test_a_plan_shows_its_text_and_on_request_its_explanation(meshd: Meshd, api: Api) -> None:
    api.answer(
        "POST", "/mesh/v1/plan", {"object": "mesh.plan", "plan": "a:0-30", "text": ["m: a:0-30"], "explanation": ["stage a"]}
    )
    assert meshd("plan", "m", "--api", api.url).stdout == "m: a:0-30\n"
    assert meshd("plan", "m", "--explain", "--api", api.url).stdout == "m: a:0-30\nstage a\n"
    assert json.loads(meshd("plan", "m", "--json", "--api", api.url).stdout)["plan"] == "a:0-30"


def test_a_plan_request_has_only_the_flags_that_were_given(meshd: Meshd, api: Api) -> None:
    api.answer("POST", "/mesh/v1/plan", {"text": []})
    what_if = "+attic ram=32GiB bw=60GB/s"
    meshd("plan", "m", "--context", "512", "--objective", "throughput", "--what-if", what_if, "--min-peers", "2", "--api", api.url)
    expected = {"model": "m", "context": 512, "objective": "throughput", "what_if": [what_if], "mesh": {"min_peers": 2}}
    assert api.bodies == [expected]
