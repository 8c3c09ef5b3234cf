"""Real daemons lost, frozen, drained and moved away in mid-answer: the client gets the same tokens as without."""

import http.client
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from real_daemons.mesh import Mesh, pull_model, running
from real_daemons.sites import LocalSite
from real_daemons.streams import Answer, Interrupted, Spec, ask, go_on

COORDINATOR, FIRST, SECOND, SPARE = "h1", "h2", "h3", "h4"
STAGES = f"{FIRST}:0-14,{SECOND}:14-30"
SILENCE_S = 20.0


def spec(tokens: int = 120, **fields: object) -> Spec:
    body = {
        "model": "smollm2:135m",
        "messages": [{"role": "user", "content": "Tell me a long story about a lighthouse keeper and her cat."}],
        "temperature": 0.8,
        "top_p": 0.95,
        "seed": 11,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.05,
        "max_tokens": tokens,
        "ignore_eos": True,
        "logprobs": True,
        "stream_options": {"include_usage": True},
    }
    return Spec("story", "/v1/chat/completions", body | fields)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    pull_model()
    with running(LocalSite(4), tmp_path_factory.mktemp("recovery"), ("--copies", "1")) as mesh:
        mesh.place(COORDINATOR, STAGES, 2048)
        mesh.place(COORDINATOR, f"{SPARE}:0-30", 2048)
        yield mesh


@pytest.fixture(autouse=True)
def healed(mesh: Mesh) -> Iterator[None]:
    """Every test finds all daemons up, and the layers where they belong."""
    yield
    for host in mesh:
        host.signal(signal.SIGCONT)
        if not host.running:
            host.start()
    for host in mesh:
        mesh.wait(lambda host=host: host.sees() >= set(mesh.hosts), f"{host.name} to see all", host)
    mesh.place(COORDINATOR, STAGES, 2048)
    mesh.place(COORDINATOR, f"{SPARE}:0-30", 2048)


@pytest.fixture(scope="module")
def calm(mesh: Mesh) -> Answer:
    return read(mesh, Answer(spec()))


def read(mesh: Mesh, answer: Answer, at: str = COORDINATOR, **options: object) -> Answer:
    ask(mesh.site, at, answer, {"stages": STAGES} | options, silence_s=SILENCE_S)
    return answer


def struck(mesh: Mesh, strike: Callable[[Answer], None], after: int = 30, at: str = COORDINATOR, **options: object) -> Answer:
    """An answer with a fault in the middle; it must continue without help from the client."""
    answer = Answer(spec())
    reader = threading.Thread(target=read, args=(mesh, answer, at), kwargs=options)
    reader.start()
    wait_for_tokens(answer, after)
    strike(answer)
    reader.join(60)
    assert not reader.is_alive()
    return answer


def methods(mesh: Mesh, answer: Answer) -> list[str]:
    """How it went on, each time that it did."""
    return [line["method"] for line in mesh.story(answer.session) if line["what"] == "goes on"]


def wait_for_tokens(answer: Answer, count: int) -> None:
    until = time.monotonic() + 30
    while len(answer.times) < count:
        assert time.monotonic() < until, f"{len(answer.times)} of {count} tokens came"
        time.sleep(0.002)


@pytest.mark.parametrize("victim", [FIRST, SECOND])
def test_a_killed_stage_costs_a_pause_and_no_token(mesh: Mesh, calm: Answer, victim: str) -> None:
    answer = struck(mesh, lambda _: mesh[victim].kill())
    assert answer.same_as(calm) == []
    assert methods(mesh, answer) in (["replay"], ["prefill"])


def test_a_mirrored_stage_goes_on_without_computing_anew(mesh: Mesh, calm: Answer) -> None:
    answer = struck(mesh, lambda _: mesh[SECOND].kill(), after=60, mirror=True)
    assert answer.same_as(calm) == []
    assert methods(mesh, answer) == ["mirror"]


def test_a_frozen_stage_is_not_waited_for(mesh: Mesh, calm: Answer) -> None:
    answer = struck(mesh, lambda _: mesh[FIRST].signal(signal.SIGSTOP))
    assert answer.same_as(calm) == []


