"""Numerics ids on this machine: equal where bits are equal, and different where one bit differs."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import meshd
from meshd.kernels.backend import F32, Backend
from meshd.kernels.numerics.fixed_networks import FixedWeights, fixed_networks, random_weights
from meshd.kernels.numerics.measure_id import compute, measure_numerics
from meshd.kernels.ort.session import OrtSession
from meshd.kernels.registry import make_backend
from meshd.kernels.weights.load import KINDS, check_finite, dequantise
from meshd.numerics import NumericsId, is_promised
from meshd.types import Tensor


@pytest.fixture(scope="module")
def measured() -> NumericsId:
    return measure_numerics(make_backend("onnxruntime", 2))


def test_the_id_names_backend_precision_and_span_and_promises_what_was_found(measured: NumericsId) -> None:
    backend, precision, span, digest = measured.split("/")
    assert (backend, precision, span, len(digest)) == ("onnxruntime", "int8", "512", 16)
    assert is_promised(measured)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_id_depends_on_no_number_of_threads(measured: NumericsId, threads: int) -> None:
    assert measure_numerics(make_backend("onnxruntime", threads)) == measured


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_another_process_finds_the_same_id(name: str) -> None:
    code = (
        "from meshd.kernels.numerics.measure_id import measure_numerics\n"
        "from meshd.kernels.registry import make_backend\n"
        f"print(measure_numerics(make_backend({name!r}, 2)))"
    )
    root = Path(meshd.__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=100, check=True)
    assert run.stdout.strip() == measure_numerics(make_backend(name, 2))


def test_backends_and_precisions_have_ids_of_their_own(measured: NumericsId) -> None:
    exact, torch = (measure_numerics(make_backend(name, 2)) for name in ("onnxruntime-exact", "torch"))
    assert exact.startswith("onnxruntime/f32/512/")
    assert torch.startswith("torch/f32/512/")
    assert len({each.split("/")[3] for each in (measured, exact, torch)}) == 3


def flip_a_bit(results: list[F32]) -> list[F32]:
    """Change the last bit of one value of the first result."""
    changed = [result.copy() for result in results]
    bits = changed[0].reshape(-1).view(np.uint32)
    bits[len(bits) // 2] ^= 1
    return changed


@pytest.mark.parametrize("call", [0, 250])
def test_one_bit_of_one_product_changes_the_id(monkeypatch: pytest.MonkeyPatch, measured: NumericsId, call: int) -> None:
    calls, run = 0, OrtSession.run

    def flipped(self: OrtSession, outputs: Sequence[str], inputs: Mapping[str, F32]) -> list[F32]:
        nonlocal calls
        results = run(self, outputs, inputs)
        calls += outputs == ("logits",)
        return flip_a_bit(results) if calls == call + 1 and outputs == ("logits",) else results

    monkeypatch.setattr(OrtSession, "run", flipped)
    changed = measure_numerics(make_backend("onnxruntime", 2))
    assert calls > call
    assert changed.split("/")[3] != measured.split("/")[3]


@pytest.mark.parametrize("outputs", [("q", "k", "v"), ("hidden", "q", "k", "v")])
def test_one_bit_in_every_result_inside_the_layers_changes_the_id(
    monkeypatch: pytest.MonkeyPatch, measured: NumericsId, outputs: tuple[str, ...]
) -> None:
    run = OrtSession.run

    def flipped(self: OrtSession, asked: Sequence[str], inputs: Mapping[str, F32]) -> list[F32]:
        results = run(self, asked, inputs)
        return flip_a_bit(results) if asked == outputs else results

    monkeypatch.setattr(OrtSession, "run", flipped)
    assert measure_numerics(make_backend("onnxruntime", 2)).split("/")[3] != measured.split("/")[3]


def test_a_backend_whose_single_rows_differ_makes_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    run = OrtSession.run

    def other_alone(self: OrtSession, outputs: Sequence[str], inputs: Mapping[str, F32]) -> list[F32]:
        results = run(self, outputs, inputs)
        alone = len(next(iter(inputs.values()))) == 1
        return [np.nextafter(result, np.float32(np.inf)) for result in results] if alone else results

    monkeypatch.setattr(OrtSession, "run", other_alone)
    assert not is_promised(measure_numerics(make_backend("onnxruntime", 1)))


def test_the_networks_cover_every_kind_and_what_the_families_differ_in() -> None:
    networks = fixed_networks()
    specs = [network.spec for network in networks]
    assert {kind for network in networks for kind in network.kinds} == set(KINDS)
    assert {spec.activation for spec in specs} == {"silu", "gelu_tanh", "clamped"}
    assert {spec.qk_norm for spec in specs} == {"", "head", "all"}
    for name in ("window", "sinks", "attention_soft_cap", "logit_soft_cap", "experts", "biases", "post_norm", "rope_dim", "fused"):
        assert {bool(getattr(spec, name)) for spec in specs} == {True, False}, name
    assert any(network.tokens > 2 * 512 for network in networks)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_every_kind_are_finite_spread_and_always_the_same(kind: str) -> None:
    made = [random_weights(kind, 4096, np.random.Generator(np.random.Philox(3))) for _ in range(2)]
    assert made[0] == made[1]
    tensor = Tensor("w", kind, (4, 1024), memoryview(made[0]))
    check_finite(tensor)
    values = dequantise(tensor)
    assert 0.02 < float(values.std()) < 0.6
    assert abs(float(values.mean())) < 0.3


def test_the_results_stay_finite_and_vary() -> None:
    backend: Backend = make_backend("onnxruntime", 1)
    results, _ = compute(backend, fixed_networks()[-1])
    assert all(np.isfinite(values).all() and values.std() > 0 for values in results)
    assert "rope_freqs.weight" not in FixedWeights(fixed_networks()[0])
