"""A real daemon and models whose tokenizer or chat template is hostile or broken."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from real_daemons.cluster import Cluster, Daemon, wait_for
from tiny.bad_files import small_gguf
from tiny.hostile_templates import ENDLESS, FREEZES, FREEZES_AT, HARMLESS

FILES: dict[str, dict[str, Any]] = {
    "good": {"tokenizer.chat_template": HARMLESS},
    "freezes": {"tokenizer.chat_template": FREEZES},
    "broken": {"tokenizer.chat_template": "{% for m in %}"},
    "unknown": {"tokenizer.ggml.pre": "gemma4"},
    "endless": {"tokenizer.chat_template": ENDLESS},
}


def make_files(root: Path) -> dict[str, str]:
    """Write the files and pull them into a store. Returns: name -> reference."""
    refs = {}
    for name, more in FILES.items():
        path = root / f"{name}.gguf"
        path.write_bytes(small_gguf(more={"general.name": name, **more}))
        refs[name] = f"file:{path}"
        command = [sys.executable, "-P", "-m", "meshd", "pull", refs[name], "--models-dir", str(root / "models")]
        subprocess.run(command, capture_output=True, timeout=60)  # it may refuse a broken file
    return refs


def chat(daemon: Daemon, model: str, content: str) -> tuple[int, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    status, document, _ = daemon.post_raw("/v1/chat/completions", body, timeout_s=240)
    return status, document


def workers_of(daemon: Daemon) -> list[psutil.Process]:
    children = psutil.Process(daemon.process.pid).children(recursive=True)
    return [child for child in children if "meshd.models.text.worker" in child.cmdline()]


def test_hostile_text_reaches_neither_the_daemon_nor_other_requests(cluster: Cluster, tmp_path: Path) -> None:
    refs = make_files(tmp_path)
    cluster.start("a", flags=("--models-dir", str(tmp_path / "models"), "--model", refs["good"]))
    daemon = cluster["a"]
    assert workers_of(daemon) == [], "no worker before there is a model that can answer"
    wait_for(lambda: daemon.get_raw("/ready")[0] == 200, "the model to be placed", daemon)
    wait_for(lambda: bool(workers_of(daemon)), "the text worker to be started before the first request", daemon)
    assert chat(daemon, refs["good"], "!")[0] == 200

    for name, why in (("broken", "chat template"), ("unknown", "gemma4"), ("endless", "MiB of memory")):
        status, document = chat(daemon, refs[name], "!")
        assert status >= 400
        assert why in document["error"]["message"] or status == 404, document
        assert refs[name] not in [row["id"] for row in daemon.get("/v1/models")["data"]]

    outcome: list[tuple[int, Any]] = []
    freezing = threading.Thread(target=lambda: outcome.append(chat(daemon, refs["freezes"], FREEZES_AT)))
    freezing.start()
    answered = 0
    while freezing.is_alive():
        assert daemon.get("/health", timeout_s=10)
        assert chat(daemon, refs["good"], "!")[0] == 200
        answered += 1
    [(status, document)] = outcome
    assert status == 400
    assert "takes more than" in document["error"]["message"]
    assert answered > 1
    assert chat(daemon, refs["freezes"], "!")[0] == 200

    left = workers_of(daemon)
    assert daemon.stop() == 0
    assert not [worker for worker in left if worker.is_running()]
    assert "Traceback" not in daemon.log.read_text()
