"""After 1,000 sessions have come and gone, a daemon takes as much memory as at rest, seen from outside."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from real_daemons.mesh import MODEL, Mesh, pull_model, running
from real_daemons.sites import LocalSite
from texts.prompts import PROMPTS, SENTENCE

SESSIONS, AT_ONCE = 1000, 16
FIRST = 32
"""Sessions before the reading at rest: buffers of batches and of the longest prompts are made for the first of them."""
REST_S = 5.0
ALLOWED = 1.05


def ask(mesh: Mesh, numbers: range) -> None:
    """Run sessions of 1 to 4 tokens with prompts of 3 to 144 tokens, most of them short, several at a time."""

    def one(number: int) -> None:
        chance = random.Random(number)
        tokens = chance.randint(1, 4)
        prompt = SENTENCE * chance.choice((0,) * 18 + (3, 10)) + chance.choice(PROMPTS)
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": number % 2}
        answer = mesh["h1"].post("/v1/completions", body, 600.0)
        assert answer["usage"]["completion_tokens"] == tokens

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(one, numbers))


def at_rest(mesh: Mesh) -> float:
    """Wait until no session is left. Returns: the daemon's resident memory without mapped files, in MB."""
    time.sleep(REST_S)
    assert mesh["h1"].rows("sessions") == []
    return mesh["h1"].resident_bytes() / 1e6


@pytest.mark.slow
@pytest.mark.timeout(3600)  # for a hang only
def test_after_a_thousand_sessions_a_daemon_takes_the_memory_that_it_takes_at_rest(tmp_path: Path) -> None:
    pull_model()
    with running(LocalSite(1), tmp_path, ("--copies", "1", "--max-sessions", str(AT_ONCE))) as mesh:
        mesh.place("h1", "h1:0-30", 4096)
        loaded = at_rest(mesh)
        ask(mesh, range(FIRST))
        rest = at_rest(mesh)
        readings = []
        for begin in range(FIRST, FIRST + SESSIONS, SESSIONS // 4):
            ask(mesh, range(begin, begin + SESSIONS // 4))
            readings.append(at_rest(mesh))
        print(f"{loaded:.1f} MB loaded, {rest:.1f} MB after {FIRST} sessions, then each {SESSIONS // 4} sessions later {readings}")
        assert readings[-1] <= ALLOWED * rest
