"""Measure how many tokens several clients get at once, and how much an arriving prompt disturbs them. Real daemons.

    python tests/benchmarks/bench_throughput.py [--clients 1 2 4 8 16] [--tokens 128] [--rounds 3] [--prompts 4] [--beside PYTHON]

Throughput: on one peer with two threads, and on two peers with one thread each that share the layers. Each round measures every
number of clients, so that changes of the machine's speed affect all. The clients send one request each at the same moment. The
benchmark prints the tokens/s of all clients together, the ratio to one client, and the median time to first token beside the time
that prefill alone takes for the prompts of all clients.

With `--beside`, each round on one peer measures llama.cpp's batched decode, too (`llama_cpp_decode.py`).

Prompts: on one peer, four clients decode, alone and while a prompt of 2,000 tokens is computed, in turns. The times per token are
compared at the same places of the answers, because a token takes longer behind a longer context. The time to first token of such a
prompt is printed beside that on an idle peer.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from real_daemons.mesh import MODEL, Mesh, http_to, pull_model, running
from real_daemons.sites import LocalSite

SITES = {"one peer": (1, 2, "h1:0-30"), "two peers": (2, 1, "h1:0-15,h2:15-30")}
"""Name -> number of peers, threads of each, stages."""
PROMPT_TOKENS, LONG_PROMPT_TOKENS = 30, 2000
DECODING, DECODED_TOKENS = 4, 1000
"""Number of clients that decode while a prompt is computed, and more tokens than they get meanwhile."""
_TIMEOUT_S = 300.0


@dataclass
class Stream:
    """One streamed answer: when it was asked for, and when each piece of text arrived, which is nearly always one token's."""

    asked: float = 0.0
    tokens: int = 0
    enough: threading.Event = field(default_factory=threading.Event)
    """Set to hang up before the end of the answer."""
    times: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.times[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.times)]


