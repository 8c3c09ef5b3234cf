from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tiny.hf_folders import write_folder

Meshd = Callable[..., CompletedProcess[str]]


def test_removing_an_unknown_model_fails(meshd: Meshd) -> None:
    outcome = meshd("rm", "smollm2:135m")
    assert outcome.returncode == 1
    assert "no model 'smollm2:135m'" in outcome.stderr


def test_a_removed_model_is_gone_and_its_size_is_printed(meshd: Meshd, tmp_path: Path) -> None:
    ref = f"file:{write_folder(tmp_path / 'hf')}"
    assert meshd("pull", ref, "--quant", "q4").returncode == 0
    outcome = meshd("rm", f"{ref}+q4")
    assert outcome.returncode == 0
    assert outcome.stdout.startswith(f"{ref}+q4 is removed: ")
    assert meshd("rm", f"{ref}+q4").returncode == 1
