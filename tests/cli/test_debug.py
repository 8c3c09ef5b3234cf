import json
from collections.abc import Callable
from subprocess import CompletedProcess

from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]
BIRCH = "b" * 52
STORY = [
    {"at_s": 0.0, "peer": "a", "name": "ash", "what": "planned", "epoch": 1, "plan": "ash:0-12,birch:12-30", "tokens": 0},
    {"at_s": 0.0125, "peer": BIRCH, "name": "birch", "what": "opened", "stage": 1, "error": ""},
    {
        "at_s": 1.5, "peer": "a", "name": "ash", "what": "resumed", "method": "replay", "pause_ms": 310.123456789,
        "stages": [{"held": 0, "start": 0}, {"held": 7, "start": 7}],
    },
    {"at_s": 2.0, "peer": "c", "name": "cedar", "what": "gave no answer", "why": "it is\ngone"},
    {"at_s": 2.5, "peer": "a", "name": "ash", "what": "mirror", "target": BIRCH, "blame": "c" * 52},
]  # fmt: skip


def test_a_story_has_a_line_for_each_event(meshd: Meshd, api: Api) -> None:
    api.answer("GET", "/mesh/v1/sessions/10d4/story", {"object": "list", "data": STORY})
    outcome = meshd("debug", "story", "10d4", "--api", api.url)
    assert outcome.returncode == 0
    assert [line.split(maxsplit=3) for line in outcome.stdout.splitlines()[1:]] == [
        ["0.000", "s", "ash", "planned: epoch 1, plan ash:0-12,birch:12-30, tokens 0"],
        ["0.013", "s", "birch", "opened: stage 1"],
        ["1.500", "s", "ash", "resumed: method replay, pause_ms 310.123, stages [held 0 start 0; held 7 start 7]"],
        ["2.000", "s", "cedar", "gave no answer: why it is gone"],
        ["2.500", "s", "ash", "mirror: target birch, blame cccccccc"],
    ]
    assert json.loads(meshd("debug", "story", "10d4", "--json", "--api", api.url).stdout) == {"object": "list", "data": STORY}


def test_a_session_name_with_slashes_is_quoted_in_the_path(meshd: Meshd, api: Api) -> None:
    outcome = meshd("debug", "story", "../peers?x", "--api", api.url)
    assert outcome.returncode == 1
    assert "no route" in outcome.stderr


def test_debug_needs_a_command(meshd: Meshd) -> None:
    outcome = meshd("debug")
    assert outcome.returncode == 2
    assert "see `meshd debug --help`" in outcome.stderr