def ask(mesh: Mesh, stages: str, prompt: list[int], tokens: int, stream: Stream) -> None:
    """Ask for an answer and read it. `prompt`: token ids."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    stream.asked = time.perf_counter()
    connection, response = http_to(
        mesh.site, "h1", "POST", "/v1/completions", body | {"mesh": {"stages": stages}}, timeout_s=_TIMEOUT_S
    )
    with contextlib.closing(connection):
        if response.status != 200:
            raise SystemExit(f"{response.status}: {response.read()!r}")
        for line in response:
            event = json.loads(line[6:]) if line.startswith(b"data: {") else {}
            if event.get("usage"):
                stream.tokens = event["usage"]["completion_tokens"]
            elif event.get("choices") and event["choices"][0]["finish_reason"] is None:
                stream.times.append(time.perf_counter())
            if stream.enough.is_set():
                return
    if stream.tokens != tokens:
        raise SystemExit(f"an answer has {stream.tokens} tokens, not {tokens}")


def prompt_of(number: int, tokens: int) -> list[int]:
    """Return the ids of a prompt of its own."""
    return [(number * 7919 + place * 31) % 40_000 + 100 for place in range(tokens)]


def start(mesh: Mesh, stages: str, clients: int, tokens: int) -> tuple[list[Stream], list[threading.Thread]]:
    """Have several clients ask at the same moment. Returns: their streams, and the threads that read them."""
    streams = [Stream() for _ in range(clients)]
    threads = [
        threading.Thread(target=ask, args=(mesh, stages, prompt_of(number, PROMPT_TOKENS), tokens, stream))
        for number, stream in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    return streams, threads


def together(mesh: Mesh, stages: str, clients: int, tokens: int) -> tuple[float, list[Stream]]:
    """Have several clients ask at the same moment. Returns: tokens/s of all together, and their streams."""
    streams, threads = start(mesh, stages, clients, tokens)
    for thread in threads:
        thread.join()
    took_s = max(stream.times[-1] for stream in streams) - min(stream.asked for stream in streams)
    return clients * tokens / took_s, streams


def llama_cpp(python: str, file: Path, counts: list[int], tokens: int, threads: int) -> list[float]:
    """Measure llama.cpp with the same file. Returns: for each number of clients the tokens/s of all together."""
    script = Path(__file__).with_name("llama_cpp_decode.py")
    command = [python, script, file, "--prompt", PROMPT_TOKENS, "--tokens", tokens, "--threads", threads, "--clients", *counts]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp can't be measured: {done.stderr}")
    rates: list[float] = json.loads(done.stdout)
    return rates


def measure_throughput(
    name: str, counts: list[int], tokens: int, rounds: int, folder: Path, beside: Callable[[int], list[float]]
) -> None:
    """`beside`: measures another engine with so many threads. Returns: tokens/s for each number of clients; empty for none."""
    peers, threads, stages = SITES[name]
    others: list[list[float]] = []
    rates: dict[int, list[float]] = {count: [] for count in counts}
    waits: dict[int, list[float]] = {count: [] for count in counts}
    with running(LocalSite(peers), folder, threads=threads) as mesh:
        together(mesh, stages, 1, 8)
        for _ in range(rounds):
            for count in counts:
                rate, streams = together(mesh, stages, count, tokens)
                rates[count].append(rate)
                waits[count].append(statistics.median(stream.ttft_s for stream in streams))
            others.append(beside(threads))
        prefill = Stream()
        ask(mesh, stages, prompt_of(99, LONG_PROMPT_TOKENS // 4), 2, prefill)
        prefill_rate = LONG_PROMPT_TOKENS // 4 / prefill.ttft_s
    print(f"{name}, {threads} thread(s) each; prefill alone {prefill_rate:.0f} tok/s")
    print(f"{'clients':>8} {'tok/s':>8} {'x one':>6} {'TTFT p50':>9} {'of prompts / prefill':>21}" + " llama.cpp" * bool(others[0]))
    for place, count in enumerate(counts):
        rate, wait = statistics.median(rates[count]), statistics.median(waits[count])
        pairs = statistics.median(many / one for many, one in zip(rates[count], rates[counts[0]], strict=True))
        prompts_s = count * PROMPT_TOKENS / prefill_rate
        print(f"{count:8} {rate:8.1f} {pairs:6.2f} {1e3 * wait:6.0f} ms {wait / prompts_s:21.2f}", end="")
        print(f" {statistics.median(other[place] for other in others):9.1f}" if others[0] else "")


def measure_prompts(prompts: int, folder: Path) -> None:
    _, threads, stages = SITES["one peer"]
    usual: list[float] = []
    beside: list[float] = []
    arrived = [Stream() for _ in range(prompts)]
    with running(LocalSite(1), folder, threads=threads) as mesh:
        together(mesh, stages, 1, 8)
        alone = Stream()
        ask(mesh, stages, prompt_of(50, LONG_PROMPT_TOKENS), 2, alone)
        for number, stream in enumerate(arrived):
            with decoding(mesh, stages) as streams:
                before = [len(reader.times) for reader in streams]
                ask(mesh, stages, prompt_of(60 + number, LONG_PROMPT_TOKENS), 2, stream)
                after = [len(reader.times) for reader in streams]
            places = [slice(first, last - 1) for first, last in zip(before, after, strict=True)]
            beside += [gap for reader, own in zip(streams, places, strict=True) for gap in reader.gaps[own]]
            with decoding(mesh, stages) as streams:
                while any(len(reader.times) < last for reader, last in zip(streams, after, strict=True)):
                    time.sleep(0.01)
            usual += [gap for reader, own in zip(streams, places, strict=True) for gap in reader.gaps[own]]
    print(f"{DECODING} clients decode on one peer while {prompts} prompts of {LONG_PROMPT_TOKENS} tokens arrive, one at a time")
    for what, gaps in (("idle", usual), ("beside prompts", beside)):
        times = [statistics.fmean(gaps), *(statistics.quantiles(gaps, n=100)[place - 1] for place in (50, 90, 99))]
        named = zip(("mean", "p50", "p90", "p99"), times, strict=True)
        print(f"  {what:15} ms per token: " + ", ".join(f"{name} {1e3 * time_s:6.1f}" for name, time_s in named))
    print(f"  mean over idle {statistics.fmean(beside) / statistics.fmean(usual):.2f}, p90 {_p90(beside) / _p90(usual):.2f}")
    ttft = statistics.median(stream.ttft_s for stream in arrived)
    print(f"  TTFT of a prompt {ttft:.2f} s; on an idle peer {alone.ttft_s:.2f} s: {ttft / alone.ttft_s:.2f}")


@contextlib.contextmanager
def decoding(mesh: Mesh, stages: str) -> Iterator[list[Stream]]:
    """Have clients decode, all of which have a few tokens. Yields: their streams."""
    streams, threads = start(mesh, stages, DECODING, DECODED_TOKENS)
    while any(len(stream.times) < 10 for stream in streams):
        time.sleep(0.01)
    try:
        yield streams
    finally:
        for stream in streams:
            stream.enough.set()
        for thread in threads:
            thread.join()


def _p90(values: list[float]) -> float:
    return statistics.quantiles(values, n=10)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4, help="prompts of 2,000 tokens; 0 leaves that part out")
    parser.add_argument("--beside", metavar="PYTHON", help="an interpreter with llama-cpp-python, which is measured, too")
    parser.add_argument("--sites", nargs="+", choices=list(SITES), default=list(SITES))
    given = parser.parse_args()
    file = pull_model()

    def beside(threads: int) -> list[float]:
        return llama_cpp(given.beside, file, given.clients, given.tokens, threads) if given.beside else []

    print(
        f"{MODEL}, onnxruntime, {given.tokens} tokens greedy, {given.rounds} rounds, {platform.processor() or platform.machine()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in given.sites:
            at = Path(folder, name.replace(" ", "-"))
            one_peer = SITES[name][0] == 1
            measure_throughput(name, given.clients, given.tokens, given.rounds, at, beside if one_peer else lambda threads: [])
        if given.prompts:
            measure_prompts(given.prompts, Path(folder, "prompts"))


if __name__ == "__main__":
    main()
