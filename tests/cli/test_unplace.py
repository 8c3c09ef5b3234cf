from collections.abc import Callable
from subprocess import CompletedProcess

from fake_api.rows_server import Api

Meshd = Callable[..., CompletedProcess[str]]


def test_unplacing_prints_what_it_freed(meshd: Meshd, api: Api) -> None:
    api.answer("POST", "/mesh/v1/unplace", {"model": "m", "freed_bytes": 3 * 2**20})
    assert meshd("unplace", "m", "--api", api.url).stdout == "m: 3.0 MiB freed\n"
    assert api.bodies == [{"model": "m"}]


def test_a_model_that_is_not_placed_fails_in_one_line(meshd: Meshd, api: Api) -> None:
    api.answer("POST", "/mesh/v1/unplace", {"error": {"message": "no model 'x'", "code": "model_not_found"}}, status=404)
    outcome = meshd("unplace", "x", "--api", api.url)
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (1, "", "meshd: no model 'x'\n")
