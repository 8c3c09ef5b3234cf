"""Tests that every backend must pass."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest

from meshd.errors import InvalidRequest, LocalFault, ModelFileError
from meshd.kernels.attention import local
from meshd.kernels.backend import Backend, LoadedLayers, Segment
from meshd.kernels.registry import make_backend
from meshd.kernels.torch import products as torch_products
from meshd.types import LayerRange, RopeScaling, Tensor
from tiny.kv import make_lease
from tiny.llama import PlainLlama, TinyLlama, tiny_spec
from tiny.steps import Chain

IDS = np.random.default_rng(1).integers(0, 320, 24).tolist()
CHUNKS = [7, 9, 1, 1, 5, 1]
ALL = ["torch", "onnxruntime", "onnxruntime-exact"]
ERROR = {"torch": 1e-5, "onnxruntime-exact": 1e-5, "onnxruntime": 0.03}
"""Allowed error relative to the reference's norm: rounding in float32, or int8 activations."""


def whole(loaded: LoadedLayers) -> Chain:
    return Chain.of(tiny_spec(), [loaded.stage(loaded.layers)])


def cut(loaded: LoadedLayers, borders: tuple[int, ...]) -> Chain:
    edges = [0, *borders, loaded.layers.end]
    return Chain.of(tiny_spec(), [loaded.stage(LayerRange(a, b)) for a, b in itertools.pairwise(edges)])


@pytest.mark.parametrize("backend", ALL, indirect=True)
@pytest.mark.parametrize("borders", [c for n in (1, 2, 3) for c in itertools.combinations((1, 2, 3), n)])
def test_any_split_of_the_loaded_layers_gives_the_same_bits(loaded: LoadedLayers, borders: tuple[int, ...]) -> None:
    one, many = whole(loaded), cut(loaded, borders)
    hidden = one.run(IDS, CHUNKS)
    split = many.run(IDS, CHUNKS)
    assert split.tobytes() == hidden.tobytes()
    assert many.logits(split).tobytes() == one.logits(hidden).tobytes()


@pytest.mark.parametrize("borders", [(1,), (2, 3)])
def test_stages_loaded_separately_give_the_same_bits(
    backend: Backend, model: TinyLlama, loaded: LoadedLayers, borders: tuple[int, ...]
) -> None:
    ranges = [LayerRange(a, b) for a, b in itertools.pairwise([0, *borders, 4])]
    apart = [backend.load(model.spec, r, model, embedding=r.start == 0, head=r.end == 4) for r in ranges]
    many = Chain.of(model.spec, [layers.stage(layers.layers) for layers in apart])
    hidden = many.run(IDS, CHUNKS)
    one = whole(loaded)
    assert hidden.tobytes() == one.run(IDS, CHUNKS).tobytes()
    assert many.logits(hidden).tobytes() == one.logits(hidden).tobytes()
    for layers in apart:
        layers.close()


def test_overlapping_ranges_serve_the_same_bits(backend: Backend, model: TinyLlama, loaded: LoadedLayers) -> None:
    overlap = backend.load(model.spec, LayerRange(1, 4), model, embedding=False, head=True)
    for border in (1, 2, 3):
        chain = Chain.of(model.spec, [loaded.stage(LayerRange(0, border)), overlap.stage(LayerRange(border, 4))])
        assert chain.run(IDS, CHUNKS).tobytes() == whole(loaded).run(IDS, CHUNKS).tobytes()
    overlap.close()


@pytest.mark.parametrize("backend", ALL, indirect=True)
def test_hidden_states_and_logits_agree_with_numpy(backend: Backend, loaded: LoadedLayers, model: TinyLlama) -> None:
    plain, chain = PlainLlama(model), whole(loaded)
    expected, got = plain.hidden(np.array(IDS)), chain.run(IDS, CHUNKS)
    assert np.linalg.norm(got - expected) < ERROR[backend.name] * np.linalg.norm(expected)
    logits = plain.logits(expected)
    assert np.linalg.norm(chain.logits(got) - logits) < ERROR[backend.name] * np.linalg.norm(logits)


