"""The real model on both backends: sensible text, and the same bits for any split into stages."""

import itertools
from collections.abc import Iterator

import pytest

from meshd.kernels.backend import Backend, LoadedLayers
from meshd.models.cards import card_from_gguf
from meshd.models.files.gguf import GgufFile
from meshd.types import LayerRange, ModelId, ModelSpec
from tiny.steps import Chain

PROMPT = ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")
ANSWER = ("ĠParis", ".")
CUTS = [(15,), (1, 29), (3, 11, 12, 25)]


@pytest.fixture(scope="module")
def spec(smollm2: GgufFile) -> ModelSpec:
    return card_from_gguf(smollm2, name="smollm2", ref="file:smollm2", model_id=ModelId("0" * 32)).spec


@pytest.fixture(scope="module")
def vocabulary(smollm2: GgufFile) -> list[str]:
    tokens = smollm2.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, tuple)
    return [str(token) for token in tokens]


@pytest.fixture(scope="module")
def loaded(backend: Backend, smollm2: GgufFile, spec: ModelSpec) -> Iterator[LoadedLayers]:
    layers = backend.load(spec, LayerRange(0, spec.layers), smollm2, embedding=True, head=True)
    yield layers
    layers.close()


@pytest.fixture(scope="module")
def prompt(vocabulary: list[str]) -> list[int]:
    return [vocabulary.index(token) for token in PROMPT]


def test_greedy_text_is_sensible(loaded: LoadedLayers, spec: ModelSpec, vocabulary: list[str], prompt: list[int]) -> None:
    answer = Chain.of(spec, [loaded.stage(loaded.layers)]).greedy(prompt, 2)
    assert tuple(vocabulary[token] for token in answer) == ANSWER


@pytest.mark.parametrize("borders", CUTS)
def test_any_split_gives_the_same_bits(loaded: LoadedLayers, spec: ModelSpec, prompt: list[int], borders: tuple[int, ...]) -> None:
    ranges = [LayerRange(a, b) for a, b in itertools.pairwise((0, *borders, spec.layers))]
    one = Chain.of(spec, [loaded.stage(loaded.layers)])
    many = Chain.of(spec, [loaded.stage(layers) for layers in ranges])
    hidden, split = one.run(prompt, [3, 1, 1]), many.run(prompt, [3, 1, 1])
    assert split.tobytes() == hidden.tobytes()
    assert many.logits(split).tobytes() == one.logits(hidden).tobytes()


def test_any_chunks_give_the_same_bits(loaded: LoadedLayers, spec: ModelSpec, prompt: list[int]) -> None:
    """So an answer continues unchanged after a replay of its prompt."""
    stage = loaded.stage(loaded.layers)
    answers = [Chain.of(spec, [stage]).greedy(prompt, 8, chunk) for chunk in (1, 2, 5)]
    assert answers[0] == answers[1] == answers[2]
    one_chunk, one_by_one = (Chain.of(spec, [stage]).run(prompt, chunks) for chunks in ([5], [1] * 5))
    assert one_chunk.tobytes() == one_by_one.tobytes()
