"""The small network: every backend agrees with plain numpy, and one that computes wrongly does not."""

import numpy as np
import pytest

from meshd.doctor import numerics
from meshd.kernels.backend import Backend, LoadedLayers, Stage
from meshd.kernels.registry import available_backends, make_backend


@pytest.mark.parametrize("backend", [*available_backends(), "onnxruntime-exact"])
def test_each_backend_gives_the_reference_tokens(backend: str) -> None:
    result = numerics.check(backend, 1)
    assert result.right, result
    assert len(set(result.expected)) >= 3


class Wrong:
    """A backend whose scores are off by a part of the largest one."""

    def __init__(self, inner: Backend | LoadedLayers | Stage, share: float) -> None:
        self._inner, self._share = inner, share

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def load(self, *arguments: object, **options: object) -> "Wrong":
        return Wrong(self._inner.load(*arguments, **options), self._share)  # type: ignore[union-attr, arg-type]

    def stage(self, layers: object) -> "Wrong":
        return Wrong(self._inner.stage(layers), self._share)  # type: ignore[union-attr, arg-type]

    def logits(self, hidden: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        scores = self._inner.logits(hidden)  # type: ignore[union-attr]
        scores[:, 7] += self._share * np.max(np.abs(scores))
        return scores


@pytest.mark.parametrize("share", [0.05, 3.0])
def test_a_backend_with_wrong_scores_is_noticed(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "make_backend", lambda name, threads: Wrong(make_backend(name, threads), share))
    assert not numerics.check("torch", 1).right
