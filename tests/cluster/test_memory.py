"""What a daemon takes for a model, seen from outside: at rest, while it loads and while it answers."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from meshd.models.cards import card_from_gguf
from meshd.models.files.gguf import GgufFile
from meshd.models.store.store import Store
from meshd.types import ModelCard
from real_daemons.cluster import Cluster

CONTEXT = 1024
SLACK_BYTES = 400e6


class Watched:
    """The most memory that a process had resident so far."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.most = 0
        self.over = threading.Event()

    def look(self) -> None:
        while not self.over.wait(0.01):
            self.most = max(self.most, self._process.memory_info().rss)


@contextmanager
def watched(pid: int) -> Iterator[Watched]:
    watch = Watched(psutil.Process(pid))
    thread = threading.Thread(target=watch.look)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def card_of(shared_cache: Path, model: str) -> ModelCard:
    command = [sys.executable, "-P", "-m", "meshd", "pull", model, "--cache", str(shared_cache)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    stored = Store(shared_cache / "models").get(model)
    assert stored is not None
    with GgufFile.open(stored.path) as file:
        return card_from_gguf(file, name=model, ref=stored.ref, model_id=stored.id)


@pytest.mark.parametrize("model", [pytest.param("smollm2:135m", marks=pytest.mark.slow), "gemma3:270m"])
def test_a_stage_takes_a_quarter_more_than_its_weights_and_kv(cluster: Cluster, shared_cache: Path, model: str) -> None:
    """And 400 MB for Python, torch and onnxruntime. A tied table counts for both ends, as in plans.

    The tokenizer is at the peer that is asked, not at the stage.
    """
    card = card_of(shared_cache, model)
    weights = sum(card.layer_bytes) + card.embedding_bytes + card.head_bytes
    allowed = 1.25 * (weights + CONTEXT * card.kv_bytes_per_token_layer() * card.spec.layers) + SLACK_BYTES
    cluster.start("a", "b")
    cluster.see_each_other()
    stage = cluster["b"].process.pid
    with watched(stage) as loading:
        cluster.place("a", model=model, stages=f"b:0-{card.spec.layers}", context=CONTEXT)
    with watched(stage) as running:
        body = {"model": model, "prompt": "word " * 700, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        status, document, headers = cluster["a"].post_raw("/v1/completions", body)
        assert status == 200, document
        assert headers["x-meshd-plan"] == f"b:0-{card.spec.layers}"
    at_rest = psutil.Process(stage).memory_info().rss
    print(json.dumps({"model": model, "allowed": allowed, "loading": loading.most, "running": running.most, "rest": at_rest}))
    assert max(loading.most, running.most, at_rest) <= allowed
