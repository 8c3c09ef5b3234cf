"""Sessions of a small Llama model on a `StageMesh`, and a check that nothing of them is left over."""

import asyncio
from typing import Any

import numpy as np
import pytest

from meshd.errors import RemoteFailure
from meshd.kernels.backend import LoadedLayers
from meshd.kernels.registry import make_backend
from meshd.protocol.messages import Step, Steps
from meshd.types import LayerRange
from opaque.stage import OpaqueLoaded
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from tiny.llama import TinyLlama, tiny_spec

LLAMA = TinyLlama(tiny_spec())
"""Its head is not the embedding: with a tied one, a random model repeats one token, and equal tokens hide faults."""
PROMPT = np.random.default_rng(4).integers(0, 320, 40).tolist()
ANSWER = 60
"""Number of tokens of a whole answer."""


BACKENDS = ("torch", "opaque")
"""`opaque` hides the hidden states and the KV of `onnxruntime` from everything that is not the backend, as a GPU would."""


def load(backend: str, model: TinyLlama) -> LoadedLayers:
    """Load all layers of a model with one of `BACKENDS`."""
    made = make_backend("onnxruntime" if backend == "opaque" else backend, threads=1)
    loaded = made.load(model.spec, LayerRange(0, model.spec.layers), model, embedding=True, head=True)
    return OpaqueLoaded(loaded) if backend == "opaque" else loaded


def driver(mesh: StageMesh, at: StagePeer, max_tokens: int = ANSWER, **sampling: Any) -> Driver:
    return Driver(mesh, at, PROMPT, max_tokens, **sampling)


async def expected(mesh: StageMesh, **sampling: Any) -> list[int]:
    """Return the answer of an undisturbed session on one peer."""
    alone = mesh.start("z")
    session = driver(mesh, alone, **sampling)
    await session.begin((alone, "0-4"))
    await session.wait_tokens(ANSWER)
    await session.close(alone)
    return session.tokens


async def refused(session: Driver, *stages: tuple[StagePeer, str], **changes: Any) -> str:
    """Open stages that must be refused. Returns: the error message."""
    with pytest.raises(RemoteFailure) as caught:
        await session.open(*stages, **changes)
    return str(caught.value)


def stage_of(peer: StagePeer) -> Any:
    """Return the only stage that runs on the peer."""
    (active,) = peer.host._active.values()
    return active


def sent_steps(peer: StagePeer) -> list[Step]:
    """Return the steps that the peer sent to later stages."""
    frames = [message for _, message in peer.links.sent if isinstance(message, Steps)]
    return [step for frame in frames for step in frame.steps if step.stage]


def sent_tokens(peer: StagePeer) -> int:
    """Count the tokens in the steps that the peer sent to later stages."""
    return sum(step.tokens for step in sent_steps(peer))


def leftovers(peer: StagePeer) -> dict[str, Any]:
    """Return everything that the peer holds of sessions; empty if it holds nothing."""
    kv_manager = peer.host._kv_manager
    found = {
        "leased bytes": peer.residents.arena.reserved_bytes,
        "resident": peer.resident.sessions,
        "outputs": kv_manager.outputs.used_bytes,
        "logs": len(kv_manager.outputs._logs),
        "sessions": list(kv_manager),
        "active": peer.host._active,
        "preparing": len(peer.host._preparing),
        "users": dict(peer.resident.stages.users),
        "copies": peer.host._mirrors_out._all(),
    }
    return {name: value for name, value in found.items() if value}


async def until_empty(mesh: StageMesh) -> None:
    """Wait until no peer holds anything of any session. Fails after 5 s."""
    try:
        async with asyncio.timeout(5):
            while any(leftovers(peer) for peer in mesh.peers.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    except TimeoutError:
        pytest.fail(str([leftovers(peer) for peer in mesh.peers.values()]))
