"""Rotary position embedding, and torch's versions of small kernels."""

import numpy as np
import torch

from meshd.kernels import reference
from meshd.kernels.rope import Rope, base_frequencies
from meshd.kernels.torch.ops import rms_norm, rotate


def test_scores_depend_only_on_the_distance() -> None:
    rope, rng = Rope(base_frequencies(64, 100_000.0)), np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 64), dtype=np.float32)[:, None]

    def score(at: int, to: int) -> float:
        return float(np.sum(reference.rotate(q, *rope.rows(np.array([at]))) * reference.rotate(k, *rope.rows(np.array([to])))))

    np.testing.assert_allclose(score(7, 3), score(4007, 4003), rtol=1e-3)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_position_zero_is_no_rotation() -> None:
    cos, sin = Rope(base_frequencies(8, 10.0)).rows(np.array([0]))
    assert np.all(cos == 1)
    assert np.all(sin == 0)


def test_rows_follow_the_positions_asked_for() -> None:
    rope = Rope(base_frequencies(16, 10000.0))
    first = rope.rows(np.array([1, 2]))
    assert np.array_equal(rope.rows(np.array([2]))[0][0], first[0][1])
    assert np.array_equal(rope.rows(np.array([1, 2]))[1], first[1])


def test_dividing_a_frequency_lengthens_its_wave() -> None:
    plain, stretched = Rope(base_frequencies(4, 100.0)), Rope(base_frequencies(4, 100.0) / [1.0, 4.0])
    np.testing.assert_allclose(stretched.rows(np.array([8]))[0][0, 1], plain.rows(np.array([2]))[0][0, 1], rtol=1e-6)
    np.testing.assert_allclose(stretched.rows(np.array([8]))[0][0, 0], plain.rows(np.array([8]))[0][0, 0], rtol=1e-6)


def test_torch_versions_agree_with_the_reference() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 16), dtype=np.float32)
    cos, sin = Rope(base_frequencies(16, 10000.0)).rows(np.arange(5))
    turned = rotate(torch.from_numpy(x), torch.from_numpy(cos)[:, None], torch.from_numpy(sin)[:, None], halves=False)
    np.testing.assert_allclose(turned.numpy(), reference.rotate(x, cos, sin), rtol=1e-6, atol=1e-6)
    flat, weight = x.reshape(5, -1), rng.standard_normal(48, dtype=np.float32)
    normed = rms_norm(torch.from_numpy(flat), torch.from_numpy(weight), 1e-5).numpy()
    np.testing.assert_allclose(normed, reference.rms_norm(flat, weight, 1e-5), rtol=1e-5)
