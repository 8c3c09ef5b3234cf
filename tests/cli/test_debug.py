import json
from collections.abc import Callable
from pathlib import Path
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


TRACE = {
    "traceEvents": [{"ph": "M", "name": "process_name"}, {"ph": "X", "name": "decode 4"}],
    "otherData": {
        "session": "10d4" * 8,
        "clock_of": "ash",
        "clocks": [
            {"name": "ash", "error_s": 0.0, "dropped": 0},
            {"name": "birch", "error_s": 0.00125, "dropped": 7},
        ],
        "no_trace_of": {"cedar": "it runs an older version"},
    },
}


def test_a_trace_is_written_to_a_file_and_its_exactness_is_shown(meshd: Meshd, api: Api, tmp_path: Path) -> None:
    api.answer("GET", "/mesh/v1/sessions/10d4/trace", TRACE)
    output = tmp_path / "answer.json"
    outcome = meshd("debug", "trace", "10d4", "-o", str(output), "--api", api.url)
    assert outcome.returncode == 0
    assert json.loads(output.read_text()) == TRACE
    assert outcome.stdout.splitlines() == [
        f"{output}: 1 spans of 2 peers; open it at https://ui.perfetto.dev or chrome://tracing",
        "  ash: times within 0.000 ms of ash's clock",
        "  birch: times within 1.250 ms of ash's clock; 7 older steps were not kept",
        "  cedar: no trace: it runs an older version",
    ]
    assert json.loads(meshd("debug", "trace", "10d4", "-o", "-", "--api", api.url).stdout) == TRACE


def test_a_trace_that_cannot_be_written_is_one_clear_error(meshd: Meshd, api: Api, tmp_path: Path) -> None:
    api.answer("GET", "/mesh/v1/sessions/10d4/trace", TRACE)
    outcome = meshd("debug", "trace", "10d4", "-o", str(tmp_path), "--api", api.url)
    assert outcome.returncode == 1
    assert outcome.stderr == f"meshd: the trace can't be written to {tmp_path}: Is a directory; name another file with -o\n"


def test_a_session_name_with_slashes_is_quoted_in_the_path(meshd: Meshd, api: Api) -> None:
    outcome = meshd("debug", "story", "../peers?x", "--api", api.url)
    assert outcome.returncode == 1
    assert "no route" in outcome.stderr


def test_debug_needs_a_command(meshd: Meshd) -> None:
    outcome = meshd("debug")
    assert outcome.returncode == 2
    assert "see `meshd debug --help`" in outcome.stderr
