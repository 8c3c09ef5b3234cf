"""Measure how long picking a token takes, and how long sorting the whole vocabulary for it would take, in the same run.

    python tests/benchmarks/bench_sampler.py [--vocab 49152 152064] [--repeat 20]

The logits have the shape of a language model's: a few likely tokens and a long tail. Each case prints one line with the best of all
repeats, which other work on this machine disturbs least.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from meshd.kernels.sampler import Sampler, uniform
from meshd.types import SamplingParams

CASES = {
    "temperature 1": SamplingParams(),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "top_k 40": SamplingParams(top_k=40),
    "top_k 40, top_p 0.9": SamplingParams(top_k=40, top_p=0.9),
    "top_p 0.9, 20 logprobs": SamplingParams(top_p=0.9, logprobs=20),
}


def logits_of(vocab: int) -> np.ndarray:
    """Returns: `[vocab]`, whose softmax gives 0.9 to some 50 tokens."""
    generator = np.random.default_rng(1)
    logits = generator.standard_normal(vocab) * 2
    logits[generator.integers(0, vocab, 50)] += 13
    return logits.astype(np.float32)


def plain(logits: np.ndarray, params: SamplingParams, position: int) -> int:
    """Sort the whole vocabulary in double precision."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-weights, kind="stable")[: params.top_k or None]
    sums = np.cumsum(weights[order])
    ids = np.sort(order[: int(np.searchsorted(sums, params.top_p * sums[-1])) + 1])
    sums = np.cumsum(weights[ids])
    return int(ids[min(len(ids) - 1, int(np.searchsorted(sums, uniform(params.seed, position) * sums[-1], side="right")))])


def best_ms(work: Callable[[int], object], repeat: int) -> float:
    """Returns: the shortest time of one call in milliseconds."""
    times = []
    for position in range(repeat):
        began = time.perf_counter()
        work(position)
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def main() -> None:
    """Print one line for each vocabulary and set of parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[49152, 152064])
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    for vocab in args.vocab:
        logits = logits_of(vocab)
        for name, params in CASES.items():
            sampler = Sampler(params)
            picked = best_ms(lambda position, sampler=sampler, logits=logits: sampler.pick(logits, position), args.repeat)
            sorted_ = best_ms(lambda position, params=params, logits=logits: plain(logits, params, position), args.repeat)
            print(
                f"{vocab} tokens, {name}: {picked:.2f} ms; sorting the vocabulary: {sorted_:.2f} ms, {sorted_ / picked:.1f} times"
            )


if __name__ == "__main__":
    main()
