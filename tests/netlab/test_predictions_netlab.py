"""Two daemons see that their link has changed. `pytest -s` prints the times: about 2 s, longer on a busy machine."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from real_daemons.mesh import Mesh, pull_model, running
from real_daemons.sites import LabSite

pytestmark = pytest.mark.netlab

SEEN_S = 20.0
"""How long the test waits. That it takes less than 5 s on an idle machine is shown by `tests/benchmarks/bench_predictions.py`."""
STAGES = "h1:0-15,h2:15-30"
HEARTBEAT_S = 0.5


@pytest.fixture
def mesh(netlab: Any, tmp_path: Path) -> Iterator[Mesh]:
    pull_model()
    with running(LabSite(netlab, 2), tmp_path, flags=("--copies", "1")) as mesh:
        mesh.place("h1", STAGES, 512)
        mesh.wait(lambda: len(mesh["h1"].rows("links")) == 2, "measured links", mesh["h1"])
        yield mesh


def hops_ms(mesh: Mesh) -> list[tuple[float, float]]:
    """Ask for a prediction. Returns: for the hop to the second host and the one back, milliseconds of a token and of a chunk."""
    body = {"model": "smollm2:135m", "context": 512, "mesh": {"stages": STAGES}}
    rows = mesh["h1"].post("/mesh/v1/plan", body)["hops"]
    return [(1000 * row["decode_s"], 1000 * row["prefill_chunk_s"]) for row in rows]


def seen_after_s(mesh: Mesh, condition: Callable[[list[tuple[float, float]]], bool]) -> float:
    began = time.monotonic()
    while not condition(hops := hops_ms(mesh)):
        if time.monotonic() - began > SEEN_S + HEARTBEAT_S:
            pytest.fail(f"after {time.monotonic() - began:.1f} s the hops are still {hops}")
        time.sleep(0.1)
    return time.monotonic() - began


def test_a_changed_link_is_seen_in_the_prediction(mesh: Mesh) -> None:
    def shape(rate: str, delay: str) -> None:
        for name in mesh.site.names:
            mesh.site.shape(name, rate, delay)

    shape("1gbit", "10ms")  # each host delays both directions: a round trip grows by 40 ms
    farther_s = seen_after_s(mesh, lambda hops: all(18 < token < 40 for token, _ in hops))
    shape("1gbit", "0ms")
    nearer_s = seen_after_s(mesh, lambda hops: all(token < 10 and chunk < 300 for token, chunk in hops))
    shape("4mbit", "0ms")  # a chunk of 128 tokens has 288 KiB: 590 ms
    slower_s = seen_after_s(mesh, lambda hops: 420 < hops[0][1] < 900)
    shape("1gbit", "0ms")  # on a busy machine the daemons, not the link, limit the transfer
    faster_s = seen_after_s(mesh, lambda hops: hops[0][1] < 300)
    print(
        f"\nseen in the prediction: a round trip that grew after {farther_s:.1f} s, shrank after {nearer_s:.1f} s; "
        f"a bandwidth that fell after {slower_s:.1f} s, rose after {faster_s:.1f} s"
    )
