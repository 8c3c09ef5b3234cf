from collections.abc import Callable
from subprocess import CompletedProcess

from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]


def test_a_migration_prints_where_it_runs_now_and_what_it_cost(meshd: Meshd, api: Api) -> None:
    session = "10d4" * 8
    api.answer("POST", "/mesh/v1/migrate", {"session": session, "plan": "ash:0-12,attic:12-30", "pause_ms": 31.25})
    outcome = meshd("migrate", "10d4", "attic", "--from", "birch", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (0, f"{session} runs on ash:0-12,attic:12-30: a pause of 31.2 ms\n")
    assert "moving 10d4: to attic" in outcome.stderr
    meshd("migrate", session, "attic", "--api", api.url)
    assert api.bodies == [{"session": "10d4", "target": "attic", "source": "birch"}, {"session": session, "target": "attic"}]


def test_a_migration_that_fails_is_one_line(meshd: Meshd, api: Api) -> None:
    error = {"message": "no live peer runs or keeps session 10d4", "code": "session_not_found"}
    api.answer("POST", "/mesh/v1/migrate", {"error": error}, status=404)
    outcome = meshd("migrate", "10d4", "attic", "--api", api.url)
    assert (outcome.returncode, outcome.stdout) == (1, "")
    assert outcome.stderr.endswith("meshd: no live peer runs or keeps session 10d4\n")
