"""Measure what a compute thread gains by not waiting: two batches of which another process holds a part of the KV.

    python tests/benchmarks/bench_pause.py [--delay-ms 5] [--tokens 32] [--prompt 512] [--rounds 3] [--threads 1]

The model has the shape of SmolLM2-135M and random weights; one of its three KV heads is held by the other process, in every layer,
so that every layer ends in a cut. Two sessions compute at once on one peer, in batches of their own, because the layers of the
second one are in two stages. A line gives the time for both together (wall), the seconds of the compute thread for both, the
seconds that the session that waited longer has waited for answers, and the ratio of the wall to the larger of both; beside it, what
the same two sessions take one after the other. A session alone computes and waits in turn: the ratio can't be below the sum of its
own compute and waiting, divided by the larger of both.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from bench_kernels import SMOLLM2

from meshd.errors import MeshdError
from meshd.kernels.attention.tree import Part
from meshd.kernels.backend import AttendRequest, RemoteRun
from meshd.kernels.measure import SyntheticWeights
from meshd.kernels.registry import make_backend
from meshd.protocol.messages import Message, Open
from meshd.types import LayerRange, PeerId, SessionId
from shards.clients import HOLDERS
from shards.process import Manner, ShardProcess, shard_process
from stage_mesh import driver
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer

LAYERS = LayerRange(0, SMOLLM2.layers)
RUN = RemoteRun(LAYERS, range(16), (2, 3))
CHUNK = 128
CUTS = (("0-30",), ("0-15", "15-30"))
"""The stages of the two sessions."""
driver.WAIT_S = 300.0


@dataclass(slots=True)
class Client:
    """Implements `ShardClient`, and adds up how long its session waits."""

    process: ShardProcess
    name: str
    waited_s: dict[SessionId, float]
    session: SessionId
    runs: tuple[RemoteRun, ...] = (RUN,)

    def holder_of(self, run: RemoteRun) -> PeerId:
        return HOLDERS[0]

    def ask(self, request: AttendRequest, answer: Callable[[Part | MeshdError], None]) -> None:
        asked = time.perf_counter()

        def answered(part: Part | MeshdError) -> None:
            self.waited_s[self.session] = self.waited_s.get(self.session, 0.0) + time.perf_counter() - asked
            answer(part)

        self.process.send(self.name, request, answered)


class Session(Driver):
    """One of the sessions."""

    def __init__(self, mesh: StageMesh, at: StagePeer, number: int, prompt: int, tokens: int) -> None:
        ids = np.random.default_rng(number).integers(0, SMOLLM2.vocab, prompt).tolist()
        super().__init__(mesh, at, ids, tokens, temperature=0.0)
        self.session = SessionId(f"{number:032x}")
        self.chunk, self.lease_ms, self.cuts = CHUNK, 60_000, CUTS[number % 2]

    def _on_message(self, sender: PeerId, message: Message) -> None:
        if getattr(message, "session", self.session) == self.session:
            super()._on_message(sender, message)


@dataclass
class Times:
    """Seconds of one measurement."""

    wall_s: float
    compute_s: float
    waited_s: float
    """Of the session that waited longer."""

    @property
    def ratio(self) -> float:
        return self.wall_s / max(self.compute_s, self.waited_s)


class Bench:
    """A peer, the holder in another process, and sessions between both."""

    def __init__(self, mesh: StageMesh, process: ShardProcess) -> None:
        self.mesh, self.process = mesh, process
        self.peer = mesh.start("a", f"0-{LAYERS.end}", blocks=256, spare=64 << 20)
        self.waited_s: dict[SessionId, float] = {}
        self.peer.host._opener.shards_of = self._client
        self._sessions = 0

    def _client(self, message: Open) -> Client:
        return Client(self.process, f"{message.session} {message.stage}", self.waited_s, message.session)

    def _computed_s(self) -> float:
        samples = [sample for metric in self.peer.host.telemetry.registry.collect() for sample in metric.samples]
        return sum(sample.value for sample in samples if sample.name == "meshd_stage_seconds_sum")

    async def pair(self, prompt: int, tokens: int, *, decode: bool, at_once: bool) -> Times:
        """Measure two sessions: their decoding after the prompt, or only the prompt."""
        sessions = [Session(self.mesh, self.peer, self._sessions + number, prompt, tokens if decode else 1) for number in range(2)]
        self._sessions += 2
        for session in sessions:
            session.credit = 1 if decode else session.max_tokens
            await session.open(*((self.peer, layers) for layers in session.cuts))
            if decode:
                session.send_prompt()
                await session.wait_tokens(1)
        self.waited_s.clear()
        before, began = self._computed_s(), time.perf_counter()

        async def run(session: Session) -> None:
            if decode:
                session.grant(session.max_tokens)
            else:
                session.send_prompt()
            await session.wait_tokens(session.max_tokens)

        if at_once:
            await asyncio.gather(*map(run, sessions))
        else:
            for session in sessions:
                await run(session)
        wall_s = time.perf_counter() - began
        for session in sessions:
            await session.close(self.peer)
            self.peer.listeners.remove(session._on_message)
        self.peer.inbox.clear()
        self.peer.links.sent.clear()
        return Times(wall_s, self._computed_s() - before, max(self.waited_s.values()))


async def measure(options: argparse.Namespace, process: ShardProcess) -> None:
    loaded = make_backend("onnxruntime", options.threads).load(
        SMOLLM2, LAYERS, SyntheticWeights(SMOLLM2), embedding=True, head=True
    )
    process.attach()
    process.manner = Manner(options.delay_ms)
    async with StageMesh(SMOLLM2, loaded) as mesh:
        bench = Bench(mesh, process)
        await bench.pair(CHUNK, 2, decode=True, at_once=True)  # the first steps are slower
        for what, prompt, decode in (("decode", CHUNK, True), ("prefill", options.prompt, False)):
            together: list[Times] = []
            apart: list[Times] = []
            for _ in range(options.rounds):
                together.append(await bench.pair(prompt, options.tokens, decode=decode, at_once=True))
                apart.append(await bench.pair(prompt, options.tokens, decode=decode, at_once=False))
            size = f"{options.tokens} tokens" if decode else f"{prompt} tokens in chunks of {CHUNK}"
            both = sorted(together, key=lambda times: times.ratio)[len(together) // 2]
            alone_s = statistics.median(times.wall_s for times in apart)
            print(
                f"{what}, 2 x {size}, {options.delay_ms:g} ms a cut: wall {both.wall_s:.2f} s, compute {both.compute_s:.2f} s, "
                f"waiting {both.waited_s:.2f} s; wall / the larger: {both.ratio:.2f} "
                f"(of {options.rounds} rounds: {', '.join(f'{times.ratio:.2f}' for times in together)}); "
                f"one after the other {alone_s:.2f} s, {alone_s / both.wall_s:.2f} x as long; "
                f"both at once take {2 * both.wall_s / alone_s:.2f} x as long as one of them alone",
                flush=True,
            )
    process.detach()
    loaded.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with shard_process(SMOLLM2, 2048) as process:
        asyncio.run(measure(options, process))


if __name__ == "__main__":
    main()
