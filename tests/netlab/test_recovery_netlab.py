"""An answer of two hosts continues with the same tokens when one of them falls silent. `pytest -s` prints the pauses."""

import http.client
import signal
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from real_daemons.mesh import Mesh, pull_model, running
from real_daemons.sites import LabSite
from real_daemons.streams import Answer, Interrupted, Spec, Streaming, longest_gap_s, of_length, resume

pytestmark = [pytest.mark.netlab, pytest.mark.timeout(300)]

SPEC = of_length(256, 64)
BEFORE = 16
CONTEXT = 1024
WITHIN_S = 10.0
"""Longest pause that a test accepts, with a margin for busy machines. `bench_recovery.py` measures the usual pauses."""
LEASE_S = 12.0
"""A little more than the length of a lease. When it runs out, peers free the sessions of a lost coordinator."""
Act = Callable[[Mesh, str], object]


@pytest.fixture(scope="module")
def mesh(netlab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    pull_model()
    with running(LabSite(netlab, 4), tmp_path_factory.mktemp("mesh")) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def undisturbed(mesh: Mesh) -> Answer:
    """The answer to `SPEC` when no fault occurs, for comparison."""
    return Streaming(mesh.site, "h1", SPEC, {"stages": "h1:0-15,h2:15-30"}).end()


def begin(mesh: Mesh, spec: Spec = SPEC, **options: object) -> Streaming:
    """Start an answer and wait for its first `BEFORE` tokens."""
    begun = Streaming(mesh.site, "h1", spec, {"stages": "h1:0-15,h2:15-30", **options}, silence_s=30)
    begun.wait_for(BEFORE)
    return begun


def lose_power(mesh: Mesh, name: str) -> None:
    mesh.site.cut(name, "silent")
    mesh[name].kill()


def power_on(mesh: Mesh, name: str) -> None:
    mesh.site.heal(name)
    mesh[name].start()


FAULTS: dict[str, tuple[Act, Act]] = {
    "power": (lose_power, power_on),
    "freeze": (lambda mesh, name: mesh[name].signal(signal.SIGSTOP), lambda mesh, name: mesh[name].signal(signal.SIGCONT)),
    "partition": (lambda mesh, name: mesh.site.cut(name, "silent"), lambda mesh, name: mesh.site.heal(name)),
    "deaf": (lambda mesh, name: mesh.site.cut(name, "in"), lambda mesh, name: mesh.site.heal(name)),
    "mute": (lambda mesh, name: mesh.site.cut(name, "out"), lambda mesh, name: mesh.site.heal(name)),
}


RARE = pytest.mark.slow
"""Left out of `make test`: other faults take the same ways there."""


@pytest.mark.parametrize(
    ("fault", "mirror"),
    [
        *((fault, False) for fault in FAULTS),
        ("power", True),
        ("deaf", True),
        *(pytest.param(fault, True, marks=RARE) for fault in ("freeze", "partition", "mute")),
    ],
)
def test_an_answer_continues_when_a_host_falls_silent(mesh: Mesh, undisturbed: Answer, fault: str, *, mirror: bool) -> None:
    strike, repair = FAULTS[fault]
    begun = begin(mesh, mirror=mirror)
    at = time.monotonic()
    strike(mesh, "h2")
    try:
        answer = begun.end()
    finally:
        repair(mesh, "h2")
        mesh.wait_until_all_see()
    assert answer.differences_from(undisturbed) == [], mesh.story_text(answer.session)
    pause_s = longest_gap_s(answer, at)
    print(f"\n{fault}: a pause of {1000 * pause_s:.0f} ms")
    assert pause_s < WITHIN_S


@pytest.mark.parametrize(
    "fault", ["power", "freeze", "mute", *(pytest.param(fault, marks=RARE) for fault in ("partition", "deaf"))]
)
def test_a_client_whose_coordinator_falls_silent_resumes_at_another_peer(mesh: Mesh, undisturbed: Answer, fault: str) -> None:
    strike, repair = FAULTS[fault]
    begun = begin(mesh)
    strike(mesh, "h1")
    try:
        time.sleep(4)  # as long as a client waits for a token before it asks another peer
        answer = deepcopy(begun.answer)
        _resume(mesh, "h3", answer)
    finally:
        repair(mesh, "h1")
        mesh.wait_until_all_see()
    assert answer.differences_from(undisturbed) == [], mesh.story_text(answer.session)
    # The first client still reads at h1, if it can: h1 first finishes the answer for it, as fast as a busy machine allows.
    mesh.wait(lambda: all(row["role"] != "coordinator" for row in mesh["h1"].rows("sessions")), "h1 to end its answer", mesh["h1"])
    mesh.wait(lambda: not any(host.rows("sessions") for host in mesh), "all sessions to end on all peers", mesh["h1"], LEASE_S)


def _resume(mesh: Mesh, at: str, answer: Answer) -> None:
    """Read the rest of an answer at another peer after the loss of the coordinator. Retries for up to 20 s."""
    until = time.monotonic() + 20
    while not answer.ended:
        assert time.monotonic() < until, f"{answer.session} cannot be resumed at {at}"
        try:
            resume(mesh.site, at, answer, silence_s=10)
        except (Interrupted, OSError, http.client.HTTPException):
            time.sleep(0.2)
