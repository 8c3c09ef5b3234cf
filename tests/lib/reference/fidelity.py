"""Measures how far a model's logits are from those of a reference, over real text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from meshd.kernels.backend import Segment, Stage
from meshd.models.files.gguf import GgufFile
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.types import ModelSpec
from tiny.kv import make_lease

F32 = npt.NDArray[np.float32]
ROWS = 32
"""Positions compared at once: with a vocabulary of 262,144 their logits take 34 MB."""
CHUNK = 128
"""Number of tokens in a prefill step."""
TEXT = Path(__file__).with_name("real_text.txt")
"""Prose (Carroll, Darwin, Verne: in the public domain), and this project's own documentation and code."""


def windows(file: GgufFile, positions: int, context: int) -> list[list[int]]:
    """Split the start of the text into windows of at most `context` tokens, `positions` in all.

    Each window begins with the tokens that the model expects at the start of a text, and is computed without the other windows.
    """
    tokenizer = tokenizer_from_gguf(file.metadata)
    start = tokenizer.encode("", add_special=True)
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special=False)
    size = context - len(start)
    count = -(-positions // context)
    assert len(ids) >= size * count, f"the text has {len(ids)} tokens, too few for {positions} positions"
    parts = [[*start, *ids[n * size : (n + 1) * size]] for n in range(count)]
    parts[-1] = parts[-1][: positions - (count - 1) * context]
    return parts


def stage_rows(stage: Stage, spec: ModelSpec, ids: Sequence[int], at_once: int = ROWS) -> Iterator[F32]:
    """Yield meshd's logits after each token, in parts of `[at_once, vocab]`."""
    lease = make_lease(spec, stage.layers, len(ids))
    parts = []
    for start in range(0, len(ids), CHUNK):
        chunk = np.asarray(ids[start : start + CHUNK], np.int32)
        parts.append(stage.forward(stage.embed(chunk), [Segment(lease, start, len(chunk))]))
    hidden = np.concatenate(parts)
    for start in range(0, len(hidden), at_once):
        yield stage.logits(hidden[start : start + at_once])


@dataclass(slots=True)
class Fidelity:
    """The differences between a model and the original, summed over the positions compared so far."""

    hits: list[bool] = field(default_factory=list)
    """For each position, whether both have the same most probable token."""
    divergence: float = 0.0
    """Sum of KL(original || model), in nats."""
    surprise: float = 0.0
    """Sum of -ln p(next token of the text), where p is the model's probability."""
    predicted: int = 0
    largest: float = 0.0
    """Largest absolute difference between two logits."""

    def add(self, original: F32, expected: torch.Tensor, rows: F32, following: Sequence[int]) -> None:
        """Add `n` positions. `original` and `rows` are the logits of the original and of the model, `[n, vocab]`.

        `expected`: the original's log-probabilities, `[n, vocab]`. `following`: the token after each position; the last position of
        a window has none.
        """
        found = log_probabilities(rows)
        self.hits += (original.argmax(-1) == rows.argmax(-1)).tolist()
        self.largest = max(self.largest, float(np.abs(original - rows).max()))
        self.surprise -= float(found[torch.arange(len(following)), torch.tensor(following)].sum())
        self.predicted += len(following)
        self.divergence += float((expected - found).mul_(expected.exp()).sum())

    @property
    def positions(self) -> int:
        return len(self.hits)

    @property
    def same_top(self) -> int:
        return sum(self.hits)

    @property
    def top_share(self) -> float:
        return self.same_top / self.positions

    @property
    def mean_divergence(self) -> float:
        return self.divergence / self.positions

    @property
    def perplexity(self) -> float:
        return math.exp(self.surprise / self.predicted)


def compare(ids: Sequence[int], original: Iterable[F32], others: Sequence[tuple[Fidelity, Iterable[F32]]]) -> None:
    """Add the positions of one window to each `Fidelity`. The logits of all models are read part by part, to save memory."""
    done = 0
    for parts in zip(original, *(rows for _, rows in others), strict=True):
        following = ids[done + 1 : done + 1 + len(parts[0])]
        expected = log_probabilities(parts[0])
        for (fidelity, _), rows in zip(others, parts[1:], strict=True):
            fidelity.add(parts[0], expected, rows, following)
        done += len(parts[0])


def log_probabilities(logits: F32) -> torch.Tensor:
    """Compute them in float64, so that a divergence of 1e-10 is not a rounding error."""
    return torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=-1)
