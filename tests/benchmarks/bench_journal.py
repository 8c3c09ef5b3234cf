"""Measure the cost of the journal and of the KV mirror: tokens/s without and with each of them.

    python tests/benchmarks/bench_journal.py [--rounds 8] [--tokens 256]

All daemons run on this machine, with one thread each.

Journal: one peer computes the whole model. Without the journal it is alone in its cluster, so that there is no deputy. With the
journal there is a second peer, which is the deputy. The figure includes the other costs of a second peer (heartbeats, adverts).

Mirror: two peers compute an answer, without or with a third peer that has a copy of its KV. The journal is on in both cases.

The daemons share the cores of one machine, unlike on real devices.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from real_daemons.mesh import MODEL, Mesh, MeshBroken, pull_model, running
from real_daemons.sites import LocalSite
from real_daemons.streams import Streaming, of_length

PROMPT = 64
WHOLE, SPLIT = "h1:0-30", "h1:0-15,h2:15-30"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    pull_model()
    print(f"{MODEL}, {options.tokens} tokens greedy, {options.rounds} rounds, {os.cpu_count()} cores of", end=" ")
    print(f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        alone, two, three = (
            stack.enter_context(running(LocalSite(peers), Path(folder, str(peers)), flags=("--copies", "1"))) for peers in (1, 2, 3)
        )
        context = 2 * (PROMPT + options.tokens)
        for mesh in (alone, two):
            mesh.place("h1", WHOLE, context)
        for stages in (SPLIT, "h3:0-15,h2:15-30", "h1:0-15,h3:15-30"):
            three.place("h1", stages, context)

        def speed(mesh: Mesh, how: dict[str, Any]) -> float:
            answer = Streaming(mesh.site, "h1", of_length(PROMPT, options.tokens), how).end()
            copied = sum(line["what"] == "mirror caught up" for line in mesh.story(answer.session))
            if bool(copied) != how.get("mirror", False):
                raise MeshBroken(f"asked for {how}, but {copied} copies caught up:\n{mesh.story_text(answer.session)}")
            return (len(answer.times) - 1) / (answer.times[-1] - answer.times[0])

        compare("journal", options.rounds, lambda: speed(alone, {"stages": WHOLE}), lambda: speed(two, {"stages": WHOLE}))
        plain, mirrored = ({"stages": SPLIT, "mirror": mirror} for mirror in (False, True))
        compare("mirror", options.rounds, lambda: speed(three, plain), lambda: speed(three, mirrored))


def compare(name: str, rounds: int, without: Callable[[], float], with_it: Callable[[], float]) -> None:
    """Measure `rounds` pairs of speeds after a warm-up, and print the cost. The order within a pair alternates."""
    without(), with_it()
    pairs = []
    for number in range(rounds):
        first, second = (without, with_it) if number % 2 else (with_it, without)
        one, other = first(), second()
        pairs.append((one, other) if number % 2 else (other, one))
    plain, full = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratios = sorted(with_speed / plain_speed for plain_speed, with_speed in pairs)
    cost = 100 * (1 - statistics.median(ratios))
    print(f"{name:8} without {plain:7.2f} tokens/s, with {full:7.2f}: costs {cost:.1f} %", end=" ")
    print(f"(paired median; pairs from {100 * (1 - ratios[-1]):.1f} to {100 * (1 - ratios[0]):.1f} %)", flush=True)


if __name__ == "__main__":
    main()
