"""Compare predicted with measured TTFT and TPOT while the links between hosts change. Needs root.

    python tests/benchmarks/bench_predictions.py [--hosts 2 3] [--rtt 0.3 5 20] [--rate 1gbit 100mbit 20mbit] [--context 128 1500]

A model is split evenly over hosts in network namespaces, with one daemon of one thread on each. Then all links change while the
daemons run. Five seconds later an answer for each context is streamed to a client on the first host, and the prediction in its
headers is compared with the times at which its tokens arrive. A short prompt is asked for three times, and the medians of the three
are what was measured: other work on this machine easily doubles the time of one. The prediction is that of the first. Each link
follows a different one, so all changes happen, in both directions. The error is `predicted / measured - 1`.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from real_daemons.mesh import MODEL, Mesh, pull_model, running
from real_daemons.sites import LabSite, find_netlab
from real_daemons.streams import Streaming, of_length, quantile

LAYERS = 30
SETTLE_S = 5.0
ANSWER = 24
SHORT, TIMES = 512, 3
"""Up to which prompt length an answer is asked for so many times."""


@dataclass(frozen=True)
class Row:
    """One answer."""

    hosts: int
    rtt_ms: float
    rate: str
    context: int
    load: float
    ttft_s: float
    predicted_ttft_s: float
    tpot_s: float
    predicted_tpot_s: float

    @property
    def errors(self) -> tuple[float, float]:
        """Errors of TTFT and TPOT, as fractions of what was measured."""
        return self.predicted_ttft_s / self.ttft_s - 1, self.predicted_tpot_s / self.tpot_s - 1

    def text(self) -> str:
        ttft, tpot = self.errors
        link = f"{self.hosts} hosts, {self.rtt_ms:4} ms, {self.rate:>7}, {self.context:4} tokens"
        return (
            f"{link}: TTFT {1000 * self.predicted_ttft_s:6.0f} for {1000 * self.ttft_s:6.0f} ms ({ttft:+4.0%}), "
            f"TPOT {1000 * self.predicted_tpot_s:5.1f} for {1000 * self.tpot_s:5.1f} ms ({tpot:+4.0%}), load {self.load:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--rtt", type=float, nargs="+", default=[0.3, 5, 20], metavar="MS", help="round trips of the links")
    parser.add_argument("--rate", nargs="+", default=["1gbit", "100mbit", "20mbit"], help="bandwidths of the links")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1500], metavar="TOKENS", help="lengths of the prompts")
    parser.add_argument("--seed", type=int, default=1, help="order of the links")
    options = parser.parse_args()
    netlab = find_netlab()
    if isinstance(netlab, str):
        print(f"not measured: {netlab}")
        return
    pull_model()
    links = list(product(options.rtt, options.rate))
    random.Random(options.seed).shuffle(links)
    rows: list[Row] = []
    for hosts in options.hosts:
        with tempfile.TemporaryDirectory() as folder:
            site = LabSite(netlab, hosts)
            with running(site, Path(folder), flags=("--copies", "1")) as mesh:
                for row in measure(mesh, links, options.context):
                    print(row.text(), flush=True)
                    rows.append(row)
    report(rows)


def measure(mesh: Mesh, links: Sequence[tuple[float, str]], contexts: Sequence[int]) -> Iterator[Row]:
    """Yield a row for each link and context, in turns."""
    entry = mesh.site.names[0]
    stages = even_split(mesh.site.names)
    mesh.place(entry, stages, max(contexts) + 2 * ANSWER)
    for context in contexts:
        ask(mesh, stages, context)
    for number, (rtt_ms, rate) in enumerate(links):
        for name in mesh.site.names:
            mesh.site.shape(name, rate, f"{1000 * rtt_ms / 4:.0f}us")  # a round trip passes four ends of links
        time.sleep(SETTLE_S)
        for context in contexts:
            load = os.getloadavg()[0]
            answers = [ask(mesh, stages, context, seed=number) for _ in range(TIMES if context <= SHORT else 1)]
            ttft_s, tpot_s = (statistics.median(answer[what] for answer in answers) for what in (0, 2))
            yield Row(len(mesh.site.names), rtt_ms, rate, context, load, ttft_s, answers[0][1], tpot_s, answers[0][3])


def even_split(names: Sequence[str]) -> str:
    cuts = [round(LAYERS * place / len(names)) for place in range(len(names) + 1)]
    return ",".join(f"{name}:{first}-{last}" for name, first, last in zip(names, cuts, cuts[1:], strict=False))


def ask(mesh: Mesh, stages: str, context: int, seed: int = 0) -> tuple[float, float, float, float]:
    """Stream one answer. Returns: measured and predicted TTFT, measured and predicted TPOT, in seconds."""
    entry = mesh.site.names[0]
    answer = Streaming(mesh.site, entry, of_length(context, ANSWER, seed), {"stages": stages}, inside=True).end()
    ttft_s = answer.times[0] - answer.asked_at
    tpot_s = (answer.times[-1] - answer.times[0]) / (len(answer.times) - 1)
    predicted = answer.predicted
    return ttft_s, predicted["ttft"], tpot_s, predicted["tpot"]


def report(rows: Sequence[Row]) -> None:
    print(f"{MODEL}, one thread a peer, {ANSWER} tokens, {SETTLE_S:.0f} s after each change, {os.cpu_count()} cores")
    for index, what in enumerate(("TTFT", "TPOT")):
        errors = sorted(abs(row.errors[index]) for row in rows)
        within = sum(error <= 0.35 for error in errors)
        print(
            f"{what}: median error {statistics.median(errors):.0%}, nine of ten within {quantile(errors, 0.9):.0%}, "
            f"worst {errors[-1]:.0%}; {within} of {len(errors)} within 35 %"
        )


if __name__ == "__main__":
    main()
