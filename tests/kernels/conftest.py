"""Both backends, a tiny model, and the real SmolLM2."""

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
    """Each backend in turn; tests of precision also parametrise this fixture with `onnxruntime-exact`."""
    assert request.param.removesuffix(EXACT) in available_backends()
    return make_backend(request.param, threads=2)


@pytest.fixture(scope="session")
def model() -> TinyLlama:
    """A model in Q4_1, with a tied head in Q8_0, as in SmolLM2."""
    return TinyLlama(tiny_spec(tied=True), kinds={"token_embd": "Q8_0"})


@pytest.fixture(scope="session")
def loaded(backend: Backend, model: TinyLlama) -> Iterator[LoadedLayers]:
    """All layers of the model, loaded as one range."""
    layers = backend.load(model.spec, LayerRange(0, model.spec.layers), model, embedding=True, head=True)
    yield layers
    layers.close()


@pytest.fixture(scope="session")
def smollm2() -> Iterator[GgufFile]:
    """The real model, if `make test` or a user has pulled it."""
    stored = Store(Settings()["models-dir"].value).get("smollm2:135m")
    if stored is None:
        pytest.skip("meshd pull smollm2:135m")
    with GgufFile.open(stored.path) as file:
        yield file
