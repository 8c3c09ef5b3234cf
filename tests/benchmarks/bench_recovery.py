"""Measure the pause of an answer when a peer fails, on three hosts of an emulated LAN. Needs root.

    python tests/benchmarks/bench_recovery.py [--rounds 10] [--context 1000] [--threads 1]

An answer runs over all three peers, each with a third of the layers. The first peer is the coordinator, to which the client
connects. The second and the third peer take turns to fail: one of them is killed (SIGKILL) or frozen (SIGSTOP), with or without a
mirror of its KV. A peer that has a standby copy of the failed peer's layers (`--copies 2`) takes them over.

The pause is the client's longest wait for a token after the fault. For comparison, the benchmark also measures the time to first
token of a fresh prefill with the same context, over the same three peers. Every answer must equal one without faults.
"""

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from real_daemons.mesh import MODEL, Mesh, MeshBroken, pull_model, running
from real_daemons.sites import LabSite, find_netlab
from real_daemons.streams import Answer, Spec, Streaming, longest_gap_s, of_length, quantile

LAN = ("1gbit", "100us")
PARTS = ("0-10", "10-20", "20-30")
ANSWER, BEFORE = 96, 32
"""Tokens of an answer in total, and before the fault."""
FAULTS = {
    "kill -9, replay": (signal.SIGKILL, False),
    "kill -9, mirror": (signal.SIGKILL, True),
    "freeze, replay": (signal.SIGSTOP, False),
    "freeze, mirror": (signal.SIGSTOP, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--context", type=int, default=1000, help="tokens known at the time of the fault")
    parser.add_argument("--threads", type=int, default=1, help="threads of each peer; `meshd up` uses one per core")
    options = parser.parse_args()
    netlab = find_netlab()
    if isinstance(netlab, str):
        print(f"not measured: {netlab}")
        return
    pull_model()
    with tempfile.TemporaryDirectory() as folder:
        site = LabSite(netlab, 3)
        for name in site.names:
            site.shape(name, *LAN)
        with running(site, Path(folder), flags=("--copies", "2"), threads=options.threads) as mesh:
            Bench(mesh, options.context).run(options.rounds)


class Bench:
    """Runs rounds of faults. The two peers that may fail take turns."""

    def __init__(self, mesh: Mesh, context: int) -> None:
        self._mesh = mesh
        self._context = context
        self._entry, *self._others = mesh.site.names
        self._parts = dict(zip(mesh.site.names, PARTS, strict=True))
        self._stages = ",".join(f"{name}:{layers}" for name, layers in self._parts.items())
        self._spec = of_length(context - BEFORE, ANSWER)
        self._undisturbed: Answer | None = None
        self._steps: list[float] = []
        self._prefills: list[float] = []
        self._methods: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}

    def run(self, rounds: int) -> None:
        pauses: dict[str, list[float]] = {name: [] for name in FAULTS}
        self._mesh.place(self._entry, self._stages, self._context + 2 * ANSWER)
        self._undisturbed = self._ask(self._spec).end()
        for _ in range(rounds):
            for name in FAULTS:
                victim = self._ready()
                self._prefills.append(self._prefill())
                pauses[name].append(self._strike(victim, name))
        self._report(rounds, pauses)

    def _report(self, rounds: int, pauses: dict[str, list[float]]) -> None:
        peers = f"3 peers of {self._mesh.threads} thread{'s' * (self._mesh.threads > 1)}"
        print(f"{MODEL}, {self._context} tokens of context, {rounds} rounds, {peers}, {LAN[0]}, {LAN[1]} each way,")
        print(f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f} at the end")
        print(f"{'':18} {'p50':>8} {'p99':>8} {'longest':>8}  continued by")
        for name, values in [*pauses.items(), ("(fresh prefill)", self._prefills), ("(decode step)", self._steps)]:
            shown = " ".join(f"{1000 * quantile(values, share):5.0f} ms" for share in (0.5, 0.99, 1.0))
            how = ", ".join(f"{method} {count}" for method, count in self._methods.get(name, Counter()).items())
            print(f"{name:18} {shown}  {how}")

    def _ask(self, spec: Spec, *, mirror: bool = False) -> Streaming:
        return Streaming(self._mesh.site, self._entry, spec, {"stages": self._stages, "mirror": mirror})

    def _ready(self) -> str:
        """Wait until all peers are back and another peer has a copy of the next victim's layers. Returns: the victim's name."""
        self._others.reverse()
        victim = self._others[0]
        entry = self._mesh[self._entry]
        self._mesh.wait_until_all_see()
        self._mesh.place(self._entry, self._stages, self._context + 2 * ANSWER)

        def copied() -> bool:
            rows = [row for row in entry.rows_or_none("peers") if row["name"] != victim]
            return any(_covers(holding, self._parts[victim]) for row in rows for holding in row["holdings"])

        self._mesh.wait(copied, f"a copy of layers {self._parts[victim]}", entry)
        self._mesh.wait(lambda: not any(host.rows("sessions") for host in self._mesh), "the end of the last answer", entry)
        return victim

    def _prefill(self) -> float:
        """Measure the time to first token of a prefill of all tokens known at the time of the fault."""
        answer = self._ask(of_length(self._context, 2)).end()
        return answer.times[0] - answer.asked_at

    def _strike(self, victim: str, fault: str) -> float:
        number, mirror = FAULTS[fault]
        running = self._ask(self._spec, mirror=mirror)
        running.wait_for(BEFORE)
        at = time.monotonic()
        self._mesh[victim].signal(number)
        answer = running.end()
        assert self._undisturbed is not None
        if difference := answer.differences_from(self._undisturbed):
            raise MeshBroken(f"session {answer.session} continued wrongly: {difference}\n{self._mesh.story_text(answer.session)}")
        self._methods[fault].update(row["method"] for row in self._mesh.story(answer.session) if row["what"] == "goes on")
        self._steps += [later - earlier for earlier, later in pairwise(answer.times[:BEFORE])]
        if number is signal.SIGSTOP:
            self._mesh[victim].signal(signal.SIGCONT)
        else:
            self._mesh[victim].wait_for_exit(10)
            self._mesh[victim].start()
        return longest_gap_s(answer, at)


def _covers(holding: dict[str, Any], layers: str) -> bool:
    (start, end), (first, last) = ((int(edge) for edge in text.split("-")) for text in (holding["layers"], layers))
    return bool(holding["state"] == "active" and start <= first and end >= last)


if __name__ == "__main__":
    main()
