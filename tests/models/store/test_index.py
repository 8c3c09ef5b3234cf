"""The store's index: every call reads the file, and every change replaces the file atomically."""

from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from meshd.errors import StorageError
from meshd.models.files.disk import FileStamp, stamp_of
from meshd.models.store import index as index_module
from meshd.models.store.index import Index, StoredModel
from meshd.types import ModelId


def model(path: Path, name: str = "tiny", *, in_place: bool = False) -> StoredModel:
    stamp = stamp_of(path) or FileStamp(3, 0, 0)
    return StoredModel(
        name=name, ref="pypi:tiny==1", id=ModelId("a" * 32), sha256="a" * 64, path=path, in_place=in_place, stamp=stamp, created=7
    )


def test_models_are_read_back_by_another_index(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert Index(folder).read() == ()
    one, two = model(tmp_path / "é.gguf"), model(tmp_path / "b.gguf", "other", in_place=True)
    Index(folder).put(one)
    Index(folder).put(two)
    assert Index(folder).read() == (one, two)
    replaced = msgspec.structs.replace(one, created=8)
    Index(folder).put(replaced)
    assert set(Index(folder).read()) == {replaced, two}


def test_a_change_that_fails_writes_nothing(tmp_path: Path) -> None:
    index = Index(tmp_path)
    index.put(model(tmp_path / "a.gguf"))
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(ZeroDivisionError), index.changing() as models:
        models[1 // 0] = models.popitem()[1]  # raises after the model was removed from the dict
    assert (tmp_path / "index.json").read_bytes() == before
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("content", [b"", b"{", b'{"models": [{"name": 3}]}', b'{"models": 1}', b"\xff"])
def test_a_broken_index_is_an_error_with_a_hint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"index\.json can't be read") as caught:
        Index(tmp_path).read()
    assert "remove it" in caught.value.hint
    with pytest.raises(StorageError, match=r"index\.json can't be read"):
        Index(tmp_path).put(model(tmp_path / "a.gguf"))
    assert (tmp_path / "index.json").read_bytes() == content


def test_an_index_locked_by_another_process_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_LOCK_S", 0.05)
    with FileLock(tmp_path / "index.lock"), pytest.raises(StorageError, match="held by another process"):
        Index(tmp_path).put(model(tmp_path / "a.gguf"))


def test_a_folder_that_can_not_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="can't be written"):
        Index(tmp_path / "file").put(model(tmp_path / "a.gguf"))


def test_a_model_is_found_by_name_reference_and_id(tmp_path: Path) -> None:
    one = model(tmp_path / "a.gguf")
    assert all(one.is_called(name) for name in ("tiny", "pypi:tiny==1", "a" * 32))
    assert not one.is_called("a" * 64)


def test_a_fetched_file_must_keep_its_size_and_a_users_file_may_change(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"123")
    fetched, users = model(path), model(path, in_place=True)
    assert (fetched.is_here(), users.is_here()) == (True, True)
    path.write_bytes(b"12")
    assert (fetched.is_here(), users.is_here()) == (False, True)
    path.unlink()
    assert (fetched.is_here(), users.is_here()) == (False, False)
