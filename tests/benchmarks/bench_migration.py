"""Measure the pause when a running answer moves to another peer, compared with one decode step, for several context lengths.

    python tests/benchmarks/bench_migration.py [--rounds 5] [--contexts 256,1024,4096]

There are three peers on this machine, with one thread each. An answer runs over two of them, and its second stage is moved to the
third. The pause is the time from the last token before the change of plan to the first token after it. It is measured twice: as
the coordinator reports it, and as the client sees it (the longest gap around the move). The step is the median of the 16 steps
before the move. Every answer must equal an answer that was not moved.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from real_daemons.mesh import MODEL, Mesh, MeshBroken, pull_model, running
from real_daemons.sites import LocalSite
from real_daemons.streams import Streaming, of_length, quantile, step_s

BEFORE, ANSWER = 24, 96
"""Tokens of an answer before its move, and in total."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contexts", default="256,1024,4096", help="tokens known when the move begins")
    options = parser.parse_args()
    contexts = [int(part) for part in options.contexts.split(",")]
    pull_model()
    print(f"{MODEL}, 3 peers of one thread each on one machine, {options.rounds} rounds, {os.cpu_count()} cores of", end=" ")
    print(f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}; times in ms")
    print(f"{'context':>8} {'step':>7} {'pause p50':>10} {'steps':>6} {'longest':>8} {'steps':>6} {'at client':>10} {'steps':>6}")
    with tempfile.TemporaryDirectory() as folder, running(LocalSite(3), Path(folder)) as mesh:
        for context in contexts:
            measure(mesh, context, options.rounds)


def measure(mesh: Mesh, context: int, rounds: int) -> None:
    entry, second, third = mesh.site.names
    spec = of_length(context - BEFORE, ANSWER)
    for name in (second, third):
        mesh.place(entry, f"{entry}:0-15,{name}:15-30", context + 2 * ANSWER)
    undisturbed = Streaming(mesh.site, entry, spec, {"stages": f"{entry}:0-15,{second}:15-30"}).end()
    steps: list[float] = []
    reported: list[float] = []
    seen: list[float] = []
    for _ in range(rounds):
        second, third = third, second
        streaming = Streaming(mesh.site, entry, spec, {"stages": f"{entry}:0-15,{second}:15-30"})
        streaming.wait_for(BEFORE)
        began = time.monotonic()
        request = {"session": streaming.answer.session, "source": second, "target": third}
        moved = mesh[entry].post("/mesh/v1/migrate", request)
        ended = time.monotonic()
        answer = streaming.end()
        if difference := answer.differences_from(undisturbed):
            raise MeshBroken(f"session {answer.session} continued wrongly: {difference}\n{mesh.story_text(answer.session)}")
        if third not in moved["plan"]:
            raise MeshBroken(f"the answer was not moved to {third}: {moved}")
        steps.append(1000 * step_s(answer, began))
        reported.append(moved["pause_ms"])
        seen.append(1000 * max(b - a for a, b in pairwise(answer.times) if b > began and a < ended + 0.5))
    step = quantile(steps, 0.5)
    pause, longest, client = quantile(reported, 0.5), max(reported), quantile(seen, 0.5)
    shown = f"{pause:10.1f} {pause / step:6.2f} {longest:8.1f} {longest / step:6.2f} {client:10.1f} {client / step:6.2f}"
    print(f"{context:8} {step:7.1f} {shown}", flush=True)


if __name__ == "__main__":
    main()
