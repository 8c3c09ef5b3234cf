"""Answers of real daemons while peers are killed, frozen or drained: the client gets the same tokens as without a fault."""

import http.client
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from real_daemons.mesh import Mesh, pull_model, running
from real_daemons.sites import LocalSite
from real_daemons.streams import Answer, Interrupted, Spec, ask, resume

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
    """After each test, restart ended daemons, continue frozen ones, and place the layers again."""
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
def undisturbed(mesh: Mesh) -> Answer:
    """The answer to `spec()` without a fault, for comparison."""
    return read(mesh, Answer(spec()))


def read(mesh: Mesh, answer: Answer, at: str = COORDINATOR, **options: object) -> Answer:
    ask(mesh.site, at, answer, {"stages": STAGES} | options, silence_s=SILENCE_S)
    return answer


def disturbed(mesh: Mesh, strike: Callable[[Answer], None], after: int = 30, at: str = COORDINATOR, **options: object) -> Answer:
    """Start an answer and call `strike` after `after` tokens. Returns: the answer, which the client has not resumed."""
    answer = Answer(spec())
    reader = threading.Thread(target=read, args=(mesh, answer, at), kwargs=options)
    reader.start()
    wait_for_tokens(answer, after)
    strike(answer)
    reader.join(60)
    assert not reader.is_alive()
    return answer


def methods(mesh: Mesh, answer: Answer) -> list[str]:
    """Return the method by which the answer continued after each change of its plan."""
    return [line["method"] for line in mesh.story(answer.session) if line["what"] == "goes on"]


def wait_for_tokens(answer: Answer, count: int) -> None:
    until = time.monotonic() + 30
    while len(answer.times) < count:
        assert time.monotonic() < until, f"only {len(answer.times)} of {count} tokens arrived"
        time.sleep(0.002)


@pytest.mark.parametrize("victim", [FIRST, SECOND])
def test_a_killed_stage_costs_a_pause_and_no_token(mesh: Mesh, undisturbed: Answer, victim: str) -> None:
    answer = disturbed(mesh, lambda _: mesh[victim].kill())
    assert answer.differences_from(undisturbed) == []
    assert methods(mesh, answer) in (["replay"], ["prefill"])


def test_a_mirrored_stage_continues_without_a_new_prefill(mesh: Mesh, undisturbed: Answer) -> None:
    def kill_when_copied(answer: Answer) -> None:
        until = time.monotonic() + 10
        while not any(line["what"] == "mirror caught up" for line in mesh.story(answer.session)):
            assert time.monotonic() < until, mesh.story_text(answer.session)
            time.sleep(0.02)
        mesh[SECOND].kill()

    # A peer with all layers may be faster by a prefill, because it needs no other peer. So no peer has all of them here.
    mesh.place_only(COORDINATOR, 2048, STAGES, f"{FIRST}:0-14,{SPARE}:14-30")
    answer = disturbed(mesh, kill_when_copied, mirror=True)
    assert answer.differences_from(undisturbed) == []
    assert methods(mesh, answer) == ["mirror"], mesh.story_text(answer.session)


def test_a_frozen_stage_is_not_waited_for(mesh: Mesh, undisturbed: Answer) -> None:
    answer = disturbed(mesh, lambda _: mesh[FIRST].signal(signal.SIGSTOP))
    assert answer.differences_from(undisturbed) == []


def test_an_answer_survives_two_losses_in_a_row(mesh: Mesh, undisturbed: Answer) -> None:
    def both(answer: Answer) -> None:
        mesh[FIRST].kill()
        wait_for_tokens(answer, len(answer.times) + 10)
        mesh[SECOND].kill()

    assert disturbed(mesh, both).differences_from(undisturbed) == []


def test_an_answer_survives_two_losses_at_once(mesh: Mesh, undisturbed: Answer) -> None:
    def both(answer: Answer) -> None:
        mesh[FIRST].kill()
        mesh[SECOND].kill()

    assert disturbed(mesh, both).differences_from(undisturbed) == []


def test_an_answer_of_a_lost_coordinator_is_resumed_at_another_peer(mesh: Mesh, undisturbed: Answer) -> None:
    answer = Answer(spec())
    reader = threading.Thread(target=_until_torn, args=(mesh, answer))
    reader.start()
    wait_for_tokens(answer, 30)
    mesh[COORDINATOR].kill()
    reader.join(30)
    assert not answer.ended
    resume(mesh.site, SPARE, answer, silence_s=SILENCE_S)
    assert answer.differences_from(undisturbed) == []


def test_a_client_that_disconnects_frees_the_stages_and_can_resume(mesh: Mesh, undisturbed: Answer) -> None:
    answer = Answer(spec())
    with pytest.raises(_Disconnected):
        ask(mesh.site, COORDINATOR, _DisconnectingAnswer(answer, after=20), {"stages": STAGES}, silence_s=SILENCE_S)
    # Only this session: a coordinator that was killed in the test before may have left KV on this peer, until its lease ends.
    until = time.monotonic() + 1.0
    while any(row["id"] == answer.session for row in mesh[FIRST].rows("sessions")):
        assert time.monotonic() < until, "the stages of the disconnected client still run after a second"
        time.sleep(0.02)
    resume(mesh.site, COORDINATOR, answer, silence_s=SILENCE_S)
    assert answer.differences_from(undisturbed) == []


class _Disconnected(Exception):
    """The client has closed its connection."""


class _DisconnectingAnswer(Answer):
    """Passes events on to `answer`, and disconnects the client when `answer` has `after` tokens."""

    def __init__(self, answer: Answer, after: int) -> None:
        super().__init__(answer.spec)
        self._answer, self._after = answer, after

    def take(self, number: int | None, event: dict[str, Any], at: float) -> None:
        self._answer.session, self._answer.id = self.session, self.id
        self._answer.take(number, event, at)
        if len(self._answer.times) == self._after:
            raise _Disconnected


def _until_torn(mesh: Mesh, answer: Answer, **options: object) -> None:
    try:
        read(mesh, answer, **options)
    except (Interrupted, OSError, http.client.HTTPException) as error:
        answer.finish = str(error)


def test_a_session_moves_while_it_decodes(mesh: Mesh, undisturbed: Answer) -> None:
    moved: list[dict[str, object]] = []

    def move(answer: Answer) -> None:
        moved.append(mesh[SECOND].post("/mesh/v1/migrate", {"session": answer.session, "target": SPARE, "source": SECOND}))

    answer = disturbed(mesh, move)
    assert answer.differences_from(undisturbed) == []
    assert f"{SPARE}:14-30" in str(moved[0]["plan"])
    assert methods(mesh, answer) == ["mirror"]


def test_the_stages_of_a_drained_peer_move_away(mesh: Mesh, undisturbed: Answer) -> None:
    answer = disturbed(mesh, lambda _: mesh[FIRST].signal(signal.SIGTERM))
    assert answer.differences_from(undisturbed) == []
    assert mesh[FIRST].wait_for_exit(15) == 0
    assert methods(mesh, answer) == ["mirror"]


def test_a_client_gets_an_error_soon_if_no_peer_can_continue_and_resumes_later(mesh: Mesh, undisturbed: Answer) -> None:
    """The only peer on which the request may run is killed."""
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
    assert "starting_after" in answer.finish, "the error must say how to resume"
    mesh[SECOND].start()
    mesh.wait(lambda: mesh[COORDINATOR].sees() >= set(mesh.hosts), "all peers to be back", mesh[COORDINATOR])
    answer.finish = ""
    resume(mesh.site, COORDINATOR, answer, silence_s=60)
    assert answer.differences_from(undisturbed) == []
