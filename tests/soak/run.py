"""Run three real daemons for an hour under requests, restart one after another, and check that none of them grows.

    python -P tests/soak/run.py --minutes 60 [--restart-every 240] [--keep DIR]

Clients ask without a pause. Every few minutes one daemon is drained and started again, in turn; between restarts its resident
memory and its open descriptors are sampled. Memory that the daemon reserves for more layers, or for a split of them that it did not
compute before, is not growth: its own metric counts it, and it is freed when memory is short. The samples of one life of a daemon
are fitted by a line, after a warm-up: the growth in an hour that the line predicts must stay below the bound. The first daemon is
never restarted, so that one life is long enough. Prints the table, and exits with status 1 if a bound is passed or a request has
failed.
"""

import argparse
import contextlib
import json
import random
import re
import sys
import tempfile
import threading
import time
from bisect import bisect
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from statistics import linear_regression, median
from typing import TextIO

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from real_daemons.mesh import MODEL, Host, Mesh, MeshBroken, http_to, pull_model, running
from real_daemons.sites import LocalSite

SAMPLE_S = 2.0
WARM_UP, WARM_UP_ANSWERS = 0.35, 1000
"""What is left out of a life: allocators and caches fill up first, and the records of ended sessions, of which a daemon keeps the
latest 256 that it coordinated and 512 that it computed."""
MEMORY_BYTES_H, DESCRIPTORS_H = 24e6, 4.0
"""Largest growth in an hour. Resident memory moves by some megabytes with the allocator; a session's record that leaked would be
some 10 kB, and there are thousands of them in an hour."""
LEAST_S = 1200.0
"""A shorter life says too little about an hour: there, and where too few answers came, the end may be above the median by the
same bound."""
TOKENS = (4, 32)
_ASK_S = 120.0


@dataclass
class Life:
    """The samples of one process of a daemon."""

    name: str
    times: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """Answers of all daemons so far, at each sample."""
    memory: list[float] = field(default_factory=list)
    descriptors: list[float] = field(default_factory=list)

    @property
    def lasted_s(self) -> float:
        return self.times[-1] - self.times[0] if self.times else 0.0

    reserved: list[float] = field(default_factory=list)
    """Bytes that the daemon says it reserves, at each sample."""

    def add(self, at: float, answers: int, memory: int, descriptors: int, reserved: int) -> None:
        self.times.append(at)
        self.answers.append(answers)
        self.memory.append(memory)
        self.descriptors.append(descriptors)
        self.reserved.append(reserved)

    def verdict(self) -> tuple[str, list[str]]:
        """Return a row of the table, and a line for each bound that is passed."""
        first = bisect(self.times, self.times[0] + WARM_UP * self.lasted_s)
        filled = bisect(self.answers, self.answers[0] + WARM_UP_ANSWERS)
        fitted = self.lasted_s >= LEAST_S and filled < 0.8 * len(self.times)
        if fitted:
            first = max(first, filled)
        hours = [at / 3600 for at in self.times[first:]]
        unreserved = [memory - reserved for memory, reserved in zip(self.memory, self.reserved, strict=True)]
        problems, shown = [], []
        for what, values, bound, unit in (
            ("memory", [(value + self.reserved[-1]) / 1e6 for value in unreserved[first:]], MEMORY_BYTES_H / 1e6, "MB"),
            ("descriptors", self.descriptors[first:], DESCRIPTORS_H, ""),
        ):
            if fitted:
                growth = linear_regression(hours, values).slope
                shown.append(f"{what} {median(values):.0f} {unit}, {growth:+.1f} {unit} in an hour")
            else:
                growth = median(values[-5:]) - median(values)
                shown.append(f"{what} {median(values):.0f} {unit}, {growth:+.1f} {unit} at the end")
            if growth > bound:
                problems.append(f"{self.name}: {what} grows: {shown[-1]}; allowed: {bound:g} {unit}")
        shown.append(f"{(self.reserved[-1] - self.reserved[first]) / 1e6:+.1f} MB reserved")
        return f"{self.name}: {self.lasted_s:.0f} s, {len(self.times)} samples: " + "; ".join(shown), problems


