"""Commands that name a model which the daemon does not have yet. The daemon is a stand-in that holds the state folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from aiohttp import web

from fake_api.chat_events import CHAT, chat_events
from fake_api.rows_server import Api
from meshd.models.store import catalogue
from meshd.models.store.catalogue import FileSource, ModelRef
from meshd.models.store.store import Store
from meshd.state import StateFolder, lock_state
from tiny.gguf_file import write_gguf

Meshd = Callable[..., CompletedProcess[str]]
UNKNOWN = {"error": {"message": "the model does not exist in this cluster", "code": "model_not_found"}}


@pytest.fixture
def models(api: Api, tmp_path: Path) -> Iterator[Path]:
    """The model folder of a daemon that uses this command's state folder, and whose API is `api`."""
    folder = StateFolder.open(tmp_path / "state")
    with lock_state(folder.path) as lock:
        lock.announce(api.url.removeprefix("http://"), str(tmp_path / "of the daemon"))
        yield tmp_path / "of the daemon"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file in the working directory, which is the home directory too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return write_gguf(tmp_path / "m.gguf", layers=1)


@pytest.mark.parametrize("spelling", ["file:m.gguf", "file:./m.gguf", "file:~/m.gguf"])
@pytest.mark.parametrize("verb", ["run", "place", "plan", "unplace"])
def test_a_file_is_put_into_the_daemons_store_and_named_by_its_absolute_path(
    meshd: Meshd, api: Api, models: Path, source: Path, verb: str, spelling: str
) -> None:
    api.stream(CHAT, chat_events("x"))
    api.stream("/mesh/v1/place", [b"data: [DONE]\n\n"])
    api.answer("POST", "/mesh/v1/plan", {"text": []})
    api.answer("POST", "/mesh/v1/unplace", {"freed_bytes": 0})
    outcome = meshd(verb, spelling, *(["hello"] if verb == "run" else []))
    assert outcome.returncode == 0, outcome.stderr
    assert [body["model"] for body in api.bodies] == [f"file:{source}"]
    assert [model.path for model in Store(models).list()] == ([] if verb == "unplace" else [source])


def test_a_file_can_not_be_shown_to_a_daemon_elsewhere(meshd: Meshd, api: Api, source: Path) -> None:
    outcome = meshd("run", "file:m.gguf", "hello", "--api", api.url)
    assert outcome.returncode == 2
    assert f"the daemon at {api.url} does not run with this device's state folder" in outcome.stderr
    assert api.bodies == []


@pytest.fixture
def answers_once_the_store_has(api: Api) -> Callable[[Path, str], None]:
    """Makes the stand-in answer a chat only if the store has the model, as a daemon that reads its store again does."""

    def prepare(models: Path, name: str) -> None:
        async def chat(request: web.Request) -> web.StreamResponse:
            if Store(models).get(name) is None:
                return web.json_response(UNKNOWN, status=404)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for chunk in chat_events("fetched"):
                await response.write(chunk)
            return response

        api.routes["POST", CHAT] = chat

    return prepare


def test_run_fetches_a_model_that_the_cluster_does_not_have(
    meshd: Meshd,
    models: Path,
    source: Path,
    answers_once_the_store_has: Callable[[Path, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(catalogue.CATALOGUE, "tiny", ModelRef(name="tiny", sources=(FileSource(source),)))
    answers_once_the_store_has(models, "tiny")
    outcome = meshd("run", "tiny", "hello")
    assert (outcome.returncode, outcome.stdout) == (0, "fetched\n")
    assert "tiny is not in this cluster: it is fetched to this device" in outcome.stderr


def test_run_does_not_fetch_for_a_daemon_elsewhere_but_says_how(meshd: Meshd, api: Api) -> None:
    api.answer("POST", CHAT, UNKNOWN, status=404)
    outcome = meshd("run", "smollm2:135m", "hello", "--api", api.url)
    assert outcome.returncode == 1
    assert f"`meshd place smollm2:135m --api {api.url}` has that daemon fetch it" in outcome.stderr


def test_a_name_without_a_source_is_not_fetched(meshd: Meshd, api: Api, models: Path) -> None:
    api.answer("POST", CHAT, UNKNOWN, status=404)
    outcome = meshd("run", "my-alias", "hello")
    assert (outcome.returncode, outcome.stderr) == (1, "meshd: the model does not exist in this cluster\n")
    assert not models.exists()
