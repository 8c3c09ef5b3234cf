"""Measure the cost of a split: tokens/s on one peer and on two peers. Each peer is a real daemon with one thread.

    python tests/benchmarks/bench_split.py [--tokens 128] [--rounds 4]

Each round measures one peer, then two, so that changes of the machine's speed affect both. For one peer and for two, the benchmark
prints medians over the rounds: the measured tokens/s, the tokens/s that the planner predicted, and the tokens/s computed from parts
measured in the same round, which are the mean decode step of each stage, the hops between stages, and the hop back to the first.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from meshd.config import Settings
from real_daemons.cluster import MODEL, Cluster

PLANS = {"one peer": "a:0-30", "two peers": "a:0-15,b:15-30"}
PROMPT = "Once upon a time, in a small village by the sea,"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), Settings()["cache"].value)
        try:
            cluster.start("a", "b")
            cluster.see_each_other()
            measure(cluster, options.tokens, options.rounds)
        finally:
            cluster.close()


def measure(cluster: Cluster, tokens: int, rounds: int) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in PLANS}
    predicted: dict[str, list[float]] = {name: [] for name in PLANS}
    summed: dict[str, list[float]] = {name: [] for name in PLANS}
    for stages in PLANS.values():
        ask(cluster, stages, 8)
    for _ in range(rounds):
        for name, stages in PLANS.items():
            before = stage_totals(cluster)
            tpot_s, predicted_s = ask(cluster, stages, tokens)
            after = stage_totals(cluster)
            steps = max(after[key][1] - before.get(key, (0.0, 0.0))[1] for key in after)
            compute_s = sum(after[key][0] - before.get(key, (0.0, 0.0))[0] for key in after) / steps
            speeds[name].append(1 / tpot_s)
            predicted[name].append(1 / predicted_s)
            summed[name].append(1 / (compute_s + hops_s(cluster, stages)))
    print(f"{MODEL}, {tokens} tokens greedy, {rounds} rounds, one thread a peer, {platform.processor() or platform.machine()}")
    print(f"{'':10} {'tokens/s':>9} {'stages + hops':>14} {'of it':>6} {'predicted':>10} {'of it':>6}")
    for name in PLANS:
        real, parts, plan = (statistics.median(values[name]) for values in (speeds, summed, predicted))
        print(f"{name:10} {real:9.2f} {parts:14.2f} {real / parts:6.3f} {plan:10.2f} {real / plan:6.3f}")
    pairs = [two / one for one, two in zip(speeds["one peer"], speeds["two peers"], strict=True)]
    print(f"two peers over one peer, paired: {statistics.median(pairs):.3f} (from {min(pairs):.3f} to {max(pairs):.3f})")
    links = {f"{row['source_name']}->{row['target_name']}": f"{1e6 * row['hop_s']:.0f} us" for row in cluster["a"].rows("links")}
    print(f"hops: {links}")


def ask(cluster: Cluster, stages: str, tokens: int) -> tuple[float, float]:
    """Send one request. Returns: the TPOT that the coordinator measured and the predicted TPOT, in seconds."""
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"mesh": {"stages": stages}}
    before = tpot_total(cluster)
    status, document, headers = cluster["a"].post_raw("/v1/completions", body)
    if status != 200:
        raise SystemExit(f"{stages}: {document}")
    total, count = tpot_total(cluster)
    return (total - before[0]) / (count - before[1]), float(headers["x-meshd-predicted-tpot-ms"]) / 1000


def tpot_total(cluster: Cluster) -> tuple[float, int]:
    values = metrics(cluster["a"].api)
    return values["meshd_tpot_seconds_sum"], int(values["meshd_tpot_seconds_count"])


def stage_totals(cluster: Cluster) -> dict[str, tuple[float, float]]:
    """Read each stage's decode time so far, as (seconds, steps). The keys contain the peer's name and the layers."""
    totals = {}
    for daemon in cluster.daemons.values():
        values = metrics(daemon.api)
        for key, total in values.items():
            if key.startswith("meshd_stage_seconds_sum{") and 'phase="decode"' in key:
                totals[daemon.name + key.partition("{")[2]] = (total, values[key.replace("_sum{", "_count{")])
    return totals


def hops_s(cluster: Cluster, stages: str) -> float:
    """Add up the hops between consecutive stages and the hop back to the first stage, in seconds."""
    peers = [part.partition(":")[0] for part in stages.split(",")]
    if len(peers) == 1:
        return 0.0
    hops = {(row["source_name"], row["target_name"]): row["hop_s"] for row in cluster["a"].rows("links")}
    return sum(hops[pair] for pair in zip(peers, [*peers[1:], peers[0]], strict=True))


def metrics(api: str) -> dict[str, float]:
    with urllib.request.urlopen(api + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {key: float(value) for key, _, value in pairs}


if __name__ == "__main__":
    main()