def test_two_losses_in_a_row(mesh: Mesh, calm: Answer) -> None:
    def both(answer: Answer) -> None:
        mesh[FIRST].kill()
        wait_for_tokens(answer, len(answer.times) + 10)
        mesh[SECOND].kill()

    assert struck(mesh, both).same_as(calm) == []


def test_two_losses_at_once(mesh: Mesh, calm: Answer) -> None:
    def both(answer: Answer) -> None:
        mesh[FIRST].kill()
        mesh[SECOND].kill()

    assert struck(mesh, both).same_as(calm) == []


def test_a_lost_coordinator_is_resumed_at_any_other_peer(mesh: Mesh, calm: Answer) -> None:
    answer = Answer(spec())
    reader = threading.Thread(target=_until_torn, args=(mesh, answer))
    reader.start()
    wait_for_tokens(answer, 30)
    mesh[COORDINATOR].kill()
    reader.join(30)
    assert not answer.ended
    go_on(mesh.site, SPARE, answer, silence_s=SILENCE_S)
    assert answer.same_as(calm) == []


def test_a_client_that_went_away_frees_the_stages_and_can_come_back(mesh: Mesh, calm: Answer) -> None:
    answer = Answer(spec())
    with pytest.raises(_GoneAway):
        ask(mesh.site, COORDINATOR, _Leaving(answer, after=20), {"stages": STAGES}, silence_s=SILENCE_S)
    until = time.monotonic() + 1.0
    while mesh[FIRST].rows("sessions"):
        assert time.monotonic() < until, "what the client left is still held after a second"
        time.sleep(0.02)
    go_on(mesh.site, COORDINATOR, answer, silence_s=SILENCE_S)
    assert answer.same_as(calm) == []


class _GoneAway(Exception):
    """By its own will."""


class _Leaving(Answer):
    """Reads into another answer, and goes away after so many pieces of it."""

    def __init__(self, answer: Answer, after: int) -> None:
        super().__init__(answer.spec)
        self._answer, self._after = answer, after

    def take(self, number: int | None, event: dict[str, Any], at: float) -> None:
        self._answer.session = self.session
        self._answer.take(number, event, at)
        if len(self._answer.times) == self._after:
            raise _GoneAway


def _until_torn(mesh: Mesh, answer: Answer, **options: object) -> None:
    try:
        read(mesh, answer, **options)
    except (Interrupted, OSError, http.client.HTTPException) as error:
        answer.finish = str(error)


def test_a_session_moves_while_it_decodes(mesh: Mesh, calm: Answer) -> None:
    moved: list[dict[str, object]] = []

    def move(answer: Answer) -> None:
        moved.append(mesh[SECOND].post("/mesh/v1/migrate", {"session": answer.session, "target": SPARE, "source": SECOND}))

    answer = struck(mesh, move)
    assert answer.same_as(calm) == []
    assert f"{SPARE}:14-30" in str(moved[0]["plan"])
    assert methods(mesh, answer) == ["mirror"]


def test_a_drained_peer_is_left_by_what_runs_on_it(mesh: Mesh, calm: Answer) -> None:
    answer = struck(mesh, lambda _: mesh[FIRST].signal(signal.SIGTERM))
    assert answer.same_as(calm) == []
    assert mesh[FIRST].gone(15) == 0
    assert methods(mesh, answer) == ["mirror"]


def test_when_nothing_can_hold_the_model_the_client_hears_it_soon_and_goes_on_later(mesh: Mesh, calm: Answer) -> None:
    """The only peer that may take part is gone."""
    only = {"peers": [SECOND], "stages": f"{SECOND}:0-30"}
    answer = Answer(spec())
    reader = threading.Thread(target=_until_torn, args=(mesh, answer), kwargs=only)
    reader.start()
    wait_for_tokens(answer, 20)
    lost = mesh[SECOND].kill()
    reader.join(30)
    assert not reader.is_alive()
    assert time.monotonic() - lost < 10
    assert SECOND in answer.finish
    assert "starting_after" in answer.finish, "the error says how to go on"
    mesh[SECOND].start()
    mesh.wait(lambda: mesh[COORDINATOR].sees() >= set(mesh.hosts), "all to be back", mesh[COORDINATOR])
    answer.finish = ""
    go_on(mesh.site, COORDINATOR, answer, silence_s=60)
    assert answer.same_as(calm) == []
