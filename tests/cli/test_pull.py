from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from meshd.models.store.catalogue import CATALOGUE, FileSource, ModelRef
from tiny.gguf_file import write_gguf
from tiny.hf_folders import write_folder

Meshd = Callable[..., CompletedProcess[str]]


def test_pulling_an_unknown_model_names_the_nearest(meshd: Meshd) -> None:
    outcome = meshd("pull", "smolm2:135m")
    assert outcome.returncode == 1
    assert "nearest: smollm2:135m" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_a_folder_is_pulled_quantised_listed_and_removed(meshd: Meshd, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    assert "+q4 is here: " in meshd("pull", f"file:{folder}", "--quant", "q4").stdout
    assert f"file:{folder}+q4" in meshd("models").stdout
    assert "is removed: " in meshd("rm", f"file:{folder}+q4").stdout
    outcome = meshd("pull", "smollm2:135m", "--quant", "q4")
    assert outcome.returncode == 2
    assert "can't be quantised" in outcome.stderr


def test_a_file_that_is_no_model_is_refused(meshd: Meshd, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model")
    outcome = meshd("pull", f"file:{path}")
    assert outcome.returncode == 1
    assert outcome.stderr.splitlines()[-1].startswith("meshd: ")
    assert "Traceback" not in outcome.stderr


def test_a_failure_is_printed_once(meshd: Meshd, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="falcon")
    outcome = meshd("pull", f"file:{path}")
    assert outcome.stderr.count("'falcon'") == 1
    assert "0 B" not in outcome.stderr


def test_a_note_about_the_model_is_a_line_of_its_own(meshd: Meshd, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", layers=2, extra={"blk.1.nextn.enorm.weight": (64,)})
    outcome = meshd("pull", f"file:{path}")
    assert outcome.returncode == 0
    assert [line for line in outcome.stderr.splitlines() if line.startswith("note: 10 tensors that predict")]


def test_the_reason_why_a_source_was_not_used_is_printed_once(
    meshd: Meshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, present = FileSource(tmp_path / "missing.gguf"), FileSource(write_gguf(tmp_path / "m.gguf"))
    monkeypatch.setitem(CATALOGUE, "tiny", ModelRef(name="tiny", sources=(missing, FileSource(tmp_path / "gone.gguf"))))
    outcome = meshd("pull", "tiny")
    assert outcome.returncode == 1
    assert outcome.stderr.count("missing.gguf can't be used") == outcome.stderr.count("gone.gguf can't be used") == 1
    monkeypatch.setitem(CATALOGUE, "tiny", ModelRef(name="tiny", sources=(missing, present)))
    outcome = meshd("pull", "tiny")
    assert outcome.returncode == 0
    assert outcome.stderr.count("missing.gguf can't be used") == 1
