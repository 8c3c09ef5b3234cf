"""Measure one hop: the time from `send` in one process to the call of the handler in another, over loopback with TLS.

The peers are two processes with real identities. An activation is sent there and back; one hop is half of the round trip.

    python tests/benchmarks/bench_hop.py [--bytes 8192] [--count 5000] [--loop both]
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from meshd.agents.links.links import Links, LinkSettings
from meshd.clock import SystemClock
from meshd.protocol.identity import ClusterKey, load_identity
from meshd.protocol.messages import Hello, Step, StepKind, Steps
from meshd.protocol.transport import Address
from meshd.state import StateFolder
from meshd.types import PeerId, SessionId

_WARM_UP = 300


def _step(seq: int, payload_bytes: int) -> Steps:
    step = Step(
        session=SessionId("0" * 32),
        epoch=1,
        stage=1,
        seq=seq,
        start=seq,
        tokens=1,
        kind=StepKind.DECODE,
        sample=1,
        committed=seq + 1,
        size=payload_bytes,
    )
    return Steps(steps=(step,))


def _links(folder: Path, key: ClusterKey, on_up: "asyncio.Queue[PeerId]") -> Links:
    clock = SystemClock()
    identity = load_identity(StateFolder.open(folder), key, os.urandom)

    def up(peer: PeerId, hello: Hello, address: Address) -> None:
        on_up.put_nowait(peer)

    return Links(
        identity, folder.name, 1, LinkSettings(host="127.0.0.1", port=0), clock, up, lambda peer, reason: None, lambda text: None
    )


async def _serve(folder: Path, key: ClusterKey) -> None:
    links = _links(folder, key, asyncio.Queue())
    links.register(Steps, lambda peer, message, payload: links.send(peer, message, payload))
    print(links.bind(), flush=True)
    with contextlib.suppress(asyncio.CancelledError):
        await links.run()


async def _measure(folder: Path, key: ClusterKey, port: int, count: int, payload_bytes: int) -> list[float]:
    up: asyncio.Queue[PeerId] = asyncio.Queue()
    links = _links(folder, key, up)
    links.bind()
    now = SystemClock().monotonic
    payload = bytes(payload_bytes)
    hops: list[float] = []
    done = asyncio.Event()
    sent = 0.0

    def send_next(peer: PeerId) -> None:
        nonlocal sent
        sent = now()
        links.send(peer, _step(len(hops), payload_bytes), payload)

    def echoed(peer: PeerId, message: Steps, data: memoryview) -> None:
        hops.append((now() - sent) / 2)
        if len(hops) < count + _WARM_UP:
            # Send in a later iteration of the event loop, not from this handler: a stage too sends only after computing.
            asyncio.get_running_loop().call_soon(send_next, peer)
        else:
            done.set()

    links.register(Steps, echoed)
    async with asyncio.TaskGroup() as group:
        group.create_task(links.run())
        links.connect("127.0.0.1", port, "static")
        send_next(await up.get())
        await done.wait()
        await links.close("the benchmark has ended")
    return sorted(hops[_WARM_UP:])


def _run(loop: str, count: int, payload_bytes: int) -> None:
    factory = importlib.import_module("uvloop").new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, __file__, "--serve", root, "--loop", loop]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            with asyncio.Runner(loop_factory=factory) as runner:
                hops = runner.run(_measure(Path(root, "client"), _KEY, port, count, payload_bytes))
            server.terminate()
    p50, p99 = hops[len(hops) // 2], hops[len(hops) * 99 // 100]
    print(f"{loop:8} {payload_bytes} bytes: one hop p50 {p50 * 1e6:.0f} us, p99 {p99 * 1e6:.0f} us ({count} round trips)")


_KEY = ClusterKey(bytes(32))


def main() -> None:
    """Run the server process (with `--serve`) or the measurement, which starts the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=8192)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--loop", choices=["asyncio", "uvloop", "both"], default="both")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        factory = importlib.import_module("uvloop").new_event_loop if args.loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_serve(args.serve / "server", _KEY))
        return
    loops = ["asyncio"] + ["uvloop"] * (importlib.util.find_spec("uvloop") is not None)
    for loop in loops if args.loop == "both" else [args.loop]:
        _run(loop, args.count, args.bytes)


if __name__ == "__main__":
    main()