class Soak:
    """One run."""

    def __init__(self, mesh: Mesh, minutes: float, restart_every_s: float, table: TextIO) -> None:
        self._mesh = mesh
        self._table = table
        self._until = time.monotonic() + 60 * minutes
        self._restart_every_s = restart_every_s
        self._in_service = {host.name for host in mesh}
        self._lives: list[Life] = []
        self._present = {host.name: self._born(host.name) for host in mesh}
        self._stopping = threading.Event()
        self.answers = 0
        self.failures: list[str] = []

    def go(self) -> list[str]:
        """Run until the end. Returns: a line for each problem."""
        threads = [threading.Thread(target=self._ask_always, args=(seed,)) for seed in range(2)]
        threads.append(threading.Thread(target=self._sample))
        for thread in threads:
            thread.start()
        try:
            self._restart_in_turn()
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join(_ASK_S)
        problems = list(self.failures)
        for life in sorted(self._lives, key=lambda life: (life.name, -life.lasted_s)):
            if life.lasted_s < 30:
                continue
            row, passed = life.verdict()
            print(row)
            problems += passed
        print(f"{self.answers} answers, {len(self.failures)} failed, {len(self._lives) - len(self._present)} restarts")
        return problems

    def _restart_in_turn(self) -> None:
        """Restart one daemon after another, but never the first one."""
        others, turn = [host.name for host in self._mesh][1:], 0
        while (left_s := self._until - time.monotonic()) > 0:
            time.sleep(min(self._restart_every_s, left_s))
            if self._until - time.monotonic() >= 30:
                self._restart(self._mesh[others[turn % len(others)]])
                turn += 1

    def _restart(self, host: Host) -> None:
        """Restart a daemon as an upgrade does: out of service, drained, stopped, started, seen."""
        name = host.name
        self._in_service.discard(name)
        other = next(each for each in self._mesh if each.name in self._in_service)
        other.post("/mesh/v1/drain", {"peer": name, "timeout_s": 60.0}, 70.0)
        self._present.pop(name)
        assert host.process is not None
        host.process.terminate()
        if host.wait_for_exit(90) is None:
            raise MeshBroken(f"{name} does not stop")
        host.start()
        self._mesh.wait(host.up, f"{name} to be up", host)
        self._mesh.wait_until_all_see()
        self._present[name] = self._born(name)
        self._in_service.add(name)
        print(f"{name} was restarted; {self.answers} answers so far", flush=True)

    def _born(self, name: str) -> Life:
        life = Life(name)
        self._lives.append(life)
        return life

    def _sample(self) -> None:
        while not self._stopping.wait(SAMPLE_S):
            for name, life in list(self._present.items()):
                host = self._mesh[name]
                with contextlib.suppress(OSError, AssertionError, HTTPException, MeshBroken):
                    assert host.process is not None
                    reserved = _reserved_bytes(host)
                    descriptors = len(list(Path(f"/proc/{host.process.pid}/fd").iterdir()))
                    memory = host.resident_bytes()
                    if memory:
                        life.add(time.monotonic(), self.answers, memory, descriptors, reserved)
                        row = int(time.time()), name, host.process.pid, self.answers, memory, descriptors, reserved
                        self._table.write(",".join(map(str, row)) + "\n")

    def _ask_always(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stopping.is_set():
            name = chance.choice(sorted(self._in_service))
            try:
                self._ask(name, chance)
                self.answers += 1
            except (OSError, HTTPException, MeshBroken, ValueError) as error:
                self.failures.append(f"a request to {name} failed: {error!r}")

    def _ask(self, name: str, chance: random.Random) -> None:
        """Ask for an answer, read as a stream or whole. Raises: MeshBroken if it is not whole."""
        tokens, streamed = chance.randint(*TOKENS), chance.random() < 0.5
        prompt = f"Tell me a story about the number {chance.randrange(10**6)}."
        body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": streamed}
        connection, response = http_to(self._mesh.site, name, "POST", "/v1/completions", body, timeout_s=_ASK_S)
        with contextlib.closing(connection):
            data = response.read()
        if response.status != 200:
            raise MeshBroken(f"{response.status} {data[:300]!r}")
        if streamed and not data.rstrip().endswith(b"data: [DONE]"):
            raise MeshBroken(f"the stream broke off: {data[-300:]!r}")
        if not streamed and json.loads(data)["usage"]["completion_tokens"] != tokens:
            raise MeshBroken(f"the answer has not {tokens} tokens: {data[-300:]!r}")


def _reserved_bytes(host: Host) -> int:
    """Return the bytes that a daemon says it reserves for weights and KV."""
    found = re.search(r"^meshd_memory_reserved_bytes (\S+)$", host.get("/metrics", SAMPLE_S), re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--restart-every", type=float, default=240.0, metavar="S")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder of state, logs and samples, which stays")
    given = parser.parse_args()
    pull_model()
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mesh = stack.enter_context(running(LocalSite(3), folder, ("--copies", "2", "--drain-timeout", "60")))
        table = stack.enter_context((folder / "samples.csv").open("w", buffering=1))
        table.write("time,daemon,process,answers,memory,descriptors,reserved\n")
        problems = Soak(mesh, given.minutes, given.restart_every, table).go()
        for problem in problems[:50]:
            print(f"PROBLEM: {problem}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
