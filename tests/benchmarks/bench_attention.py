"""Measure attention over spans of several sizes as ratios to attention in a single pass over all keys.

    python tests/benchmarks/bench_attention.py [--seconds 2] [--span 128 256 512 1024]

Each case prints one line: the median time of the single pass, and for each size the median of the ratios of runs that followed one
another, above 1 if spans are slower. One token is a decode step; a prefill has chunks of 128 tokens, of which the last is measured.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from meshd.kernels.attention.spans import attend
from meshd.kernels.backend import AttentionRule
from meshd.kernels.threads import limit_torch_threads

SHAPES = (
    ("SmolLM2-135M", 9, 3, 64, 0),
    ("Llama 1.1B", 32, 4, 64, 0),
    ("Gemma 3 270M", 4, 1, 256, 0),
    ("Gemma 3 270M, window", 4, 1, 256, 512),
)
"""Name, heads, KV heads, head_dim, window."""
CASES = ((1, 128), (1, 600), (1, 2048), (1, 8192), (128, 128), (128, 2048))
"""Tokens, and keys with the tokens' own."""
SINGLE_PASS = 1 << 20
"""A span that holds all keys of every case."""


def ratios(single: Callable[[], object], others: list[Callable[[], object]], seconds: float) -> tuple[float, list[float]]:
    """Time functions in turns, each round in the opposite order of the one before.

    Returns: the median time of `single` in seconds, and for each of the others the median of its ratios to `single`.
    """
    functions = [single, *others]
    rounds: list[list[float]] = []
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        taken = [0.0] * len(functions)
        for index in range(len(functions))[:: -1 if len(rounds) % 2 else 1]:
            started = time.perf_counter()
            functions[index]()
            taken[index] = time.perf_counter() - started
        rounds.append(taken)
    medians = [statistics.median(taken[index] / taken[0] for taken in rounds) for index in range(1, len(functions))]
    return statistics.median(taken[0] for taken in rounds), medians


def bench(name: str, heads: int, kv_heads: int, head_dim: int, window: int, sizes: list[int], seconds: float) -> None:
    rng, rule = np.random.default_rng(0), AttentionRule(window=window)
    for tokens, context in CASES:
        keys = -(-context // 32) * 32  # whole blocks, as a pool gives them
        k, v = (rng.standard_normal((keys, kv_heads, head_dim), dtype=np.float32) for _ in range(2))
        q = rng.standard_normal((tokens, heads, head_dim), dtype=np.float32)

        def over(
            span: int, q: np.ndarray = q, k: np.ndarray = k, v: np.ndarray = v, start: int = context - tokens
        ) -> Callable[[], object]:
            return lambda: attend(q, k, v, start, rule, span)

        single_s, found = ratios(over(SINGLE_PASS), [over(span) for span in sizes], seconds)
        parts = "  ".join(f"{span}: {ratio:.2f}" for span, ratio in zip(sizes, found, strict=True))
        print(f"{name:21s} {tokens:4d} tokens, {context:5d} keys: {single_s * 1e6:7.0f} us   {parts}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--span", nargs="+", type=int, default=[128, 256, 512, 1024])
    options = parser.parse_args()
    limit_torch_threads()
    for shape in SHAPES:
        bench(*shape, sizes=options.span, seconds=options.seconds)


if __name__ == "__main__":
    main()
