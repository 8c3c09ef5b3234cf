from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

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