@pytest.mark.parametrize("backend", ALL, indirect=True)
@pytest.mark.parametrize(
    "kinds",
    [
        {"attn_v": "Q8_0", "ffn_up": "Q4_0", "output": "Q8_0"},
        {"attn_q": "F16", "ffn_down": "BF16", "token_embd": "F32", "output": "F16"},
    ],
)
def test_kinds_may_be_mixed_within_a_layer(backend: Backend, kinds: dict[str, str]) -> None:
    model = TinyLlama(tiny_spec(layers=2), kinds=kinds)
    layers = backend.load(model.spec, LayerRange(0, 2), model, embedding=True, head=True)
    chain, plain = Chain.of(model.spec, [layers.stage(layers.layers)]), PlainLlama(model)
    expected = plain.logits(plain.hidden(np.array(IDS)))
    got = chain.logits(chain.run(IDS, CHUNKS))
    assert np.linalg.norm(got - expected) < ERROR[backend.name] * np.linalg.norm(expected)
    layers.close()


@pytest.mark.parametrize("chunks", [[1] * 24, [2] * 12, [13, 11], [24]])
def test_results_do_not_depend_on_the_chunks(loaded: LoadedLayers, chunks: list[int]) -> None:
    expected, got = whole(loaded).run(IDS, CHUNKS), whole(loaded).run(IDS, chunks)
    assert got.tobytes() == expected.tobytes()
    assert whole(loaded).logits(got).tobytes() == np.concatenate([whole(loaded).logits(row[None]) for row in got]).tobytes()


def test_greedy_text_does_not_depend_on_chunks(loaded: LoadedLayers) -> None:
    assert whole(loaded).greedy(IDS, 12, chunk=5) == whole(loaded).greedy(IDS, 12)


def test_a_ragged_step_computes_each_session_as_if_alone(loaded: LoadedLayers) -> None:
    stage = loaded.stage(loaded.layers)
    leases = [make_lease(tiny_spec(), loaded.layers, 40) for _ in range(2)]
    stage.forward(stage.embed(np.array(IDS[:6], np.int32)), [Segment(leases[1], 0, 6)])
    ids = np.array(IDS[:10] + IDS[6:8], np.int32)
    both = stage.forward(stage.embed(ids), [Segment(leases[0], 0, 10), Segment(leases[1], 6, 2)])
    alone = np.concatenate([whole(loaded).run(IDS[:10], [10]), whole(loaded).run(IDS[:8], [6, 2])[6:]])
    assert both.tobytes() == alone.tobytes()


