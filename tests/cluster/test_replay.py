"""Replay after a loss, over prompts of many lengths: one recovery each, no peer but the lost one is blamed, the same tokens.

The kept outputs are replayed in steps of 128 positions and a shorter last one. The long form takes 60 lengths, beside two busy
processes:

    pytest -m slow tests/cluster/test_replay.py
"""

import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from real_daemons.mesh import Mesh, pull_model, running
from real_daemons.sites import LocalSite
from real_daemons.streams import Streaming, of_length

FIRST, ONE, OTHER = "h1", "h2", "h3"
"""The coordinator, which also has the first stage, and two peers with the layers of the second stage."""
ANSWER, BEFORE = 24, 8
"""Tokens of an answer in total, and before the loss."""
SHORT = (3, 121, 128, 262)
"""Known tokens at the loss: one step; a whole step and a tail of 1, of 8, and two whole steps and a tail of 14."""
LONG = sorted(random.Random(9).sample(range(1, 301), 60))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    pull_model()
    with running(LocalSite(3), tmp_path_factory.mktemp("replay"), ("--copies", "1")) as mesh:
        for peer in (ONE, OTHER):
            mesh.place(FIRST, stages_with(peer), 1024)
        yield mesh


@pytest.fixture
def busy() -> Iterator[None]:
    """Two processes that keep two cores busy, at the daemons' own priority."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in processes:
        process.kill()
        process.wait()


def stages_with(peer: str) -> str:
    return f"{FIRST}:0-14,{peer}:14-30"


def check_replay(mesh: Mesh, prompt: int, victim: str) -> None:
    """Freeze the second stage's peer in the middle of an answer, and check how the answer continues."""
    spec, stages = of_length(prompt, ANSWER), stages_with(victim)
    expected = Streaming(mesh.site, FIRST, spec, {"stages": stages}).end()
    streaming = Streaming(mesh.site, FIRST, spec, {"stages": stages})
    streaming.wait_for(BEFORE)
    mesh[victim].signal(signal.SIGSTOP)
    try:
        answer = streaming.end()
        story = mesh.story(answer.session)
    finally:
        mesh[victim].signal(signal.SIGCONT)
    told = "\n".join(map(str, story))
    assert answer.differences_from(expected) == [], told
    lost = next(row["id"] for row in mesh[victim].rows("peers") if row["name"] == victim)
    assert [line["method"] for line in story if line["what"] == "goes on"] == ["replay"], told
    assert [line["blame"] for line in story if line["what"] == "lost"] == [[lost]], told
    assert {line["blame"] for line in story if line["what"] == "failed"} <= {lost}, told
    mesh.wait_until_all_see()


@pytest.mark.parametrize("prompt", SHORT)
def test_a_lost_stage_is_replayed_with_one_recovery(mesh: Mesh, prompt: int) -> None:
    check_replay(mesh, prompt, ONE)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("busy")
def test_prompts_of_many_lengths_are_replayed_on_a_loaded_machine(mesh: Mesh) -> None:
    for number, prompt in enumerate(LONG):
        check_replay(mesh, prompt, (ONE, OTHER)[number % 2])
