"""Both backends, and models small enough to compute in no time."""

from collections.abc import Iterator

import pytest

from meshd.config import Settings
from meshd.kernels.backend import EXACT, Backend, LoadedLayers
from meshd.kernels.registry import available_backends, make_backend
from meshd.models.files.gguf import GgufFile
from meshd.models.store.store import Store
from meshd.types import LayerRange
from tiny.llama import TinyLlama, tiny_spec


@pytest.fixture(scope="session", params=["torch", "onnxruntime"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Tests that are about precision ask for `onnxruntime-exact` too."""
    assert request.param.removesuffix(EXACT) in available_backends()
    return make_backend(request.param, threads=2)


@pytest.fixture(scope="session")
def model() -> TinyLlama:
    """Q4_1 as in SmolLM2, with its Q8_0 table for both ends."""
    return TinyLlama(tiny_spec(tied=True), kinds={"token_embd": "Q8_0"})


@pytest.fixture(scope="session")
def loaded(backend: Backend, model: TinyLlama) -> Iterator[LoadedLayers]:
    """All layers of the model in one piece."""
    layers = backend.load(model.spec, LayerRange(0, model.spec.layers), model, embedding=True, head=True)
    yield layers
    layers.close()


@pytest.fixture(scope="session")
def smollm2() -> Iterator[GgufFile]:
    """The real model, where `make test` has put it."""
    stored = Store(Settings()["models-dir"].value).get("smollm2:135m")
    if stored is None:
        pytest.skip("meshd pull smollm2:135m")
    with GgufFile.open(stored.path) as file:
        yield file