def test_a_lease_that_grew_gives_the_same_bits(loaded: LoadedLayers) -> None:
    stage, lease = loaded.stage(loaded.layers), make_lease(tiny_spec(), loaded.layers, 40)
    ids, hidden = IDS + IDS[:20], []
    for start, part in ((0, ids[:40]), (40, ids[40:])):
        lease.grow(start + len(part))
        hidden.append(stage.forward(stage.embed(np.array(part, np.int32)), [Segment(lease, start, len(part))]))
    assert np.concatenate(hidden).tobytes() == whole(loaded).run(ids, [40, 4]).tobytes()


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "onnxruntime-exact"])
def test_bits_do_not_depend_on_the_number_of_threads(name: str, model: TinyLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PARALLEL_WORK` is 0, so that even this small model uses several threads."""
    monkeypatch.setattr(local, "PARALLEL_WORK", 0)
    monkeypatch.setattr(torch_products, "PARALLEL_WORK", 0)
    monkeypatch.setattr(torch_products, "ROWS", 64)
    results = []
    for threads in (1, 3):
        layers = make_backend(name, threads).load(model.spec, LayerRange(0, 4), model, embedding=True, head=True)
        chain = whole(layers)
        hidden = chain.run(IDS, CHUNKS)
        results.append((hidden.tobytes(), chain.logits(hidden).tobytes()))
        layers.close()
    assert results[0] == results[1]


def test_bits_do_not_depend_on_the_calling_thread(loaded: LoadedLayers) -> None:
    """A daemon loads on one thread and computes on another; torch has a separate limit of threads for each of them."""
    chain = whole(loaded)
    with ThreadPoolExecutor(1) as other:
        elsewhere = other.submit(chain.run, IDS, CHUNKS).result()
    assert elsewhere.tobytes() == chain.run(IDS, CHUNKS).tobytes()


def test_inputs_are_not_modified(loaded: LoadedLayers) -> None:
    stage = loaded.stage(loaded.layers)
    hidden = stage.embed(np.array(IDS, np.int32))
    before = hidden.copy()
    stage.forward(hidden, [Segment(make_lease(tiny_spec(), loaded.layers, 24), 0, 24)])
    stage.logits(hidden)
    assert hidden.tobytes() == before.tobytes()


def test_an_id_outside_the_vocabulary_is_refused(loaded: LoadedLayers) -> None:
    for token in (-1, 320):
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            loaded.stage(loaded.layers).embed(np.array([3, token], np.int32))


@pytest.mark.parametrize("shape", [(3, 128), (4, 64)])
def test_an_activation_of_another_shape_is_refused(loaded: LoadedLayers, shape: tuple[int, int]) -> None:
    stage = loaded.stage(loaded.layers)
    with pytest.raises(LocalFault, match="segments ask for 4 x 128"):
        stage.forward(np.zeros(shape, np.float32), [Segment(make_lease(tiny_spec(), loaded.layers, 8), 0, 4)])


def test_a_middle_stage_has_neither_embedding_nor_head(backend: Backend, model: TinyLlama) -> None:
    layers = backend.load(model.spec, LayerRange(1, 3), model, embedding=False, head=False)
    stage = layers.stage(layers.layers)
    with pytest.raises(LocalFault, match="without the embedding"):
        stage.embed(np.array([1], np.int32))
    with pytest.raises(LocalFault, match="without the head"):
        stage.logits(np.zeros((1, 128), np.float32))
    with pytest.raises(LocalFault, match="not loaded"):
        layers.stage(LayerRange(0, 2))
    layers.close()
    layers.close()
    with pytest.raises(LocalFault, match="not loaded"):
        layers.stage(LayerRange(1, 3))


def test_weights_stay_quantised(loaded: LoadedLayers) -> None:
    """32 weights take 20 bytes in a Q4_1 file and 24 in memory, with scales and shifts in float32; in Q8_0, 34 and 36 bytes."""
    spec = tiny_spec()
    per_layer = spec.hidden * (spec.heads + spec.kv_heads) * 2 * spec.head_dim + 3 * spec.hidden * spec.ffn
    expected = 4 * per_layer * 24 / 32 + spec.vocab * spec.hidden * 36 / 32
    border = spec.hidden * spec.head_dim * 10 * 24 / 32
    assert expected <= loaded.weight_bytes <= expected + 4 * (per_layer * 24 / 32 + border)


def test_progress_rises_to_one(backend: Backend, model: TinyLlama) -> None:
    seen: list[float] = []
    backend.load(model.spec, LayerRange(0, 4), model, embedding=True, head=True, progress=seen.append).close()
    assert seen == sorted(seen)
    assert len(set(seen)) >= 4
    assert seen[-1] == 1.0


def test_a_tensor_of_another_shape_is_named(backend: Backend, model: TinyLlama) -> None:
    class Wrong(TinyLlama):
        def tensor(self, name: str) -> Tensor:
            return super().tensor("blk.0.attn_k.weight" if name == "blk.1.attn_q.weight" else name)

    with pytest.raises(ModelFileError, match=r"blk\.1\.attn_q"):
        backend.load(model.spec, LayerRange(0, 2), Wrong(model.spec), embedding=False, head=False)


ODD = [{"activation": "relu"}, {"qk_norm": "each"}, {"rope_scaling": RopeScaling(kind="ntk", factor=2.0)}]


@pytest.mark.parametrize("odd", ODD)
def test_a_spec_from_a_newer_peer_with_unknown_features_is_refused(backend: Backend, odd: dict[str, Any]) -> None:
    spec = msgspec.structs.replace(tiny_spec(architecture="mamba"), **odd)
    with pytest.raises(ModelFileError, match="mamba"):
        backend.load(spec, LayerRange(0, 1), TinyLlama(spec), embedding=False, head=False)
