"""The memory that a daemon takes for a model: while it loads, while it answers, and after the answer."""

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


class MemoryWatch:
    """Records the largest resident memory of a process, in a thread that runs `run` until `stopped` is set."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.peak_bytes = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.01):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


@contextmanager
def watched(pid: int) -> Iterator[MemoryWatch]:
    watch = MemoryWatch(psutil.Process(pid))
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.stopped.set()
        thread.join()


def card_of(shared_cache: Path, model: str) -> ModelCard:
    command = [sys.executable, "-P", "-m", "meshd", "pull", model, "--cache", str(shared_cache)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    stored = Store(shared_cache / "models").get(model)
    assert stored is not None
    with GgufFile.open(stored.path) as file:
        return card_from_gguf(file, name=model, ref=stored.ref, model_id=stored.id)


@pytest.mark.parametrize("model", [pytest.param("smollm2:135m", marks=pytest.mark.slow), "gemma3:270m"])
def test_a_stage_takes_at_most_a_quarter_more_than_its_weights_and_kv(cluster: Cluster, shared_cache: Path, model: str) -> None:
    """The limit includes 400 MB for Python, torch and onnxruntime. A tied embedding counts twice, as in plans.

    Peer `a` gets the request and peer `b` computes the stage, so that the memory of `b` does not include the tokenizer.
    """
    card = card_of(shared_cache, model)
    weights = sum(card.layer_bytes) + card.embedding_bytes + card.head_bytes
    allowed = 1.25 * (weights + CONTEXT * card.kv_bytes_per_token_layer() * card.spec.layers) + SLACK_BYTES
    cluster.forked = False
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
    measured = {"loading": loading.peak_bytes, "running": running.peak_bytes, "rest": at_rest}
    print(json.dumps({"model": model, "allowed": allowed, **measured}))
    assert max(measured.values()) <= allowed
