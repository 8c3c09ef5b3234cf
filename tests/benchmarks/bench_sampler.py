"""Measure how long picking a token takes, and how long sorting the whole vocabulary for it would take, in the same run.

    python tests/benchmarks/bench_sampler.py [--vocab 49152 152064] [--repeat 100]

For each shape of the logits and each set of parameters, one line gives the shortest time of a pick (its finite check, weights,
filters and draw, in one thread) and how many times faster it is than a sort. The last lines compare a batch of 16 with 16 single
picks. The calls that a line compares alternate, so that other work on this machine disturbs both alike.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from logits import shaped_logits
from meshd.kernels.sampling.sampler import PickRequest, Sampler, pick_rows, uniform
from meshd.types import SamplingParams

SHAPES = {
    "flat": ("normal", 0.01),
    "normal": ("normal", 1.0),
    "wide": ("normal", 2.0),
    "zipf": ("zipf", 1.0),
    "peaked": ("peaked", 2.0),
    "one token": ("one token", 1.0),
    "tied": ("tied", 1.0),
    "all equal": ("normal", 0.0),
}
"""Shape and spread. From "flat" (0.9 of the probability needs nine tenths of the vocabulary) to "one token" (it needs one)."""
CASES = {
    "greedy": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "top_p 0.9, 20 logprobs": SamplingParams(top_p=0.9, logprobs=20),
    "top_k 40": SamplingParams(top_k=40),
    "top_k 40, top_p 0.9": SamplingParams(top_k=40, top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "top_p 0.9, min_p 0.05": SamplingParams(top_p=0.9, min_p=0.05),
    "temperature 0.7, top_p 0.9, 20 logprobs": SamplingParams(temperature=0.7, top_p=0.9, logprobs=20),
}
ROWS = 16


def sort_and_draw(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    """Pick a token by sorting the whole vocabulary in double precision."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / (params.temperature or 1))
    order = np.argsort(-weights, kind="stable")[: params.top_k or None]
    sums = np.cumsum(weights[order])
    ids = np.sort(order[: int(np.searchsorted(sums, params.top_p * sums[-1])) + 1])
    sums = np.cumsum(weights[ids])
    return int(ids[min(len(ids) - 1, int(np.searchsorted(sums, uniform(params.seed, position) * sums[-1], side="right")))])


def best_ms(works: Sequence[Callable[[int], object]], repeat: int) -> list[float]:
    """Call all `works` in turn, `repeat` times. Returns: the shortest time of each in milliseconds."""
    best = [float("inf")] * len(works)
    for position in range(repeat):
        for index, work in enumerate(works):
            began = time.perf_counter()
            work(position)
            best[index] = min(best[index], 1e3 * (time.perf_counter() - began))
    return best


def compare_picks(vocab: int, repeat: int) -> None:
    """Print how long each case takes for each shape, against sorting."""
    for shape, (name, spread) in SHAPES.items():
        logits = shaped_logits(name, vocab, spread)
        samplers = [Sampler(params) for params in CASES.values()]
        picks = [lambda position, s=sampler, x=logits: s.pick(x, position) for sampler in samplers]
        (sorting,) = best_ms([lambda position, x=logits: sort_and_draw(x, CASES["top_p 0.9"], position)], max(3, repeat // 20))
        for case, picked in zip(CASES, best_ms(picks, repeat), strict=True):
            print(f"{vocab} tokens, {shape}, {case}: {picked:.2f} ms; sorting takes {sorting:.1f} ms, {sorting / picked:.1f} times")


def compare_batch(vocab: int, repeat: int) -> None:
    """Print how long a batch takes, against the same rows one by one."""
    logits = np.stack([shaped_logits("peaked", vocab, 2.0, seed) for seed in range(ROWS)])
    for case in ("greedy", "top_p 0.9"):
        samplers = [Sampler(CASES[case]) for _ in range(ROWS)]
        batch, single = best_ms(
            [
                lambda position, s=samplers: pick_rows(logits, [PickRequest(sampler, position) for sampler in s]),
                lambda position, s=samplers: [sampler.pick(row, position) for sampler, row in zip(s, logits, strict=True)],
            ],
            repeat,
        )
        times = f"{batch:.2f} ms, one by one {single:.2f} ms, {single / batch:.2f} times"
        print(f"{vocab} tokens, {case}: {ROWS} rows in one call {times}")


def main() -> None:
    """Print one line for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 152064])
    parser.add_argument("--repeat", type=int, default=100)
    args = parser.parse_args()
    for vocab in args.vocab:
        compare_picks(vocab, args.repeat)
        compare_batch(vocab, args.repeat)


if __name__ == "__main__":
    main()
